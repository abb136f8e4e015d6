"""Training: the loop around Algorithm 1, what it shows and writes, and how it stops."""

import copy
import math
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from fastiat import data, models
from fastiat import mix as mixing
from fastiat.attack import PGD, BatchNormMode, count_errors, draw_seed, pgd
from fastiat.config import TrainConfig
from fastiat.engine.device import autocast, own_defaults, pick_device, pick_precision
from fastiat.engine.graphs import Engine, pick_engine, prepare
from fastiat.images import convert
from fastiat.mix import Mix, chance_loss
from fastiat.models import ModelCard
from fastiat.runs.directory import (
    METRICS,
    MODEL,
    PREVIOUS,
    STATE,
    Run,
    check_free,
    default_out,
)
from fastiat.system.errors import (
    InputError,
    check_interrupts,
    explain_os,
    one_line,
    out_of_memory,
)
from fastiat.system.progress import Events, Progress, duration
from fastiat.system.ranks import ranks
from fastiat.system.signals import Now, Signals
from fastiat.training.checkpoint import Position, checked_position
from fastiat.training.optimise import learning_rate, make_sgd, move_average
from fastiat.training.step import Attack, Step, Update, algorithm1, running_statistics

EVAL_BATCH = 500
"""Images evaluated at a time after an epoch, where an update takes as many."""


class Trainer:
    """Everything that a training changes: network, optimizer, average, generators, position.

    The ranks of a training (`fastiat.system.ranks`) each take their part of every batch. Gradients,
    running statistics and figures are averaged before the optimizer's step, so that after it all of
    them hold the same bits, checkpoint included. Running variances are means of the parts' own.
    """

    def __init__(self, config: TrainConfig, dataset: data.Dataset) -> None:
        self.config = config
        self.ranks = ranks()
        shard = data.Shard(self.ranks.rank, self.ranks.count)
        self.device = pick_device(config.device)
        self.engine = pick_engine(config.engine, self.device)
        self.arithmetic = pick_precision(config.precision, self.device)
        prepare(self.device, config.deterministic)
        self.precision = partial(autocast, self.device, self.arithmetic)
        kind, self.loader_reason = data.choose_loader(config.loader, dataset, self.device)
        # The memory that is free may differ; one that takes the file has all take it.
        if self.ranks.all_reduce_max(kind == "ffcv")[0]:
            kind = "ffcv"
        if kind == "ffcv" and not dataset.stored:
            with self.ranks.local_rank_first():
                dataset = convert.cached_dataset(dataset)
        evaluation_loader = partial(
            data.make_loader,
            # An update must fit into the memory anyway.
            batch_size=max(min(EVAL_BATCH, config.batch_size // shard.ranks), 1),
            kind=kind,
            device=self.device,
            train=False,
            shard=shard,
        )
        train = data.limited(dataset.train, config.train_limit, config.class_limit, config.seed)
        test, self.holdout = dataset.test, None
        kept_out = min(1000, len(train) // 10) if config.holdout is None else config.holdout
        if kept_out >= len(train):
            raise InputError(
                f"--holdout {kept_out} leaves none of the {len(train)} training images"
            )
        if kept_out:
            train, held_out = data.holdout(train, kept_out, config.seed)
            self.holdout = evaluation_loader(held_out)
        if config.eval_limit is not None and config.eval_limit < len(test):
            test = data.draw(test, config.eval_limit, config.seed)
        self.test, self.test_size = evaluation_loader(test), len(test)
        if config.pad >= min(train.shape[1:]):
            raise InputError(
                f"--pad {config.pad} can shift images of {train.shape[1]} pixels out of sight: "
                f"give less"
            )
        if config.batch_size > len(train):
            raise InputError(
                f"--batch-size {config.batch_size} is more than the {len(train)} training images"
            )
        if config.batch_size % shard.ranks:
            raise InputError(
                f"--batch-size {config.batch_size} cannot be shared equally by {shard.ranks} "
                f"processes: give a multiple of {shard.ranks}, or start another number of them"
            )
        self.batch = config.batch_size // shard.ranks
        cpu, device = torch.device("cpu"), self.device
        places = {"order": cpu, "augment": device, "mix": cpu, "attack": device}
        self.random = {
            purpose: torch.Generator(place).manual_seed(config.seed * 1000 + number)
            for number, (purpose, place) in enumerate(places.items())
        }
        # What a rank draws on its own is seeded anew for every update, so that no checkpoint needs
        # to keep it.
        self.own = self.random
        if not self.ranks.alone:
            self.own = {name: torch.Generator(places[name]) for name in ("mix", "attack")}
        self.loader = data.make_loader(
            train,
            config.batch_size,
            kind=kind,
            device=self.device,
            train=True,
            pad=config.pad,
            flip=dataset.flip if config.flip is None else config.flip,
            order=self.random["order"],
            augment=self.random["augment"],
            shard=shard,
        )
        self.train_shape = channels, size, _ = train.shape
        width = models.DEFAULT_WIDTH[config.arch] if config.width is None else config.width
        self.card = ModelCard(
            config.arch,
            width,
            len(dataset.classes),
            channels,
            size,
            dataset.classes,
            config.variant,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = self.card.build()
        self.model = model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.batch == 1:
            _check_single(self.model, (channels, size, size), config.batch_size)
        self.average = copy.deepcopy(self.model).requires_grad_(False) if config.ema else None
        self.lr_tensor = torch.tensor(config.lr, device=self.device)
        self.optimizer = make_sgd(self.model, config, self.lr_tensor)
        self.fingerprint = dataset.fingerprint()
        self.step = 0
        self.order_before_epoch = self.random["order"].get_state()
        # Sums over the epoch so far: the four figures of an `Update`.
        self.totals = torch.zeros(4, dtype=torch.float64, device=self.device)
        self.best: dict[str, int] | None = None
        # Epochs that are measured, and what the updates of the one under way have taken so far.
        self.validated_epochs, self.seconds = 0, 0.0
        # Updates left out: of the epoch so far, and without one between that was made.
        self.skipped = self.skipped_in_a_row = 0

    @property
    def eval_model(self) -> nn.Module:
        """The network that is measured and saved: the average where there is one."""
        return self.model if self.average is None else self.average

    @property
    def lr(self) -> float:
        """Learning rate of the last update."""
        return learning_rate(self.config, max(self.step - 1, 0), len(self.loader))

    @property
    def epoch(self) -> int:
        """Finished epochs."""
        return self.step // len(self.loader)

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or the held-out error has stopped falling."""
        patience, best = self.config.patience, self.best
        stale = bool(patience and best and self.epoch - best["epoch"] >= patience)
        return stale or self.epoch >= self.config.epochs

    def epoch_updates(self) -> Iterator[Update]:
        """Run the rest of the current epoch, yielding the figures of each update."""
        skip = self.step % len(self.loader)
        if skip:
            self.random["order"].set_state(self.order_before_epoch)
        else:
            self.order_before_epoch = self.random["order"].get_state()
            self.totals.zero_()
            self.skipped = 0
        self.model.train()
        for images, y in self.loader.epoch(skip):
            yield self.update(images, y)

    def update(self, images: Tensor, y: Tensor) -> Update:
        """Make one update on a uint8 batch (B, C, H, W) with labels (B,), or this rank's part.

        The figures that it returns are the whole batch's.
        """
        config = self.config
        self.lr_tensor.fill_(learning_rate(config, self.step, len(self.loader)))
        self._seed_own()
        skipping = config.on_nan == "skip"
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers() if skipping]
        if self.engine == "eager":
            self.optimizer.zero_grad()
            update = algorithm1(
                self.model,
                models.to_pixels(images),
                y,
                self.attack,
                partial(self._draw, self.device),
                clean_weight=config.clean_weight,
                loss=config.loss,
                shared_mix=config.shared_mix,
                mix_pixels=config.mix_space == "pixel",
                precision=self.precision,
            )
            update = self._averaged(update)
            if not skipping or self._sound(update):
                self.optimizer.step()
        else:
            # The step copies the draws into its buffers, so they may stay on the CPU.
            cpu = torch.device("cpu")
            mix = self._draw(cpu)
            other = mix if config.shared_mix or self.attack is None else self._draw(cpu)
            update = self.fast_step(images, y, (mix, other))
        self.step += 1
        if self.skipped_in_a_row:
            for buffer, before in buffers:
                buffer.copy_(before)
            return update
        if self.average is not None:
            move_average(self.average, self.model, config.ema, self.step)
        self.totals += torch.stack(update.figures)
        return update

    def _seed_own(self) -> None:
        """Give the rank the draws of one update, from what all ranks draw alike and its number."""
        if self.ranks.alone:
            return
        common = int(torch.randint(2**63 - 1, (), generator=self.random["mix"]))
        seeds = np.random.SeedSequence((common, self.ranks.rank)).generate_state(2, np.uint64)
        for generator, seed in zip(self.own.values(), seeds.tolist(), strict=True):
            generator.manual_seed(seed % 2**63)

    def _averaged(self, update: Update) -> Update:
        """Average gradients, running statistics and figures over the ranks."""
        figures = torch.stack(update.figures)
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.ranks.all_reduce_mean_([*grads, *running_statistics(self.model), figures])
        return Update.of(figures, self.ranks.count)

    def _sound(self, update: Update) -> bool:
        """Whether an update's losses and gradients are finite; count it as skipped if not."""
        figures = [update.clean_loss, update.adv_loss]
        figures += [p.grad for p in self.model.parameters() if p.grad is not None]
        sound = bool(torch.stack([figure.isfinite().all() for figure in figures]).all())
        self.skipped += not sound
        self.skipped_in_a_row = 0 if sound else self.skipped_in_a_row + 1
        return sound

    @cached_property
    def attack(self) -> Attack | None:
        """The training's attack on the network, or None where it has none."""
        settings = self.attack_settings(self.config.bn, self.own["attack"])
        return None if settings is None else partial(pgd, self.model, **settings)

    @cached_property
    def fast_step(self) -> Step:
        """The update in fixed buffers, for the engines that compile."""
        config = self.config
        return Step(
            self.model,
            self.optimizer,
            torch.Size((self.batch, *self.train_shape)),
            self.attack_settings(config.bn, self.own["attack"]),
            dtype=torch.bfloat16 if self.arithmetic == "bf16" else None,
            compiled=True,
            captured=self.engine == "graph",
            clean_weight=config.clean_weight,
            loss=config.loss,
            mix_pixels=config.mix_space == "pixel",
            per_sample=config.lam_per_sample,
            average=self.ranks.all_reduce_mean_,
            ranks=self.ranks.count,
            accept=self._sound if config.on_nan == "skip" else None,
        )

    @cached_property
    def validation_attack(self) -> PGD | None:
        """The training's attack on the network that is measured, with a generator of its own."""
        settings = self.attack_settings("eval", torch.Generator(self.device))
        if settings is None:
            return None
        # Compiling for another batch size takes longer than it saves where it is not captured.
        engine: Engine = "graph" if self.engine == "graph" else "eager"
        return PGD(self.eval_model, engine=engine, precision=self.arithmetic, **settings)

    def attack_settings(
        self, bn: BatchNormMode, generator: torch.Generator
    ) -> dict[str, Any] | None:
        """Return the keyword arguments of `pgd` that make the training's attack, or None."""
        config = self.config
        if config.adv == "none":
            return None
        given: dict[str, Any] = {
            "eps": config.eps,
            "alpha": config.alpha,
            "steps": config.steps,
            "random_start": config.random_start,
        }
        if config.adv == "fgsm":
            given |= {"alpha": config.eps, "steps": 1, "random_start": False}
        given |= {"loss": config.attack_loss, "bn": bn, "generator": generator}
        return (pgd.__kwdefaults__ or {}) | given

    def _draw(self, device: torch.device) -> Mix | None:
        config = self.config
        return mixing.draw(
            config.mix,
            self.batch,
            config.mix_alpha,
            self.own["mix"],
            device,
            layers=config.mix_layers,
            per_sample=config.lam_per_sample,
        )

    def validate(self, row: dict[str, Any]) -> bool:
        """Measure test and held-out errors into `row`; say whether these weights are to be kept.

        Held-out images are attacked from the same random points after every epoch, so that epochs
        compare; without any, every epoch's weights are kept.
        """
        row["test_error_percent"] = 100 * self._errors(self.test, None) / self.test_size
        if self.holdout is None:
            return True
        attack = self.validation_attack
        if attack is not None:
            attack.settings["generator"].manual_seed(self.config.seed)
        errors = self._errors(self.holdout, attack)
        row["holdout_error_percent"] = 100 * errors / len(self.holdout.labels)
        if self.best is not None and errors >= self.best["errors"]:
            return False
        self.best = {"epoch": self.epoch, "errors": errors}
        return True

    def _errors(self, batches: data.Loader, attack: PGD | None) -> int:
        """Count over all ranks; a batch is attacked from the same points whoever has it."""
        gaps = batches.shard.gaps()

        def craft(x: Tensor, y: Tensor) -> Tensor:
            assert attack is not None
            for _ in range(next(gaps) if attack.settings["random_start"] else 0):
                draw_seed(x, attack.settings["generator"])
            return attack(x, y)

        errors = count_errors(self.eval_model, batches, None if attack is None else craft)
        return int(self.ranks.all_reduce_sum_(torch.tensor(errors)))

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resume needs: tensors by name, and the fields of `Position`."""
        momentum = {
            name: self.optimizer.state[parameter]["momentum_buffer"]
            for name, parameter in self.model.named_parameters()
            if self.config.momentum
        }
        position = Position(
            step=self.step,
            ranks=self.ranks.count,
            data=self.fingerprint,
            best=self.best,
            validated_epochs=self.validated_epochs,
            seconds=self.seconds,
            skipped=self.skipped,
            skipped_in_a_row=self.skipped_in_a_row,
        )
        return {
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "momentum": momentum,
            "random": {name: generator.get_state() for name, generator in self.random.items()},
            "order_before_epoch": self.order_before_epoch,
            "totals": self.totals,
            **asdict(position),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned, in full or not at all.

        Raises `InputError` for a state of other data, and `Damaged` for one that does not fit.
        """
        own = self.state_dict()
        position = checked_position(
            state,
            own,
            epochs=self.config.epochs,
            steps_per_epoch=len(self.loader),
            generators=self.random,
        )
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        for name, buffer in own["momentum"].items():
            buffer.copy_(state["momentum"][name])
        for name, generator in self.random.items():
            generator.set_state(state["random"][name])
        self.order_before_epoch = state["order_before_epoch"]
        self.totals.copy_(state["totals"])
        # A captured update holds the generators as they were when it was captured.
        self.__dict__.pop("fast_step", None)
        self.step, self.best = position.step, position.best
        self.validated_epochs, self.seconds = position.validated_epochs, position.seconds
        self.skipped = position.skipped
        # With --on-nan stop no update is skipped, whatever the checkpoint counted with "skip".
        in_a_row = position.skipped_in_a_row
        self.skipped_in_a_row = in_a_row if self.config.on_nan == "skip" else 0


def _check_single(model: nn.Module, shape: tuple[int, ...], batch_size: int) -> None:
    """Raise `InputError` for a network whose BatchNorm cannot normalise a batch of one image."""
    probe = copy.deepcopy(model).to("meta").train()  # it computes shapes alone
    try:
        probe(torch.empty((1, *shape), device="meta"))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise InputError(
            f"--batch-size {batch_size} is one image a process, and BatchNorm has one value a "
            f"channel to normalise with at {shape[-1]}x{shape[-1]} pixels: give each process two "
            "images or more, or larger images"
        ) from None


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
    if config.resume:
        run = Run.open(path, writes=job.first)
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
            run = Run.create(path, config) if job.first else Run(path, config, writes=False)
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
        groups = [state["model"], state["average"] or {}, state["momentum"]]
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
