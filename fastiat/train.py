"""Training: the loop around Algorithm 1, what it shows and writes, and how it stops."""

import math
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from fastiat import data, models
from fastiat.config import TrainConfig
from fastiat.engine.device import own_defaults
from fastiat.mix import chance_loss
from fastiat.runs.directory import (
    METRICS,
    MODEL,
    PREVIOUS,
    STATE,
    Onlooker,
    Run,
    check_free,
    default_out,
)
from fastiat.system.errors import InputError, check_interrupts, explain_os, one_line, out_of_memory
from fastiat.system.progress import Events, Progress, duration
from fastiat.system.ranks import ranks
from fastiat.system.signals import Now, Signals
from fastiat.trainer import Trainer, Update

LOG_EVERY = 20
"""Steps between two looks at the losses, each of which waits for the device."""
GROWN = 10
"""How many times the loss of a guess a loss is when the first epoch warns of it."""
MOST_SKIPPED = 20
"""Updates in a row that may be left out by --on-nan skip before the training ends."""


class Interrupted(Exception):
    """A signal ended the training after a checkpoint; holds its number and the way on."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


@own_defaults()
def train(config: TrainConfig) -> Path:
    """Train as `config` says and return the run directory.

    The ranks of a job (`fastiat.system.ranks`) train together, and the first writes the directory.
    Raises `InputError` before anything is written if the settings or the data are wrong or another
    process trains there, `Interrupted` after a checkpoint when SIGINT or SIGTERM ends it, and
    `Lost` where another rank has ended.
    """
    config.check()
    path = Path(config.out) if config.out else default_out(config)
    run, job = None, ranks()
    kind = Run if job.first else Onlooker
    if config.resume:
        run = kind.open(path)
        run.check_same(config)
    elif job.first:
        check_free(path)
    try:
        if run is not None:
            run.lock()
        # A folder that config.json names chooses nothing; one that is named now may be written to.
        known = None if run is None else run.config.data_dir
        fetch = config.data_dir is None or config.data_dir != known
        dataset = data.load(config.dataset, config.data_dir, loader=config.loader, fetch=fetch)
        trainer = Trainer(config, dataset)
        if run is None:
            run = Run.create(path, config) if job.first else Onlooker(path, config)
        session = _Session(trainer, run)
        with _saying_the_way_on(run), session.signals:
            check_interrupts()
            _train(session)
            # A signal may have come after the last update; and all wait for the first to write.
            if session.agree()[0]:
                session.stop()
    finally:
        if run is not None:
            run.unlock()
    return path


@contextmanager
def _saying_the_way_on(run: Run) -> Iterator[None]:
    """Add, to what the machine refuses, how to go on where that is mended."""
    try:
        yield
    except BrokenPipeError:
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
        raise InputError(f"{wrong}; then go on with: {_resume_command(run.path)}") from None


def _train(session: "_Session") -> None:
    """Train from the run's checkpoint, or from the start where there is none yet."""
    trainer, run = session.trainer, session.run
    begun = run.has_state()
    if begun:
        try:
            run.load_state(trainer.load_state_dict)
        except InputError as error:
            raise InputError(f"{run.path} cannot be resumed: {error}") from None
        session.saved_step = trainer.step
    else:
        _check_unbegun(run)
    run.follow(trainer.config)  # the data are the run's own
    run.rewind(trainer.step, trainer.validated_epochs)
    if trainer.ranks.first:
        _warn_of_lost_rows(session)
    if trainer.validated_epochs == trainer.epoch and trainer.finished:
        run.log_line(f"{run.path} is trained already, {trainer.epoch} epochs: nothing to resume")
        return
    # All have looked for a checkpoint, and read the same, before the first writes one.
    settings = replace(trainer.config, out=None, data_dir=None, resume=False)
    weights = trainer.model.state_dict().values()
    trainer.ranks.check_same(
        "settings, data and weights", settings, trainer.fingerprint, trainer.step, *weights
    )
    if not begun:
        session.save()
    trainer.ranks.context = session.resume_command
    _loop(session)


def _warn_of_lost_rows(session: "_Session") -> None:
    """Say how many rows up to the checkpoint are not in metrics.jsonl: no crash takes them out."""
    trainer = session.trainer
    rows = [row for row in session.run.rows() if row.get("kind") in ("step", "epoch")]
    there = len({(row["kind"], row[row["kind"]]) for row in rows})
    lost = trainer.step // LOG_EVERY + trainer.validated_epochs - there
    if lost > 0:
        print(
            f"fastiat: warning: {one_line(session.run.path / METRICS)} was damaged or changed: it "
            f"lacks {lost} row{'s' * (lost > 1)} of the {trainer.step} steps so far",
            file=sys.stderr,
        )


def _check_unbegun(run: Run) -> None:
    """Raise `InputError` for a run whose checkpoints are lost, as starting over would double it."""
    if (run.path / MODEL).exists() or any(row.get("kind") == "epoch" for row in run.rows()):
        raise InputError(
            f"{run.path} has lost {STATE} and {PREVIOUS}: put one back, or start again with "
            f"another --out"
        )


class _Session:
    """The part of a training that this process does: when it saves, and how it ends."""

    def __init__(self, trainer: Trainer, run: Run) -> None:
        self.trainer, self.run = trainer, run
        self.signals = Signals()
        self.saved_at, self.saved_step = time.monotonic(), 0
        self.warned = False

    def agree(self) -> tuple[int, int]:
        """Return the signal that is to end the training, or 0, and whether a checkpoint is due.

        All ranks get the same: a signal that came to any of them, and the first one's clock.
        """
        ranks, age = self.trainer.ranks, time.monotonic() - self.saved_at
        old = ranks.first and age >= self.trainer.config.checkpoint_every
        number, due = ranks.all_reduce_max(self.signals.received, old)
        if number:
            self.signals.received = number
        return number, due

    def resume_command(self) -> str:
        """Say where the training is and how it goes on."""
        return f" at step {self.trainer.step}; go on with: {_resume_command(self.run.path)}"

    def save(self) -> None:
        """Write a checkpoint; raise `InputError` instead for a training that has diverged."""
        self.check_finite()
        self.run.save_state(self.trainer.state_dict())
        self.saved_at, self.saved_step = time.monotonic(), self.trainer.step

    def stop(self) -> NoReturn:
        """Write a checkpoint and say how to go on."""
        self.save()
        self.trainer.ranks.barrier()  # as torchrun ends all where one has ended
        raise Interrupted(
            self.signals.received,
            f"stopped at step {self.trainer.step}, checkpoint written; "
            f"go on with: {_resume_command(self.run.path)}",
        )

    def check_finite(self) -> None:
        """Raise `InputError` for a training that has diverged, so that nothing of it is saved."""
        state = self.trainer.state_dict()
        groups = [state["model"], state["average"] or {}, *state["optimizer"]["state"].values()]
        tensors = [tensor for group in groups for tensor in group.values()]
        if not torch.stack(
            [tensor.isfinite().all() for tensor in [state["totals"], *tensors]]
        ).all():
            self.diverged()

    def diverged(self) -> NoReturn:
        """Raise `InputError` that names the setting at fault and the commands that go on."""
        raise InputError(
            f"the training diverged: its loss or weights are not finite at step "
            f"{self.trainer.step}; the checkpoint of step {self.saved_step} is intact: leave such "
            f"updates out with {_resume_command(self.run.path)} --on-nan skip, or start again with "
            f"another --out and {remedy(self.trainer.config)}"
        )

    def growth_warning(self, row: dict[str, Any]) -> str:
        """Return a warning, once, where the first epoch's loss is far above that of a guess."""
        trainer, highest = self.trainer, max(row["clean_loss"], row["adv_loss"])
        guess = chance_loss(len(trainer.card.classes), trainer.config.loss)
        if self.warned or trainer.step > len(trainer.loader) or not highest > GROWN * guess:
            return ""
        self.warned = True
        return (
            f"warning: the loss is {highest:.3g} at step {trainer.step}, and that of a guess "
            f"{guess:.2g}: the training diverges; if it does not recover, stop it and start again "
            f"with another --out and {remedy(trainer.config)}"
        )

    def check_skipped(self) -> None:
        """Say that the first update of an epoch was left out; end a training that skips them all.

        Raises `InputError` then, with the last checkpoint intact.
        """
        trainer = self.trainer
        if trainer.skipped_in_a_row >= MOST_SKIPPED or trainer.skipped == len(trainer.loader):
            raise InputError(
                f"the training diverged: the loss or gradient of {trainer.skipped_in_a_row} "
                f"updates in a row, the last at step {trainer.step}, was not finite; the "
                f"checkpoint of step {self.saved_step} is intact: start again with another --out "
                f"and {remedy(trainer.config)}"
            )
        if trainer.skipped_in_a_row and trainer.skipped == 1:
            self.run.log_line(
                f"warning: the loss or gradient of step {trainer.step} is not finite; it is left "
                f"out, and so is every other such step of this epoch"
            )


def remedy(config: TrainConfig) -> str:
    """Name the settings that a training which diverged is to be started with instead."""
    if config.arch == "preact18" and config.variant == "authors" and config.loss == "ce":
        return (
            "--variant standard or --loss bce: preact18 without a final BatchNorm diverges under "
            "cross-entropy"
        )
    lower = f"a lower --lr than {config.lr:g}"
    return (
        lower if config.schedule == "cosine" else f"{lower}, or --schedule cosine, which warms up"
    )


def _loop(session: _Session) -> None:
    """Train to the end."""
    trainer, run, signals = session.trainer, session.run, session.signals
    config = trainer.config
    per_epoch = len(trainer.loader) * config.batch_size
    started = time.monotonic()
    events = Events(run.append, trainer.step)
    run.log_line(_headline(trainer))
    images = trainer.step * config.batch_size
    with Progress("training", config.epochs * per_epoch, images) as progress:
        while trainer.validated_epochs < trainer.epoch or not trainer.finished:
            trained = trainer.validated_epochs == trainer.epoch
            if trained:
                begun, first = time.monotonic() - trainer.seconds, trainer.step
                for update in trainer.epoch_updates():
                    trainer.seconds = time.monotonic() - begun
                    progress.advance(config.batch_size)
                    if trainer.skipped_in_a_row:
                        progress.clear()
                        session.check_skipped()
                    if trainer.step % LOG_EVERY == 0 or trainer.step == first + 1:
                        row = _step_row(trainer, update)
                        if not trainer.skipped_in_a_row:
                            if not math.isfinite(row["clean_loss"] + row["adv_loss"]):
                                session.diverged()
                            if warning := session.growth_warning(row):
                                progress.clear()
                                run.log_line(warning)
                            progress.show(**_figures(config, row))
                        if trainer.step % LOG_EVERY == 0:
                            run.log("step", **row)
                            events.add("step", row)
                    stopping, due = session.agree()
                    if stopping:
                        session.stop()
                    if due:
                        session.save()
            session.check_finite()
            if trained:  # by now the device has finished, too
                trainer.seconds = time.monotonic() - begun
            row = _epoch_row(trainer) | {
                "images_per_second": round(per_epoch / max(trainer.seconds, 1e-9), 1)
            }
            best, judging = trainer.best, time.monotonic()
            try:
                # Ranks that count together must all come to the end of it.
                with signals.at_once() if trainer.ranks.alone else nullcontext():
                    better = trainer.validate(row)
            except Now:
                trainer.best = best
                session.stop()
            row["seconds"] = round(trainer.seconds + time.monotonic() - judging, 3)
            trainer.validated_epochs, trainer.seconds = trainer.epoch, 0.0
            run.log("epoch", **row)
            events.add("epoch", row)
            progress.clear()
            run.log_line(_epoch_line(config, row))
            if better:
                run.save_model(trainer.eval_model.state_dict(), trainer.card)
            if session.agree()[0]:
                session.stop()
        session.save()
    kept = f", epoch {trainer.best['epoch']} kept" if trainer.best else ""
    run.log_line(
        f"trained {trainer.epoch} epochs{kept}, this time in "
        f"{duration(time.monotonic() - started)}: {run.path}"
    )


@contextmanager
def saying_how_to_measure(path: Path) -> Iterator[None]:
    """Measure a run that is trained; a signal ends the block with `Interrupted` at once.

    Several ranks, which torchrun ends, are left to it.
    """
    if not ranks().alone:
        yield
        return
    signals = Signals()
    try:
        with signals, signals.at_once():
            yield
    except Now:
        raise Interrupted(
            signals.received, f"{path} is trained; measure it with: {_resume_command(path)}"
        ) from None


def _resume_command(path: Path) -> str:
    return f"{ranks().launcher} train --resume --out {shlex.quote(str(path))}"


def _headline(trainer: Trainer) -> str:
    config, loader = trainer.config, trainer.loader
    attack = {
        "none": "no attack",
        "fgsm": f"FGSM, eps {config.eps:.4g}",
        "pgd": f"PGD-{config.steps}, eps {config.eps:.4g}, alpha {config.alpha:.4g}",
    }[config.adv]
    return (
        f"{config.arch} ({models.count_parameters(trainer.model) / 1e6:.2f} M parameters), "
        f"mix {config.mix}, {attack}; {config.dataset}, {len(loader)} steps of "
        f"{config.batch_size} an epoch; {trainer.device}, {trainer.engine}, {trainer.arithmetic}"
    )


def _step_row(trainer: Trainer, update: Update) -> dict[str, Any]:
    batch, attacked = trainer.config.batch_size, trainer.config.adv != "none"
    place = {"step": trainer.step, "learning_rate": trainer.lr, "skipped": trainer.skipped}
    if trainer.skipped_in_a_row:  # its figures are no numbers
        return place
    return place | {
        "clean_loss": float(update.clean_loss),
        "adv_loss": float(update.adv_loss) if attacked else 0.0,
        "clean_accuracy_percent": 100 * float(update.clean_correct) / batch,
        "adv_accuracy_percent": 100 * float(update.adv_correct) / batch,
    }


def _epoch_row(trainer: Trainer) -> dict[str, Any]:
    steps = len(trainer.loader) - trainer.skipped
    clean_loss, adv_loss, clean, adv = (trainer.totals / steps).tolist()
    batch = trainer.config.batch_size
    return {
        "step": trainer.step,
        "epoch": trainer.epoch,
        "learning_rate": trainer.lr,
        "skipped": trainer.skipped,
        "clean_loss": clean_loss,
        "adv_loss": adv_loss,
        "clean_accuracy_percent": 100 * clean / batch,
        "adv_accuracy_percent": 100 * adv / batch,
    }


def _figures(config: TrainConfig, row: dict[str, Any]) -> dict[str, str]:
    """Write the loss and accuracy of both batches, in few words."""
    return {
        kind: f"{row[f'{kind}_loss']:.2f} {row[f'{kind}_accuracy_percent']:.0f} %"
        for kind in (("clean",) if config.adv == "none" else ("clean", "adv"))
    }


def _epoch_line(config: TrainConfig, row: dict[str, Any]) -> str:
    left = (config.epochs - row["epoch"]) * row["seconds"]
    parts = [
        f"epoch {row['epoch']}/{config.epochs}",
        f"lr {row['learning_rate']:.3g}",
        f"clean loss {row['clean_loss']:.3f} accuracy {row['clean_accuracy_percent']:.1f} %",
        f"adv loss {row['adv_loss']:.3f} accuracy {row['adv_accuracy_percent']:.1f} %",
        f"test error {row['test_error_percent']:.2f} %",
        f"{row['images_per_second']:.0f} img/s",
        f"{duration(left)} left",
    ]
    if config.adv == "none":
        del parts[3]
    if "holdout_error_percent" in row:
        parts.insert(-2, f"held-out error {row['holdout_error_percent']:.2f} %")
    if row["skipped"]:
        parts.insert(-2, f"{row['skipped']} updates left out")
    return ", ".join(parts)
