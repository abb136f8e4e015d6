"""The part of a training that this process does: how it starts, saves, stops and fails."""

import math
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from fastiat.config import TrainConfig
from fastiat.mix import chance_loss
from fastiat.runs.directory import METRICS, MODEL, PREVIOUS, STATE, Run
from fastiat.system.errors import InputError, explain_os, one_line, out_of_memory
from fastiat.system.progress import Events, Progress
from fastiat.system.ranks import ranks
from fastiat.system.signals import SignalInterrupt, Signals, TrainingInterrupt
from fastiat.training import rows
from fastiat.training.rows import Training

GROWTH = 10
"""A loss of the first epoch that is this many times the loss of a guess is warned of."""
MOST_SKIPPED = 20
"""Updates in a row that --on-nan skip may skip before the training ends."""


class Session:
    """A training from the start of this process to its end.

    Raises `InputError` from any method where the training has diverged: a loss, gradient or weight
    is not finite. The last checkpoint is then intact.
    """

    def __init__(self, trainer: Training, run: Run) -> None:
        self.trainer, self.run = trainer, run
        self.signals = Signals(second_ends=trainer.ranks.alone)
        self.saved_at, self.saved_step = time.monotonic(), 0
        self.warned = False

    def start(self) -> bool:
        """Load the checkpoint, or write the first; return whether there is anything left to train.

        Raises `InputError` where the checkpoint is of other data, damaged or lost.
        """
        trainer, run = self.trainer, self.run
        resumed = run.has_state()
        if resumed:
            try:
                run.load_state(trainer.load_state_dict)
            except InputError as error:
                raise InputError(f"{run.path} cannot be resumed: {error}") from None
            self.saved_step = trainer.step
        elif (run.path / MODEL).exists() or any(row.get("kind") == "epoch" for row in run.rows()):
            # Starting over would write the rows of metrics.jsonl a second time.
            raise InputError(
                f"{run.path} has lost {STATE} and {PREVIOUS}: put one back, or start again with "
                f"another --out"
            )
        run.follow(trainer.config)  # the data are known to be the run's own
        run.rewind(trainer.step, trainer.validated_epochs)
        if trainer.ranks.first:
            self._warn_of_lost_rows()
        if trainer.validated_epochs == trainer.epoch and trainer.finished:
            run.log_line(
                f"{run.path} is trained already, {trainer.epoch} epochs: nothing to resume"
            )
            return False
        # This also waits until every rank has looked for a checkpoint, before the first writes one.
        settings = replace(trainer.config, out=None, data_dir=None, resume=False)
        weights = trainer.model.state_dict().values()
        trainer.ranks.check_same(
            "settings, data and weights", settings, trainer.fingerprint, trainer.step, *weights
        )
        if not resumed:
            self.save()
        trainer.ranks.context = self.position
        self.events = Events(run.append, trainer.step)
        return True

    def _warn_of_lost_rows(self) -> None:
        """Warn where metrics.jsonl lacks rows up to the checkpoint, which no crash can remove."""
        trainer = self.trainer
        found = [row for row in self.run.rows() if row.get("kind") in ("step", "epoch")]
        distinct = len({(row["kind"], row[row["kind"]]) for row in found})
        lost = trainer.step // rows.LOG_EVERY + trainer.validated_epochs - distinct
        if lost > 0:
            print(
                f"fastiat: warning: {one_line(self.run.path / METRICS)} was damaged or changed: it "
                f"lacks {lost} row{'s' * (lost > 1)} of the {trainer.step} steps so far",
                file=sys.stderr,
            )

    def log(self, kind: str, row: dict[str, Any]) -> None:
        """Write a row to metrics.jsonl and to the TensorBoard events."""
        self.run.log(kind, **row)
        self.events.add(kind, row)

    def stop_or_save(self, *, save: bool = False) -> None:
        """Stop if a signal came to any rank; else, if `save`, write a checkpoint where one is due.

        One question for all ranks: the clock of the first says whether a checkpoint is due.
        """
        job, age = self.trainer.ranks, time.monotonic() - self.saved_at
        old = job.first and age >= self.trainer.config.checkpoint_every
        number, due = job.all_reduce_max(self.signals.received, old)
        if number:
            self.signals.received = number
            self.stop()
        if save and due:
            self.save()

    def save(self) -> None:
        """Write a checkpoint, unless the training has diverged."""
        self.run.save_state(self.check_finite())
        self.saved_at, self.saved_step = time.monotonic(), self.trainer.step

    def stop(self) -> NoReturn:
        """Write a checkpoint and raise `TrainingInterrupt`."""
        self.save()
        # torchrun ends all processes as soon as one has ended: the first may still be writing.
        self.trainer.ranks.barrier()
        raise TrainingInterrupt(
            self.signals.received,
            f"stopped at step {self.trainer.step}, checkpoint written; "
            f"go on with: {resume_command(self.run.path)}",
        )

    def position(self) -> str:
        """Say at which step the training is and how to resume it."""
        return f" at step {self.trainer.step}; go on with: {resume_command(self.run.path)}"

    def check_finite(self) -> dict[str, Any]:
        """Return the trainer's state; it is all finite, or the training has diverged."""
        state = self.trainer.state_dict()
        groups = [state["model"], state["average"] or {}, state["momentum"]]
        tensors = [state["totals"], *(tensor for group in groups for tensor in group.values())]
        # One wait for the device, instead of one for each tensor.
        if not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
            self.diverged()
        return state

    def diverged(self) -> NoReturn:
        """Raise `InputError` for a loss or weights that are not finite."""
        self._diverged(
            f"its loss or weights are not finite at step {self.trainer.step}",
            f"skip such updates with {resume_command(self.run.path)} --on-nan skip, or ",
        )

    def check_skipped(self, progress: Progress) -> None:
        """Warn of the first update of an epoch that is skipped; end a training that skips too many.

        Too many are `MOST_SKIPPED` in a row, or all of an epoch.
        """
        trainer = self.trainer
        if trainer.skipped_in_a_row >= MOST_SKIPPED or trainer.skipped == len(trainer.loader):
            self._diverged(
                f"the loss or gradient of {trainer.skipped_in_a_row} updates in a row, the last at "
                f"step {trainer.step}, was not finite"
            )
        if trainer.skipped_in_a_row and trainer.skipped == 1:
            progress.clear()
            self.run.log_line(
                f"warning: the loss or gradient of step {trainer.step} is not finite; it is "
                f"skipped, and so is every other such step of this epoch"
            )

    def _diverged(self, what: str, other_remedy: str = "") -> NoReturn:
        raise InputError(
            f"the training diverged: {what}; the checkpoint of step {self.saved_step} is intact: "
            f"{other_remedy}start again with another --out and {remedy(self.trainer.config)}"
        )

    def check_growth(self, row: dict[str, Any], progress: Progress) -> None:
        """End a training whose loss is not finite; warn once where the first epoch's grows far."""
        trainer, highest = self.trainer, max(row["clean_loss"], row["adv_loss"])
        if not math.isfinite(row["clean_loss"] + row["adv_loss"]):
            self.diverged()
        guess = chance_loss(len(trainer.card.classes), trainer.config.loss)
        if self.warned or trainer.step > len(trainer.loader) or highest <= GROWTH * guess:
            return
        self.warned = True
        progress.clear()
        self.run.log_line(
            f"warning: the loss is {highest:.3g} at step {trainer.step}, and that of a guess "
            f"{guess:.2g}: the training diverges; if it does not recover, stop it and start again "
            f"with another --out and {remedy(trainer.config)}"
        )


def remedy(config: TrainConfig) -> str:
    """Return the settings to start a training with instead, after one with `config` diverged."""
    if config.arch == "preact18" and config.variant == "authors" and config.loss == "ce":
        return (
            "--variant standard or --loss bce: preact18 without a final BatchNorm diverges under "
            "cross-entropy"
        )
    lower = f"a lower --lr than {config.lr:g}"
    return (
        lower if config.schedule == "cosine" else f"{lower}, or --schedule cosine, which warms up"
    )


def resume_command(path: Path) -> str:
    """Return the command line that resumes the run at `path`."""
    return f"{ranks().launcher} train --resume --out {shlex.quote(str(path))}"


@contextmanager
def explaining_failures(run: Run) -> Iterator[None]:
    """Turn out-of-memory and OS errors into one line that ends with the command to resume."""
    try:
        yield
    except BrokenPipeError:  # whoever reads stdout has ended
        raise
    except (OSError, RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            wrong = (
                "this takes more memory than there is: start again with a lower --batch-size "
                "or --width, or free some"
            )
        elif isinstance(error, OSError) and run.has_state():
            wrong = explain_os(error)
        else:
            raise
        raise InputError(f"{wrong}; then go on with: {resume_command(run.path)}") from None


@contextmanager
def stoppable_measuring(path: Path) -> Iterator[None]:
    """Raise `TrainingInterrupt` for a signal while a trained run is measured.

    Several ranks are ended by torchrun instead.
    """
    if not ranks().alone:
        yield
        return
    signals = Signals()
    try:
        with signals, signals.at_once():
            yield
    except SignalInterrupt:
        raise TrainingInterrupt(
            signals.received, f"{path} is trained; measure it with: {resume_command(path)}"
        ) from None
