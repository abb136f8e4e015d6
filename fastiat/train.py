"""Training: the loop around Algorithm 1, what it shows and writes, and how it stops."""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastiat import data, models
from fastiat.config import TrainConfig
from fastiat.errors import InputError
from fastiat.progress import Progress, duration
from fastiat.run import Run, check_free, default_out
from fastiat.trainer import Trainer, Update

LOG_EVERY = 20
"""Steps between two looks at the losses, each of which waits for the device."""
SAVE_EVERY = 30.0
"""Seconds after which the end of an epoch writes a checkpoint; the last epoch always does."""


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
    trainer = Trainer(config, data.load(config.dataset, config.data_dir))
    if run is None:
        run = Run.create(path, config)
    else:
        try:
            trainer.load_state_dict(run.load_state())
        except InputError as error:
            raise InputError(f"{path} cannot be resumed: {error}") from None
        run.rewind(trainer.step)
    _loop(trainer, run)
    return path


def _loop(trainer: Trainer, run: Run) -> None:
    # TensorBoard takes seconds to import, which a wrong flag should not have to wait for.
    from torch.utils.tensorboard import SummaryWriter

    config = trainer.config
    per_epoch = len(trainer.loader) * config.batch_size
    run.say(_headline(trainer))
    saved = started = time.monotonic()
    with (
        _signals() as received,
        SummaryWriter(str(run.path), purge_step=trainer.step) as events,
        Progress(
            "training", config.epochs * per_epoch, trainer.step * config.batch_size
        ) as progress,
    ):
        while not trainer.finished:
            epoch_started, first = time.monotonic(), trainer.step
            for update in trainer.epoch_updates():
                progress.advance(config.batch_size)
                if trainer.step % LOG_EVERY == 0:
                    row = _step_row(trainer, update)
                    run.log("step", **row)
                    for name in row.keys() - {"step"}:
                        events.add_scalar(f"step/{name}", row[name], trainer.step)
                    progress.show(
                        loss=f"{row['clean_loss']:.3f}/{row['adv_loss']:.3f}",
                        acc=f"{row['clean_accuracy_percent']:.0f}/"
                        f"{row['adv_accuracy_percent']:.0f} %",
                    )
                if received and trainer.step % len(trainer.loader):
                    _stop(trainer, run, received[0])
            seconds = time.monotonic() - epoch_started
            rate = (trainer.step - first) * config.batch_size / seconds
            row = _epoch_row(trainer) | {"images_per_second": round(rate, 1)}
            better = trainer.judge(row)
            row["seconds"] = round(time.monotonic() - epoch_started, 3)
            run.log("epoch", **row)
            for name in row.keys() - {"step", "epoch"}:
                events.add_scalar(f"epoch/{name}", row[name], trainer.step)
            progress.clear()
            run.say(_epoch_line(config, row))
            if better:
                run.save_model(trainer.evaluated.state_dict(), trainer.card)
            if trainer.finished or time.monotonic() - saved > SAVE_EVERY:
                run.save_state(trainer.state_dict())
                saved = time.monotonic()
            if received and not trainer.finished:
                _stop(trainer, run, received[0])
    best = f", epoch {trainer.best['epoch']} kept" if trainer.best else ""
    run.say(
        f"trained {trainer.epoch} epochs{best}, this time in "
        f"{duration(time.monotonic() - started)}: {run.path}"
    )


def _stop(trainer: Trainer, run: Run, signum: int) -> None:
    run.save_state(trainer.state_dict())
    raise Interrupted(
        signum,
        f"stopped at step {trainer.step}, checkpoint written; go on with: "
        f"fastiat train --resume --out {run.path}",
    )


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in the list instead of dying of the first; a second one kills."""
    received: list[int] = []

    def note(signum: int, _: Any) -> None:
        received.append(signum)
        signal.signal(signum, before[signum])

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
        f"{config.batch_size} an epoch; {trainer.device}, {trainer.arithmetic}"
    )


def _step_row(trainer: Trainer, update: Update) -> dict[str, Any]:
    batch, attacked = trainer.config.batch_size, trainer.config.adv != "none"
    row = {
        "step": trainer.step,
        "clean_loss": float(update.clean_loss),
        "adv_loss": float(update.adv_loss) if attacked else 0.0,
        "clean_accuracy_percent": 100 * float(update.clean_correct) / batch,
        "adv_accuracy_percent": 100 * float(update.adv_correct) / batch,
        "learning_rate": trainer.optimizer.param_groups[0]["lr"],
    }
    if not math.isfinite(row["clean_loss"] + row["adv_loss"]):
        raise InputError(
            f"the loss is not finite at step {trainer.step}: train again with a lower --lr"
        )
    return row


def _epoch_row(trainer: Trainer) -> dict[str, Any]:
    steps = len(trainer.loader)
    clean_loss, adv_loss, clean, adv = (trainer.totals / steps).tolist()
    batch = trainer.config.batch_size
    return {
        "step": trainer.step,
        "epoch": trainer.epoch,
        "learning_rate": trainer.optimizer.param_groups[0]["lr"],
        "clean_loss": clean_loss,
        "adv_loss": adv_loss,
        "clean_accuracy_percent": 100 * clean / batch,
        "adv_accuracy_percent": 100 * adv / batch,
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
