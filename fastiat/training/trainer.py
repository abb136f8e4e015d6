"""The state of a training: network, optimizer, average, random generators and position."""

import copy
from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastiat import data, models
from fastiat import mix as mixing
from fastiat.attack import PGD, BatchNormMode, attack_defaults, count_errors, pgd
from fastiat.attacks.starts import draw_seed
from fastiat.config import TrainConfig
from fastiat.engine.device import autocast, pick_device, pick_precision, to_device
from fastiat.engine.graphs import Engine, pick_engine, prepare
from fastiat.mix import Mix, MixPoints
from fastiat.networks.check import check_batch_of_one, check_network
from fastiat.networks.sources import put_tensors
from fastiat.runs.directory import load_initial
from fastiat.system.ranks import ranks
from fastiat.system.settings import is_own_arch
from fastiat.training import rows
from fastiat.training.awp import WeightPerturbation
from fastiat.training.checkpoint import Position, checked_position
from fastiat.training.eager import Attack, algorithm1, joint_update, mixed_attack_update
from fastiat.training.optimise import learning_rate, make_sgd, move_average
from fastiat.training.step import Method, Step
from fastiat.training.update import Update


class Trainer:
    """The state of a training: network, optimizer, average, generators, position.

    Each rank of a training (`fastiat.system.ranks`) computes its part of every batch. Gradients,
    running statistics and figures are averaged over the ranks before the optimizer's step. So all
    ranks hold the same bits after the step, and a checkpoint of one rank is valid for all. A
    running variance is the mean of the variances of the parts, not the variance of the batch.

    network: the network to train, in place; None builds the network that `config` names.

    Raises `InputError` for settings that the device, the data or the number of ranks do not allow.
    """

    def __init__(
        self, config: TrainConfig, dataset: data.Dataset, network: nn.Module | None = None
    ) -> None:
        self.config, self.ranks = config, ranks()
        self.device = pick_device(config.device)
        self.engine = pick_engine(config.engine, self.device)
        self.arithmetic = pick_precision(config.precision, self.device)
        self.precision = partial(autocast, self.device, self.arithmetic)
        prepare(self.device, config.deterministic)
        self._make_generators()
        self.loader, self.test, self.holdout, self.fingerprint = data.open_loaders(
            config,
            dataset,
            self.device,
            order=self.random["order"],
            augment=self.random["augment"],
        )
        self.batch_shape = (config.batch_size // self.ranks.count, *dataset.test.shape)
        """Shape (B, C, H, W) of this rank's part of a batch."""
        self._make_network(dataset, network)
        self.lr_tensor = torch.tensor(config.lr, device=self.device)
        self.optimizer = make_sgd(self.model, config, self.lr_tensor)
        self.step = 0
        """Updates so far, including skipped updates."""
        self.order_before_epoch = self.random["order"].get_state()
        self.totals = torch.zeros(4, dtype=torch.float64, device=self.device)
        """Sums of the figures of the updates of this epoch so far, without skipped updates."""
        self.best: dict[str, int] | None = None
        """"epoch" and "errors" of the epoch with the fewest held-out errors; see `validate`."""
        self.validated_epochs = 0
        """Number of epochs whose validation has finished."""
        self.seconds = 0.0
        """Seconds that the updates of the current epoch have taken."""
        self.skipped = self.skipped_in_a_row = 0
        """Updates skipped in this epoch; updates skipped consecutively, up to the last update."""

    def _make_generators(self) -> None:
        """Make a generator for each purpose, so that no draw depends on the other purposes."""
        cpu, device = torch.device("cpu"), self.device
        places = {"order": cpu, "augment": device, "mix": cpu, "attack": device}
        self.random = {
            purpose: torch.Generator(place).manual_seed(self.config.seed * 1000 + number)
            for number, (purpose, place) in enumerate(places.items())
        }
        # Each rank mixes and attacks its own part of the batch, with generators of its own. These
        # are seeded anew for every update (see `_seed_rank`), so a checkpoint need not hold the
        # generators of every rank.
        self.rank_random = self.random
        if not self.ranks.alone:
            self.rank_random = {name: torch.Generator(places[name]) for name in ("mix", "attack")}

    def _make_network(self, dataset: data.Dataset, network: nn.Module | None) -> None:
        config = self.config
        self.card = card = models.card_of(config, dataset.classes, dataset.test.shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            if network is not None:
                network = card.behind_normalisation(network)
            elif is_own_arch(config.arch):
                network = card.own(config.arch)
            else:
                network = card.build(pretrained=config.pretrained and not config.resume)
        self.model = to_device(network, self.device)
        names = mixing.point_names(self.model, config.mix, config.mix_at)
        if config.arch not in models.ARCHS or config.mix_at:
            shape, chosen = dataset.test.shape, config.mix_at is not None
            check_network(self.model, shape, len(dataset.classes), names, chosen=chosen)
        if config.init and not config.resume:
            left = load_initial(self.model, config.init)
            if left and self.ranks.first:
                print(
                    f"--init: {' and '.join(left)} keep their initial values: the file has them "
                    f"for another number of classes"
                )
        if self.batch_shape[0] == 1:
            check_batch_of_one(self.model, self.batch_shape, config.batch_size)
        self.average = copy.deepcopy(self.model).requires_grad_(False) if config.ema else None
        # After the copy, whose passes are never mixed.
        self.points = MixPoints(self.model, names, pixels=config.mix_space == "pixel")

    @property
    def eval_model(self) -> nn.Module:
        """The network that is measured and saved: the average with --ema, else the model."""
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
        """Whether all epochs are done, or `patience` epochs have passed since the best one."""
        patience, best = self.config.patience, self.best
        stale = bool(patience and best and self.epoch - best["epoch"] >= patience)
        return stale or self.epoch >= self.config.epochs

    def epoch_updates(self) -> Iterator[Update]:
        """Run the rest of the current epoch, yielding the figures of each update."""
        skip = self.step % len(self.loader)
        if skip:
            # Draw the permutation of this epoch again, without its first `skip` batches.
            self.random["order"].set_state(self.order_before_epoch)
        else:
            self.order_before_epoch = self.random["order"].get_state()
            self.totals.zero_()
            self.skipped = 0
        self.model.train()
        for images, y in self.loader.epoch(skip, self.epoch):
            yield self.update(images, y)

    def update(self, images: Tensor, y: Tensor) -> Update:
        """Make one update on this rank's part of a batch: uint8 (B, C, H, W), labels (B,) int64.

        Returns the figures of the whole batch.
        """
        config = self.config
        self.lr_tensor.fill_(learning_rate(config, self.step, len(self.loader)))
        self._seed_network()
        self._seed_rank()
        # A pass changes the running statistics before the loss is known to be finite, so keep
        # copies, which a skipped update restores.
        skipping = config.on_nan == "skip"
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers() if skipping]
        perturbs = config.awp > 0 and self.epoch >= config.awp_warmup
        if self.engine == "eager":
            self.optimizer.zero_grad()
            update = self._all_reduce_mean(self._eager_update(images, y, perturbs))
            if self._accept(update):
                self.optimizer.step()
        else:
            # `Step` copies the draws into its buffers on the device, so draw on the CPU.
            cpu = torch.device("cpu")
            mix = self._draw(cpu)
            once = config.shared_mix or self.attack is None or self.method != "at"
            update = self.fast_step(images, y, (mix, mix if once else self._draw(cpu)), perturbs)
        self.step += 1
        if self.skipped_in_a_row:
            for buffer, before in buffers:
                buffer.copy_(before)
            return update
        if self.average is not None:
            move_average(self.average, self.model, config.ema, self.step)
        self.totals += torch.stack(update)
        return update

    @property
    def method(self) -> Method:
        """The form of an update: the objective, or "mixed" with --attack-mixed."""
        return "mixed" if self.config.attack_mixed else self.config.objective

    def _eager_update(self, images: Tensor, y: Tensor, perturbs: bool) -> Update:
        """Compute the gradients of one update; `perturbs` is whether AWP perturbs the weights."""
        config, x = self.config, models.to_pixels(images)
        awp = WeightPerturbation(config.awp, self.ranks.all_reduce_mean_) if perturbs else None
        draw = partial(self._draw, self.device)
        common: dict[str, Any] = {
            "loss": config.loss,
            "smoothing": config.smoothing,
            "awp": awp,
            "precision": self.precision,
        }
        if self.method == "at":
            return algorithm1(
                self.model,
                x,
                y,
                self.attack,
                draw,
                self.points,
                clean_weight=config.clean_weight,
                shared_mix=config.shared_mix,
                **common,
            )
        assert self.attack is not None
        if self.method == "mixed":
            classes = len(self.card.classes)
            return mixed_attack_update(
                self.model, x, y, self.attack, draw, classes=classes, **common
            )
        return joint_update(
            self.model,
            x,
            y,
            self.attack,
            draw,
            self.points,
            objective=config.objective,
            beta=config.beta,
            **common,
        )

    def _seed_network(self) -> None:
        """Seed PyTorch's own generators, which layers such as dropout use, for one update.

        So a checkpoint need not hold their states, and ranks drop different units.
        """
        words = (self.config.seed, self.step, self.ranks.rank)
        seed = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] % 2**63)
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                torch.cuda.manual_seed(seed)

    def _seed_rank(self) -> None:
        """Seed this rank's generators for one update."""
        if self.ranks.alone:
            return
        # All ranks draw the same `common`; the rank makes their seeds differ.
        common = int(torch.randint(2**63 - 1, (), generator=self.random["mix"]))
        seeds = np.random.SeedSequence((common, self.ranks.rank)).generate_state(2, np.uint64)
        for generator, seed in zip(self.rank_random.values(), seeds.tolist(), strict=True):
            generator.manual_seed(seed % 2**63)

    def _draw(self, device: torch.device) -> Mix | None:
        config = self.config
        return mixing.draw(
            config.mix,
            self.batch_shape[0],
            config.mix_alpha,
            self.rank_random["mix"],
            device,
            layers=tuple(range(len(self.points.names))),
            per_sample=config.lam_per_sample,
            size=(self.batch_shape[2], self.batch_shape[3]),
        )

    def _all_reduce_mean(self, update: Update) -> Update:
        """Average gradients and running statistics over the ranks, in place.

        `update` has the figures of this rank's part; returns those of the whole batch.
        """
        figures = torch.stack(update)
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.ranks.all_reduce_mean_([*grads, *models.running_statistics(self.model), figures])
        return Update.of_means(figures, self.ranks.count)

    def _accept(self, update: Update) -> bool:
        """Return whether the optimizer may use the gradients; if not, count the update as skipped.

        Always true with --on-nan stop, because to check gradients the CPU waits for the device.
        """
        if self.config.on_nan == "stop":
            return True
        tensors = [update.clean_loss, update.adv_loss]
        tensors += [p.grad for p in self.model.parameters() if p.grad is not None]
        finite = bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        return finite

    @cached_property
    def attack(self) -> Attack | None:
        """The attack of Algorithm 1 for the eager engine; None with --adv none."""
        settings = self._attack_settings(self.config.bn, self.rank_random["attack"])
        return None if settings is None else partial(pgd, self.model, **settings)

    @cached_property
    def fast_step(self) -> Step:
        """The update in fixed buffers, for the engines that compile."""
        config = self.config
        return Step(
            self.model,
            self.optimizer,
            torch.Size(self.batch_shape),
            self._attack_settings(config.bn, self.rank_random["attack"]),
            self.points,
            dtype=torch.bfloat16 if self.arithmetic == "bf16" else None,
            compiled=True,
            captured=self.engine == "graph",
            clean_weight=config.clean_weight,
            loss=config.loss,
            smoothing=config.smoothing,
            method=self.method,
            beta=config.beta,
            gamma=config.awp,
            classes=len(self.card.classes),
            boxes=config.mix == "cutmix",
            per_sample=config.lam_per_sample,
            all_reduce_mean_=self.ranks.all_reduce_mean_,
            ranks=self.ranks.count,
            accept=self._accept,
        )

    @cached_property
    def validation_attacks(self) -> dict[str, PGD]:
        """The attacks on held-out images by the start of their names in a row of metrics.jsonl.

        They attack `eval_model`, with a generator of their own, and raise the training's
        `attack_loss` from a uniform start. "holdout" is the training's attack, for N-FGSM it is
        PGD-10; "holdout_fgsm", for N-FGSM only, is FGSM.
        """
        config, changes = self.config, {"holdout": dict[str, Any]()}
        settings = self._attack_settings("eval", torch.Generator(self.device))
        if settings is None:
            return {}
        if config.adv == "n-fgsm":
            settings |= {"eps": config.eps, "alpha": config.eps / 4, "steps": 10}
            fgsm = {"alpha": config.eps, "steps": 1, "random_start": False}
            changes["holdout_fgsm"] = fgsm
        settings |= {"start_noise": "uniform", "start_size": None}
        if settings["loss"] == "kl":  # the predictions shall be wrong, not only different
            settings["loss"] = "ce"
        # Without capture, compiling for the batch size of a validation takes longer than it saves.
        engine: Engine = "graph" if self.engine == "graph" else "eager"
        return {
            name: PGD(
                self.eval_model, engine=engine, precision=self.arithmetic, **settings | change
            )
            for name, change in changes.items()
        }

    def _attack_settings(
        self, bn: BatchNormMode, generator: torch.Generator
    ) -> dict[str, Any] | None:
        """Return all keyword arguments of `pgd` for the training's attack; None with --adv none."""
        config = self.config
        if config.adv == "none":
            return None
        settings = attack_defaults() | {
            "eps": config.eps,
            "alpha": config.alpha,
            "steps": config.steps,
            "random_start": config.random_start,
            "norm": config.norm,
            "loss": config.attack_loss,
            "bn": bn,
            "generator": generator,
        }
        if config.adv == "fgsm":  # one step of length eps from x itself
            settings |= {"alpha": config.eps, "steps": 1, "random_start": False}
        elif config.adv == "n-fgsm":
            # One step of length eps from a point in a ball of radius `noise` eps. No point that it
            # can reach lies outside of a ball of radius (`noise` + 1) eps.
            size = config.noise * config.eps
            settings |= {"eps": size + config.eps, "alpha": config.eps, "steps": 1}
            settings |= {"start_size": size or None, "random_start": size > 0}
        elif config.objective in ("trades", "mart"):
            settings |= {"start_noise": "normal", "start_size": 0.001}
        if config.objective == "trades":
            settings["loss"] = "kl"
        return settings

    def validate(self, row: dict[str, Any]) -> bool:
        """Write test and held-out errors, in percent, to `row`; return whether to save the weights.

        An attack on held-out images starts from the same random points after every epoch, so that
        the errors of epochs are comparable. With --holdout, weights are saved if the held-out error
        is lower than in all epochs before, else the weights of every epoch are saved. Weights that
        have overfitted to N-FGSM (`rows.overfitted`) are not saved.
        """
        row["test_error_percent"] = 100 * self._errors(self.test, None) / len(self.test.labels)
        if self.holdout is None:
            return True
        found = {}
        attacks: dict[str, PGD | None] = {"holdout": None, **self.validation_attacks}
        for name, attack in attacks.items():
            if attack is not None:
                attack.settings["generator"].manual_seed(self.config.seed)
            found[name] = self._errors(self.holdout, attack)
            row[f"{name}_error_percent"] = 100 * found[name] / len(self.holdout.labels)
        errors, lowest = found["holdout"], self.config.holdout != 0
        higher = self.best is not None and errors >= self.best["errors"]
        if self.best is not None and (rows.overfitted(row) or (lowest and higher)):
            return False
        self.best = {"epoch": self.epoch, "errors": errors}
        return True

    def _errors(self, batches: data.Loader, attack: PGD | None) -> int:
        """Return the number of errors over all ranks.

        The random starts do not depend on the number of ranks.
        """
        gaps = batches.shard.gaps()

        def attacked(x: Tensor, y: Tensor) -> Tensor:
            assert attack is not None
            # Each batch takes one seed: draw and discard the seeds of the batches of other ranks.
            for _ in range(next(gaps) if attack.settings["random_start"] else 0):
                draw_seed(x, attack.settings["generator"])
            return attack(x, y)

        errors = count_errors(self.eval_model, batches, None if attack is None else attacked)
        return int(self.ranks.all_reduce_sum_(torch.tensor(errors)))

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resume needs: tensors by name, and the fields of `Position`."""
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
        """Load a state that `state_dict` returned; nothing is changed if it does not fit.

        Raises `InputError` for a state of other data or another number of ranks, and `DamagedError`
        for a state that does not fit this training.
        """
        own = self.state_dict()
        position = checked_position(
            state,
            own,
            epochs=self.config.epochs,
            steps_per_epoch=len(self.loader),
            generators=self.random,
        )
        put_tensors(self.model, state["model"])
        if self.average is not None:
            put_tensors(self.average, state["average"])
        for name, buffer in own["momentum"].items():
            buffer.copy_(state["momentum"][name])
        for name, generator in self.random.items():
            generator.set_state(state["random"][name])
        self.order_before_epoch = state["order_before_epoch"]
        self.totals.copy_(state["totals"])
        # A captured step holds the state of the generators at its capture: the next update makes a
        # new step.
        self.__dict__.pop("fast_step", None)
        self.step, self.best = position.step, position.best
        self.validated_epochs, self.seconds = position.validated_epochs, position.seconds
        self.skipped = position.skipped
        # With --on-nan stop no update is skipped: drop a count from a run with --on-nan skip, which
        # `update` would take for a skip.
        in_a_row = position.skipped_in_a_row
        self.skipped_in_a_row = in_a_row if self.config.on_nan == "skip" else 0
