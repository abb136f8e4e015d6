"""Training: the loop around Algorithm 1, what it shows and writes, and how it stops."""

import math
import shlex
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

from fastiat import data, models
from fastiat.config import TrainConfig
from fastiat.errors import InputError, explain_os
from fastiat.progress import Events, Progress, duration
from fastiat.run import STATE, Run, check_free, default_out
from fastiat.trainer import Trainer, Update

LOG_EVERY = 20
"""Steps between two looks at the losses, each of which waits for the device."""
SAVE_EVERY = 120.0
"""Seconds between two checkpoints; the end of the training and a signal write one too."""


BEST = {"epoch": int, "errors": int}
"""What `Trainer.best` holds."""


class Interrupted(Exception):
    """A signal ended the training after a checkpoint; holds its number and the way on."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


def train(config: TrainConfig) -> Path:
    """Train as `config` says and return the run directory.

    Raises `InputError` before anything is written if the settings or the data are wrong, and
    `Interrupted` after a checkpoint when SIGINT or SIGTERM ends it.
    """
    config.check()
    path = Path(config.out) if config.out else default_out(config)
    run = None
    if config.resume:
        run = Run.open(path)
        run.check_same(config)
    else:
        check_free(path)
    trainer = Trainer(config, data.load(config.dataset, config.data_dir, loader=config.loader))
    judged, seconds = 0, 0.0
    try:
        if run is None:
            run = Run.create(path, config)
        else:
            judged, seconds = _restore(trainer, run)
        if judged == trainer.epoch and trainer.finished:
            run.say(f"{path} is trained already, {trainer.epoch} epochs: nothing to resume")
        else:
            _loop(trainer, run, judged, seconds)
    except OSError as error:
        if isinstance(error, BrokenPipeError) or not (path / STATE).exists():
            raise
        raise InputError(f"{explain_os(error)}; then go on with: {_way_on(path)}") from None
    return path


def _restore(trainer: Trainer, run: Run) -> tuple[int, float]:
    """Put the trainer where the checkpoint is; return what `_loop` keeps there: judged, seconds."""
    state = run.load_state()
    try:
        judged, seconds, best = int(state["judged"]), float(state["seconds"]), state["best"]
        if type(state["step"]) is not int or not (
            best is None or {name: type(value) for name, value in best.items()} == BEST
        ):
            raise InputError("the checkpoint's step or best epoch is no number")
        trainer.load_state_dict(state)
    except InputError as error:
        raise InputError(f"{run.path} cannot be resumed: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{run.path} cannot be resumed: {STATE} lacks {error}") from None
    run.rewind(trainer.step, judged)
    return judged, seconds


def _loop(trainer: Trainer, run: Run, judged: int, seconds: float) -> None:
    """Train to the end.

    `judged` counts the epochs that are measured, which the checkpoint may not be for its last one;
    `seconds` is what the updates of the epoch under way have taken so far.
    """
    config = trainer.config
    per_epoch = len(trainer.loader) * config.batch_size
    saved = started = time.monotonic()
    events = Events(run.append, trainer.step)

    def save() -> None:
        _check_finite(trainer)
        run.save_state(trainer.state_dict() | {"judged": judged, "seconds": seconds})

    def stop() -> NoReturn:
        save()
        raise Interrupted(
            signals.received,
            f"stopped at step {trainer.step}, checkpoint written; go on with: {_way_on(run.path)}",
        )

    run.say(_headline(trainer))
    images = trainer.step * config.batch_size
    with _Signals() as signals, Progress("training", config.epochs * per_epoch, images) as progress:
        while judged < trainer.epoch or not trainer.finished:
            trained = judged == trainer.epoch
            if trained:
                begun, first = time.monotonic() - seconds, trainer.step
                for update in trainer.epoch_updates():
                    seconds = time.monotonic() - begun
                    progress.advance(config.batch_size)
                    if trainer.step % LOG_EVERY == 0 or trainer.step == first + 1:
                        row = _step_row(trainer, update)
                        progress.show(**_figures(config, row))
                        if trainer.step % LOG_EVERY == 0:
                            run.log("step", **row)
                            events.add("step", row)
                    if signals.received:
                        stop()
                    if time.monotonic() - saved > SAVE_EVERY:
                        save()
                        saved = time.monotonic()
            _check_finite(trainer)
            if trained:  # by now the device has finished, too
                seconds = time.monotonic() - begun
            row = _epoch_row(trainer) | {
                "images_per_second": round(per_epoch / max(seconds, 1e-9), 1)
            }
            best, judging = trainer.best, time.monotonic()
            try:
                with signals.at_once():
                    better = trainer.judge(row)
            except _Now:
                trainer.best = best
                stop()
            row["seconds"] = round(seconds + time.monotonic() - judging, 3)
            judged, seconds = trainer.epoch, 0.0
            run.log("epoch", **row)
            events.add("epoch", row)
            progress.clear()
            run.say(_epoch_line(config, row))
            if better:
                run.save_model(trainer.evaluated.state_dict(), trainer.card)
            if signals.received:
                stop()
        save()
    kept = f", epoch {trainer.best['epoch']} kept" if trainer.best else ""
    run.say(
        f"trained {trainer.epoch} epochs{kept}, this time in "
        f"{duration(time.monotonic() - started)}: {run.path}"
    )


def _way_on(path: Path) -> str:
    return f"fastiat train --resume --out {shlex.quote(str(path))}"


def _check_finite(trainer: Trainer) -> None:
    """Raise `InputError` for a training that has diverged, so that nothing of it is saved."""
    tensors = [trainer.totals, *trainer.model.parameters()]
    if not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
        _diverged(trainer)


def _diverged(trainer: Trainer) -> NoReturn:
    raise InputError(
        f"the training diverged: its loss or weights are not finite at step {trainer.step}; "
        f"start again with another --out and a lower --lr, or --schedule cosine, which warms up"
    )


class _Now(BaseException):
    """A signal came in a block that it is to end."""


class _Signals:
    """SIGINT and SIGTERM, noted instead of dying of the first; the second of a kind kills."""

    def __init__(self) -> None:
        self.received = 0
        self._at_once = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        self.received = number
        signal.signal(number, self._before[number])
        if self._at_once:
            raise _Now

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """End the block with `_Now` as soon as a signal comes."""
        self._at_once = True
        try:
            if self.received:
                raise _Now
            yield
        finally:
            self._at_once = False


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
    row = {
        "step": trainer.step,
        "clean_loss": float(update.clean_loss),
        "adv_loss": float(update.adv_loss) if attacked else 0.0,
        "clean_accuracy_percent": 100 * float(update.clean_correct) / batch,
        "adv_accuracy_percent": 100 * float(update.adv_correct) / batch,
        "learning_rate": trainer.lr,
    }
    if not math.isfinite(row["clean_loss"] + row["adv_loss"]):
        _diverged(trainer)
    return row


def _epoch_row(trainer: Trainer) -> dict[str, Any]:
    steps = len(trainer.loader)
    clean_loss, adv_loss, clean, adv = (trainer.totals / steps).tolist()
    batch = trainer.config.batch_size
    return {
        "step": trainer.step,
        "epoch": trainer.epoch,
        "learning_rate": trainer.lr,
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
    return ", ".join(parts)
