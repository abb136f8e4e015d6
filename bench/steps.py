"""Training steps to be timed: plain, PGD-AT and IAT on random images, under any engine."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from timing import DEVICE

from fastiat import data
from fastiat.config import TrainConfig
from fastiat.train import Trainer

METHODS = {
    "plain": {"adv": "none", "mix": "none"},
    "PGD-AT": {"adv": "pgd", "mix": "none"},
    "IAT": {"adv": "pgd", "mix": "manifold"},
}
LATER_METHODS = {
    "TRADES": {"objective": "trades", "mix": "none"},
    "TRADES + manifold": {"objective": "trades", "mix": "manifold"},
    "MART": {"objective": "mart", "mix": "none"},
    "AT-AWP": {"awp": 0.01, "mix": "none"},
    "TRADES-AWP": {"objective": "trades", "awp": 0.005, "mix": "none"},
    "N-FGSM": {"adv": "n-fgsm", "mix": "none"},
    "CutMix": {"mix": "cutmix"},
    "mixed batch attacked": {"attack_mixed": True, "mix": "cutmix"},
}
"""Methods that are newer than the paper, see `fastiat train --help`."""


class Passes(NamedTuple):
    """The passes of one update."""

    training: int
    """Forward and backward passes with the gradients of the weights."""
    attack: int = 0
    """Forward and backward passes with the gradient of the pixels."""
    forward: int = 0
    """Forward passes alone."""


PASSES = {
    "plain": Passes(1),
    "PGD-AT": Passes(2, 7),
    "IAT": Passes(2, 7),
    # The attack of TRADES compares with the prediction for the image.
    "TRADES": Passes(2, 7, 1),
    "TRADES + manifold": Passes(2, 7, 1),
    "MART": Passes(2, 7),
    # The ascent step of AWP repeats the adversarial pass; with TRADES, both passes.
    "AT-AWP": Passes(3, 7),
    "TRADES-AWP": Passes(4, 7, 1),
    "N-FGSM": Passes(2, 1),
    "CutMix": Passes(2, 7),
    "mixed batch attacked": Passes(1, 7),
}
FLOOR = 20 / 3
"""Ratio of IAT's arithmetic to a plain step's: 20 forward passes' worth against 3."""
CIFAR10 = 50_000
"""Training images in an epoch of CIFAR-10."""
MIX_AT = ("1",)
"""Mix point of IAT in timings: only the slowest of the three, as each is compiled separately."""


def make(
    method: str, engine: str, arch: str, batch: int, *, width: int | None = None, **settings: Any
) -> Callable[[], object]:
    """Return a call that takes the loader's next batch and makes one update, compiled already.

    `settings` are further settings of `TrainConfig`.
    """
    config = TrainConfig(
        arch=arch,  # type: ignore[arg-type]
        width=width,
        batch_size=batch,
        engine=engine,  # type: ignore[arg-type]
        device=str(DEVICE),
        lr=1e-3,
        epochs=10**6,
        **{**_settings(method), **settings},
    )
    trainer = Trainer(config, random_images(16 * batch))
    updates = _forever(trainer)
    for _ in range(3 if engine == "graph" else 1):
        next(updates)
    return lambda: next(updates)


def _settings(method: str) -> dict[str, Any]:
    """Return the settings of a method; manifold mixup mixes at `MIX_AT` alone."""
    given = (METHODS | LATER_METHODS)[method]
    manifold = given.get("mix", "manifold") == "manifold"
    return {**given, "mix_at": MIX_AT} if manifold else {**given}


def flops(method: str, input_gradient: int, full: int) -> int:
    """Return the FLOP a step needs for each image, from what `timing.flops` counts."""
    passes = PASSES[method]
    # A forward pass is a third of a training pass: the two gradients cost as much each.
    return passes.training * full + passes.attack * input_gradient + passes.forward * full // 3


def _forever(trainer: Trainer) -> Iterator[object]:
    for _ in itertools.count():
        yield from trainer.epoch_updates()


def random_images(n: int) -> data.Dataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n, 32, 32, 3), dtype=torch.uint8, generator=generator)
    split = data.Split(images, torch.randint(10, (n,), generator=generator))
    return data.Dataset("random", tuple("0123456789"), split, split.take(torch.arange(10)), True)
