"""Training: a run from its settings to its last checkpoint, epoch by epoch.

The updates are in `fastiat.training.eager` (Algorithm 1 of the paper, written plainly) and, in
fixed buffers for the engines that compile, in `fastiat.training.step`. `Trainer`
(`fastiat.training.trainer`) holds the state of a training and makes one update after the other.
"""

import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from fastiat import data
from fastiat.config import TrainConfig
from fastiat.engine.device import own_defaults
from fastiat.runs.directory import Run, check_free, default_out
from fastiat.system.progress import Progress, duration
from fastiat.system.ranks import ranks
from fastiat.system.signals import SignalInterrupt, check_interrupts
from fastiat.training import rows
from fastiat.training.eager import algorithm1, joint_update, mixed_attack_update
from fastiat.training.session import Session, explaining_failures
from fastiat.training.trainer import Trainer

__all__ = ["Trainer", "algorithm1", "joint_update", "mixed_attack_update", "train"]


@own_defaults()
def train(
    config: TrainConfig, network: nn.Module | None = None, dataset: data.Dataset | None = None
) -> Path:
    """Train as `config` says and return the run directory.

    network: the network to train, in place; None builds the network that `config` names.
    dataset: the images; None loads those that `config` names.

    The ranks of a job (`fastiat.system.ranks`) train together, and the first rank writes the run
    directory. Raises `InputError`, before anything is written, if the settings or the data are
    wrong or if another process trains in that directory. Raises `InputError` later if the training
    diverges. Raises `TrainingInterrupt`, after a checkpoint is written, for SIGINT or SIGTERM, and
    `RankLostError` if another rank has ended.
    """
    config.check()
    path = Path(config.out) if config.out else default_out(config)
    run, trainer, job = None, None, ranks()
    if config.resume:
        run = Run.open(path, writes=job.first)
        run.check_same(config)
    elif job.first:
        check_free(path)
    try:
        if run is not None:
            run.lock()
        # config.json may come from an untrusted source: nothing is downloaded to a folder that only
        # config.json names.
        known = None if run is None else run.config.data_dir
        fetch = config.data_dir is None or config.data_dir != known
        if dataset is None:
            dataset = data.load(
                config.dataset,
                config.data_dir,
                loader=config.loader,
                fetch=fetch,
                image_size=config.image_size,
                context=config.augment == "resized-crop",
            )
        trainer = Trainer(config, dataset, network)
        if run is None:
            run = Run.create(path, config) if job.first else Run(path, config, writes=False)
        session = Session(trainer, run)
        with explaining_failures(run), session.signals:
            check_interrupts()
            if session.start():
                # Updates seed PyTorch's own generators, whose states are the caller's.
                with torch.random.fork_rng(
                    [trainer.device] if trainer.device.type == "cuda" else []
                ):
                    _loop(trainer, session)
            # A signal may have arrived after the last check. The reduction also keeps every rank
            # running until the first rank has written its files.
            session.stop_or_save()
    finally:
        if trainer is not None:
            trainer.points.remove()
        if run is not None:
            run.unlock()
    return path


def _loop(trainer: Trainer, session: Session) -> None:
    """Train and validate the remaining epochs, then write the last checkpoint."""
    config, run = trainer.config, session.run
    started = time.monotonic()
    run.log_line(rows.headline(trainer))
    total = config.epochs * len(trainer.loader) * config.batch_size
    with Progress("training", total, trainer.step * config.batch_size) as progress:
        while trainer.validated_epochs < trainer.epoch or not trainer.finished:
            # A resume may start between the last update of an epoch and its validation.
            if trainer.validated_epochs == trainer.epoch:
                _train_epoch(trainer, session, progress)
            _validate_epoch(trainer, session, progress)
        session.save()
    kept = f", epoch {trainer.best['epoch']} kept" if trainer.best else ""
    run.log_line(
        f"trained {trainer.epoch} epochs{kept}, this time in "
        f"{duration(time.monotonic() - started)}: {run.path}"
    )


def _train_epoch(trainer: Trainer, session: Session, progress: Progress) -> None:
    """Make the remaining updates of the current epoch; between updates, save or stop if due."""
    config = trainer.config
    begun, first = time.monotonic() - trainer.seconds, trainer.step + 1
    for update in trainer.epoch_updates():
        trainer.seconds = time.monotonic() - begun
        progress.advance(config.batch_size)
        session.check_skipped(progress)
        logged = trainer.step % rows.LOG_EVERY == 0
        # To read the figures the CPU waits for the device, so they are not read after every update.
        if logged or trainer.step == first:
            row = rows.step_row(trainer, update)
            if not trainer.skipped_in_a_row:
                session.check_growth(row, progress)
                progress.show(**rows.beside_progress(config, row))
            if logged:
                session.log("step", row)
        session.stop_or_save(save=True)
    session.check_finite()  # also waits for the device, so that the seconds are complete
    trainer.seconds = time.monotonic() - begun


def _validate_epoch(trainer: Trainer, session: Session, progress: Progress) -> None:
    """Validate the epoch that was just trained, log its row, and save its weights if best."""
    config, run = trainer.config, session.run
    row = rows.epoch_row(trainer)
    images = len(trainer.loader) * config.batch_size
    row["images_per_second"] = round(images / max(trainer.seconds, 1e-9), 1)
    best, begun = trainer.best, time.monotonic()
    try:
        # With several ranks, a signal must not end the validation of one rank: the others would
        # wait for its errors. It is handled after the validation instead.
        with session.signals.at_once() if trainer.ranks.alone else nullcontext():
            better = trainer.validate(row)
    except SignalInterrupt:
        trainer.best = best  # a resume validates this epoch again
        session.stop()
    row["seconds"] = round(trainer.seconds + time.monotonic() - begun, 3)
    trainer.validated_epochs, trainer.seconds = trainer.epoch, 0.0
    session.log("epoch", row)
    progress.clear()
    run.log_line(rows.epoch_line(config, row))
    if rows.overfitted(row):
        kept = trainer.best["epoch"] if trainer.best else trainer.epoch
        run.log_line(
            f"warning: catastrophic overfitting: PGD-10 misleads "
            f"{row['holdout_error_percent']:.1f} % of the held-out images and FGSM only "
            f"{row['holdout_fgsm_error_percent']:.1f} %; the weights of epoch {kept} are kept"
        )
    if better:
        run.save_model(trainer.eval_model.state_dict(), trainer.card)
    session.stop_or_save()
