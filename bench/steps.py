"""Training steps to be timed: plain, PGD-AT and IAT on random images, under any engine."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

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
        mix_at=MIX_AT,
        **{**METHODS[method], **settings},
    )
    trainer = Trainer(config, random_images(16 * batch))
    updates = _forever(trainer)
    for _ in range(3 if engine == "graph" else 1):
        next(updates)
    return lambda: next(updates)


def flops(method: str, input_gradient: int, full: int, steps: int = 7) -> int:
    """Return the FLOP a step needs for each image, from what `timing.flops` counts."""
    return full if method == "plain" else 2 * full + steps * input_gradient


def _forever(trainer: Trainer) -> Iterator[object]:
    for _ in itertools.count():
        yield from trainer.epoch_updates()


def random_images(n: int) -> data.Dataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n, 32, 32, 3), dtype=torch.uint8, generator=generator)
    split = data.Split(images, torch.randint(10, (n,), generator=generator))
    return data.Dataset("random", tuple("0123456789"), split, split.take(torch.arange(10)), True)
