"""How long trainings and measurements would take on this machine, estimated from a few steps."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch

from fastiat import data
from fastiat.attack import pgd
from fastiat.config import TrainConfig
from fastiat.images.downloads import DOWNLOADS
from fastiat.models import to_pixels
from fastiat.system.settings import steps_of
from fastiat.train import Trainer

LONG_ENOUGH = 0.5
"""Seconds that a measurement must take to be trusted."""


@dataclass(frozen=True)
class Images:
    """The properties of a data set that durations depend on."""

    train: int
    """Training images."""
    test: int
    """Test images."""
    size: int
    """Height and width of an image in pixels."""
    channels: int
    classes: int

    def noise(self, n: int) -> data.Dataset:
        """Return a data set of this kind, two splits of `n` images of noise."""
        generator = torch.Generator().manual_seed(0)
        shape = (n, self.size, self.size, self.channels)
        images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        labels = torch.arange(n) % self.classes
        split = data.Split(images, labels)
        names = tuple(map(str, range(self.classes)))
        return data.Dataset("noise", names, split, split, flip=True)


def images_of(name: str, data_dir: str | None) -> Images:
    """Return the sizes of a data set. Only "digits", "folder" and .beton files are read for it.

    Raises `InputError` as `fastiat.data.load` does.
    """
    if known := DOWNLOADS.get(name):  # so that a dry run downloads nothing
        return Images(known.train, known.test, known.side, known.channels, known.classes)
    dataset = data.load(name, data_dir)
    channels, size, _ = dataset.train.shape
    return Images(len(dataset.train), len(dataset.test), size, channels, len(dataset.classes))


@dataclass(frozen=True)
class Speed:
    """Seconds that one image takes in a kind of training."""

    update: float
    """In an update: the clean pass, the attack, the adversarial pass."""
    forward: float
    """In a forward pass that classifies it."""
    step: float
    """In a PGD step of a measurement."""

    def training(self, config: TrainConfig, images: Images, done: int) -> float:
        """Return the seconds of the updates after the first `done`, with the validation between."""
        per_epoch = images.train // config.batch_size
        tested = min(images.test, config.eval_limit or images.test)
        updates = max(config.epochs * per_epoch - done, 0)
        tests = config.epochs - done // per_epoch
        return updates * config.batch_size * self.update + tests * tested * self.forward

    def measuring(self, measurements: Iterable[tuple[str, int]]) -> float:
        """Return the seconds of measurements, each an attack and a number of images."""
        return sum(n * (self.forward + steps_of(attack) * self.step) for attack, n in measurements)


def speed(config: TrainConfig, images: Images) -> Speed:
    """Time a kind of training on a batch, or on a part of it that takes `LONG_ENOUGH`."""
    n, update = min(4, config.batch_size), 0.0
    while True:
        trainer = Trainer(replace(config, batch_size=n, holdout=0), images.noise(n))
        ((pixels, y),) = trainer.loader
        update = _seconds(partial(trainer.update, pixels, y), trainer.device)
        if update > LONG_ENOUGH or n == config.batch_size:
            break
        n = min(4 * n, config.batch_size)
    model, x = trainer.model.eval(), to_pixels(pixels)

    def validate() -> None:
        with torch.no_grad(), trainer.precision():
            model(x)

    def two_steps() -> None:
        with trainer.precision():
            pgd(model, x, y, eps=config.eps, alpha=config.alpha, steps=2)

    forward, steps = _seconds(validate, trainer.device), _seconds(two_steps, trainer.device)
    return Speed(update / n, forward / n, steps / 2 / n)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the mean seconds of up to three calls, after a first one that warms up."""
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started, calls = time.monotonic(), 0
    while calls < 3 and time.monotonic() - started < LONG_ENOUGH:
        call()
        calls += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return (time.monotonic() - started) / calls
