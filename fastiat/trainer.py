"""One training's step and state: Algorithm 1 of the paper, the schedule and what they change."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastiat import data, kernels, models
from fastiat import mix as mixing
from fastiat.attack import BatchNormMode, count_errors, fgsm, pgd
from fastiat.config import TrainConfig
from fastiat.device import autocast, pick_device, pick_precision
from fastiat.errors import InputError
from fastiat.mix import Mix, mixed_correct, mixed_loss
from fastiat.run import ModelCard

EVAL_BATCH = 500
"""Images evaluated at a time after an epoch."""
Attack = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Update:
    """What one update saw, as tensors on the device, so that nobody waits for them."""

    clean_loss: Tensor
    adv_loss: Tensor
    """Zero where the update has no adversarial batch."""
    clean_correct: Tensor
    """How much of the clean batch was predicted right, in [0, B]; under mixing, by weight."""
    adv_correct: Tensor


def algorithm1(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    craft: Attack | None,
    draw: Callable[[], Mix | None],
    *,
    clean_weight: float = 0.5,
    loss: Any = "ce",
    shared_mix: bool = False,
    mix_pixels: bool = False,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Update:
    """Add the gradient of Algorithm 1's loss to the parameters of `model`.

        L = w Loss(f, Mix, x, y) + (1 - w) Loss(f, Mix, craft(x, y), y),  w = `clean_weight`

    The paper has w = 1/2. `x` is (B, C, H, W) pixels in [0, 1], `y` (B,) int64. `craft` attacks
    the un-mixed batch with its true labels; None leaves L = Loss(f, Mix, x, y). `draw` is called
    for each of the two losses, or once with `shared_mix`. `mix_pixels` moves mix point 0 before
    the standardisation. `precision` gives the context a forward pass runs in; losses are taken
    outside it. The attack and both losses see the same weights, so the halves are backpropagated
    as they come and only one half's activations are held at a time.
    """
    weight = clean_weight if craft else 1.0
    mix = draw()
    clean_loss, clean_correct = _backward(model, x, y, mix, weight, loss, mix_pixels, precision)
    if craft is None:
        return Update(clean_loss, clean_loss.new_zeros(()), clean_correct, clean_loss.new_zeros(()))
    with precision():
        x_adv = craft(x, y)
    mix = mix if shared_mix else draw()
    adv_loss, adv_correct = _backward(model, x_adv, y, mix, 1 - weight, loss, mix_pixels, precision)
    return Update(clean_loss, adv_loss, clean_correct, adv_correct)


def _backward(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    mix: Mix | None,
    weight: float,
    loss: Any,
    mix_pixels: bool,
    precision: Callable[[], AbstractContextManager[Any]],
) -> tuple[Tensor, Tensor]:
    inner = mix
    if mix is not None and mix.layer == 0 and mix_pixels:
        x, inner = kernels.mix(x, mix.perm, mix.lam), None
    with precision():
        logits = model(x, inner)
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    value = mixed_loss(logits, y, mix, loss)
    (weight * value).backward()
    return value.detach(), mixed_correct(logits.detach(), y, mix)


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of update `step`, counted from 0.

    "step": section 4.1's drops at epochs 100 and 150 of 200, in proportion. "cosine": linear up
    over the first tenth of the updates, then half a cosine down to zero.
    """
    total = config.epochs * steps_per_epoch
    if config.schedule == "step":
        drops = (2 * step >= total) + (4 * step >= 3 * total)
        return config.lr * 0.1**drops
    warm = total / 10
    if step < warm:
        return config.lr * (step + 1) / (warm + 1)
    return config.lr * (1 + math.cos(math.pi * (step - warm) / (total - warm))) / 2


class Trainer:
    """Everything that a training changes: network, optimizer, average, generators, position."""

    def __init__(self, config: TrainConfig, dataset: data.Dataset) -> None:
        self.config = config
        self.device = pick_device(config.device)
        self.arithmetic = pick_precision(config.precision, self.device)
        self.precision = partial(autocast, self.device, self.arithmetic)
        evaluation_loader = partial(
            data.ResidentLoader, batch_size=EVAL_BATCH, device=self.device, train=False
        )
        train, test, self.holdout = dataset.train, dataset.test, None
        kept_out = min(1000, len(train) // 10) if config.holdout is None else config.holdout
        if kept_out >= len(train):
            raise InputError(
                f"--holdout {kept_out} leaves none of the {len(train)} training images"
            )
        if kept_out:
            train, held_out = data.holdout(train, kept_out, config.seed)
            self.holdout = evaluation_loader(held_out)
        if config.eval_limit is not None and config.eval_limit < len(test):
            _, test = data.holdout(test, config.eval_limit, config.seed)
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
        cpu, device = torch.device("cpu"), self.device
        places = {"order": cpu, "augment": device, "mix": cpu, "attack": device}
        self.random = {
            purpose: torch.Generator(place).manual_seed(config.seed * 1000 + number)
            for number, (purpose, place) in enumerate(places.items())
        }
        self.loader = data.ResidentLoader(
            train,
            config.batch_size,
            device=self.device,
            train=True,
            pad=config.pad,
            flip=dataset.flip if config.flip is None else config.flip,
            order=self.random["order"],
            augment=self.random["augment"],
        )
        channels, size, _ = train.shape
        width = models.DEFAULT_WIDTH[config.arch] if config.width is None else config.width
        self.card = ModelCard(
            config.arch, width, len(dataset.classes), channels, size, dataset.classes
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = self.card.build()
        self.model = model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = copy.deepcopy(self.model).requires_grad_(False) if config.ema else None
        self.optimizer = torch.optim.SGD(
            _parameter_groups(self.model, config),
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
        )
        self.fingerprint = dataset.fingerprint()
        self.step = 0
        self.order_before_epoch = self.random["order"].get_state()
        # Sums over the epoch so far: the four figures of an `Update`.
        self.totals = torch.zeros(4, dtype=torch.float64, device=self.device)
        self.best: dict[str, int] | None = None

    @property
    def evaluated(self) -> nn.Module:
        """The network that is measured and saved: the average where there is one."""
        return self.model if self.average is None else self.average

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
        self.model.train()
        for images, y in self.loader.epoch(skip):
            yield self.update(images, y)

    def update(self, images: Tensor, y: Tensor) -> Update:
        """Make one update on a uint8 batch (B, C, H, W) with labels (B,)."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step, len(self.loader))
        self.optimizer.zero_grad()
        update = algorithm1(
            self.model,
            models.to_pixels(images),
            y,
            self.craft(self.model, self.random["attack"], config.bn),
            self._draw,
            clean_weight=config.clean_weight,
            loss=config.loss,
            shared_mix=config.shared_mix,
            mix_pixels=config.mix_space == "pixel",
            precision=self.precision,
        )
        self.optimizer.step()
        self.step += 1
        if self.average is not None:
            _average(self.average, self.model, config.ema, self.step)
        self.totals += torch.stack(
            [update.clean_loss, update.adv_loss, update.clean_correct, update.adv_correct]
        )
        return update

    def craft(
        self, model: nn.Module, generator: torch.Generator, bn: BatchNormMode = "eval"
    ) -> Attack | None:
        """Return the training's attack on `model`, or None where it has none."""
        config = self.config
        if config.adv == "none":
            return None
        if config.adv == "fgsm":
            return partial(fgsm, model, eps=config.eps, loss=config.attack_loss, bn=bn)
        return partial(
            pgd,
            model,
            eps=config.eps,
            alpha=config.alpha,
            steps=config.steps,
            random_start=config.random_start,
            loss=config.attack_loss,
            bn=bn,
            generator=generator,
        )

    def _draw(self) -> Mix | None:
        config = self.config
        return mixing.draw(
            config.mix,
            config.batch_size,
            config.mix_alpha,
            self.random["mix"],
            self.device,
            layers=config.mix_layers,
            per_sample=config.lam_per_sample,
        )

    def judge(self, row: dict[str, Any]) -> bool:
        """Measure test and held-out errors into `row`; say whether these weights are to be kept.

        Held-out images are attacked from the same random points after every epoch, so that epochs
        compare; without any, every epoch's weights are kept.
        """
        row["test_error_percent"] = 100 * self._errors(self.test, None) / self.test_size
        if self.holdout is None:
            return True
        generator = torch.Generator(self.device).manual_seed(self.config.seed)
        attack = self.craft(self.evaluated, generator)
        errors = self._errors(self.holdout, attack)
        row["holdout_error_percent"] = 100 * errors / len(self.holdout.labels)
        if self.best is not None and errors >= self.best["errors"]:
            return False
        self.best = {"epoch": self.epoch, "errors": errors}
        return True

    def _errors(self, batches: data.ResidentLoader, attack: Attack | None) -> int:
        def craft(x: Tensor, y: Tensor) -> Tensor:
            with self.precision():
                return x if attack is None else attack(x, y)

        return count_errors(self.evaluated, batches, craft)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resume needs, in types that load without running code."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": {name: generator.get_state() for name, generator in self.random.items()},
            "order_before_epoch": self.order_before_epoch,
            "totals": self.totals,
            "best": self.best,
            "data": self.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned; raise `InputError` if it is another training's."""
        if state.get("data") != self.fingerprint:
            raise InputError("the data set is not the one that this run was started with")
        try:
            self.model.load_state_dict(state["model"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            for name, generator in self.random.items():
                generator.set_state(state["random"][name])
            self.order_before_epoch = state["order_before_epoch"]
            self.totals.copy_(state["totals"])
            self.step, self.best = state["step"], state["best"]
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"the checkpoint is not of this network ({reason[:100]})") from None


def _parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Split off BatchNorm parameters and biases where they are not to decay."""
    named = list(model.named_parameters())
    if config.decay_norm:
        return [{"params": [p for _, p in named], "weight_decay": config.weight_decay}]
    return [
        {"params": [p for _, p in named if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for _, p in named if p.dim() <= 1], "weight_decay": 0.0},
    ]


@torch.no_grad()
def _average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move the average towards the model, buffers too; early steps count more, so that the start
    is soon forgotten.
    """
    decay = min(decay, (1 + step) / (10 + step))
    new, old = model.state_dict(), average.state_dict()
    for name, value in old.items():
        if value.is_floating_point():
            value.lerp_(new[name], 1 - decay)
        else:
            value.copy_(new[name])
