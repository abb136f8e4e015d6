"""One process's part of a training: how the training starts, saves, stops and fails."""

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

from fastiat.config import PRESETS, TrainConfig
from fastiat.mix import chance_loss
from fastiat.runs.directory import METRICS, MODEL, PREVIOUS, STATE, Run
from fastiat.system.errors import InputError, explain_os, one_line, out_of_memory
from fastiat.system.progress import Events, Progress
from fastiat.system.ranks import ranks
from fastiat.system.settings import flag_of, is_own_arch
from fastiat.system.signals import SignalInterrupt, Signals, TrainingInterrupt
from fastiat.training import rows
from fastiat.training.rows import Training

GROWTH = 10
"""A loss of the first epoch above this multiple of the loss of a uniform guess causes a warning."""
MOST_SKIPPED = 20
"""Number of consecutive skipped updates (--on-nan skip) that ends the training."""


class Session:
    """A training from the start of this process to its end.

    Any method raises `InputError` if the training has diverged, which means that a loss, gradient
    or weight is not finite. The last checkpoint is intact after that.
    """

    def __init__(self, trainer: Training, run: Run) -> None:
        self.trainer, self.run = trainer, run
        self.signals = Signals(second_ends=trainer.ranks.alone)
        self.saved_at, self.saved_step = time.monotonic(), 0
        self.warned = False
        # Constants such as an attention mask of -inf.
        self.masks = {
            name
            for name, buffer in trainer.model.named_buffers(remove_duplicate=False)
            if not buffer.isfinite().all()
        }

    def start(self) -> bool:
        """Load the checkpoint, or write the first one; return whether training remains to be done.

        Raises `InputError` if the checkpoint is of other data, damaged or lost.
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
            # The run has trained before. To start over would write rows of metrics.jsonl twice.
            raise InputError(
                f"{run.path} has lost {STATE} and {PREVIOUS}: put one back, or start again with "
                f"another --out"
            )
        # Only now are the data known to be those of the run.
        run.follow(trainer.config)
        run.rewind(trainer.step, trainer.validated_epochs)
        if trainer.ranks.first:
            self._warn_of_lost_rows()
        if trainer.validated_epochs == trainer.epoch and trainer.finished:
            run.log_line(
                f"{run.path} is trained already, {trainer.epoch} epochs: nothing to resume"
            )
            return False
        # Paths and --resume are not compared. `check_same` also makes the first rank wait, before
        # it writes a checkpoint, until every rank has looked for one.
        settings = replace(trainer.config, out=None, data_dir=None, extra=None, resume=False)
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
        """Warn if metrics.jsonl lacks rows from before the checkpoint.

        A crash cannot remove them, because metrics.jsonl is fsynced before a checkpoint is written.
        """
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
        """Stop if any rank has received a signal; else, if `save`, write a checkpoint that is due.

        All ranks must decide alike, so they share one reduction: a signal of any rank counts, and
        the clock of the first rank says whether a checkpoint is due.
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
        # torchrun ends all processes as soon as one process fails, and the first rank may still be
        # writing the checkpoint.
        self.trainer.ranks.barrier()
        raise TrainingInterrupt(
            self.signals.received,
            f"stopped at step {self.trainer.step}, checkpoint written; "
            f"go on with: {resume_command(self.run)}",
        )

    def position(self) -> str:
        """Return the end of an error message: the step, and the command that resumes."""
        return f" at step {self.trainer.step}; go on with: {resume_command(self.run)}"

    def check_finite(self) -> dict[str, Any]:
        """Return the trainer's state; raise `InputError` if one of its tensors is not finite."""
        state = self.trainer.state_dict()
        tensors = [state["totals"]]
        for group in (state["model"], state["average"] or {}, state["momentum"]):
            tensors += [tensor for name, tensor in group.items() if name not in self.masks]
        # Stack the results, so that the CPU waits for the device once, not once per tensor.
        if not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
            self.diverged()
        return state

    def diverged(self) -> NoReturn:
        """Raise the `InputError` for a loss or weights that are not finite."""
        self._diverged(
            f"its loss or weights are not finite at step {self.trainer.step}",
            f"skip such updates with {resume_command(self.run)} --on-nan skip, or ",
        )

    def check_skipped(self, progress: Progress) -> None:
        """Warn of the first skipped update of an epoch; raise `InputError` after too many of them.

        Too many are `MOST_SKIPPED` consecutive updates, or all updates of an epoch.
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
                f"warning: the loss or gradient of step {trainer.step} is not finite: this update "
                f"is skipped, as is every other such update of this epoch"
            )

    def _diverged(self, what: str, other_remedy: str = "") -> NoReturn:
        raise InputError(
            f"the training diverged: {what}; the checkpoint of step {self.saved_step} is intact: "
            f"{other_remedy}start again with another --out and {remedy(self.trainer.config)}"
        )

    def check_growth(self, row: dict[str, Any], progress: Progress) -> None:
        """Raise `InputError` if a loss of `row` is not finite; warn once if it is too large.

        Too large is more than `GROWTH` times the loss of a uniform guess, in the first epoch.
        """
        trainer, highest = self.trainer, max(row["clean_loss"], row["adv_loss"])
        if not math.isfinite(row["clean_loss"] + row["adv_loss"]):
            self.diverged()
        guess = chance_loss(len(trainer.card.classes), trainer.config.loss)
        if self.warned or trainer.step > len(trainer.loader) or highest <= GROWTH * guess:
            return
        self.warned = True
        progress.clear()
        self.run.log_line(
            f"warning: the loss is {highest:.3g} at step {trainer.step}, and the loss of a guess "
            f"is {guess:.2g}: the training diverges; if it does not recover, stop it and start "
            f"again with another --out and {remedy(trainer.config)}"
        )


def remedy(config: TrainConfig) -> str:
    """Return the settings to start with instead after a training with `config` has diverged."""
    usual = PRESETS[config.preset]()
    names = ("lr", "weight_decay", "momentum")
    raised = [name for name in names if getattr(config, name) > getattr(usual, name)]
    lower = [f"a lower {flag_of(n)} than {getattr(config, n):g}" for n in raised or ["lr"]]
    if config.arch == "preact18" and config.variant == "authors" and config.loss == "ce":
        network = (
            "--variant standard or --loss bce: preact18 without a final BatchNorm diverges under "
            "cross-entropy"
        )
        return "; also ".join([network, *(lower if raised else [])])
    if "lr" in (raised or ["lr"]) and config.schedule != "cosine":
        lower.append("--schedule cosine, which warms up")
    return ", or ".join(lower)


def resume_command(run: Run) -> str:
    """Return the command line that resumes `run`."""
    arch = f" --arch {shlex.quote(run.config.arch)}" if is_own_arch(run.config.arch) else ""
    return f"{ranks().launcher} train --resume --out {shlex.quote(str(run.path))}{arch}"


@contextmanager
def explaining_failures(run: Run) -> Iterator[None]:
    """Turn out-of-memory and OS errors into an `InputError` that ends with the resume command."""
    try:
        yield
    except BrokenPipeError:  # the program that reads stdout has ended, such as `head`
        raise
    except (OSError, RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            wrong = (
                "this takes more memory than there is: start again with a lower --batch-size "
                "or --width, or free memory"
            )
        elif isinstance(error, OSError) and run.has_state():
            wrong = explain_os(error)
        else:
            raise
        raise InputError(f"{wrong}; then go on with: {resume_command(run)}") from None


@contextmanager
def stoppable_measuring(path: Path) -> Iterator[None]:
    """Raise `TrainingInterrupt` if a signal arrives while a trained run is measured.

    With several ranks this does nothing: torchrun ends them.
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
            signals.received,
            f"{path} is trained; measure it with: {resume_command(Run.open(path))}",
        ) from None
