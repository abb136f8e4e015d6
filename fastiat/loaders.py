"""Batches: passes over a split, shuffled, randomly cropped and mirrored for training."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import chain, repeat
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastiat.data import Dataset, Split, StoredSplit
from fastiat.engine.device import free_memory
from fastiat.images.ffcv import installed, obstacle
from fastiat.kernels import crop_flip
from fastiat.system.errors import InputError

Kind = Literal["resident", "ffcv"]


class Shard(NamedTuple):
    """Which part of every pass is this process's: number `rank` of `ranks` equal ones."""

    rank: int
    ranks: int

    def gaps(self) -> Iterator[int]:
        """Yield, for each of its whole batches, how many of others come since its last."""
        return chain((self.rank,), repeat(self.ranks - 1))


WHOLE = Shard(0, 1)


class Loader(ABC):
    """Passes over labelled uint8 images; a subclass says where the images come from.

    Iterating yields (x, y): x (B, C, H, W) uint8 and channels-last, y (B,) int64, both on
    `device`. With `train`, a pass is shuffled, its partial last batch dropped, and every image
    is shifted by up to `pad` pixels each way over zeros and, with `flip`, mirrored half the time
    (section 4.1 of the IAT paper, after Madry et al. 2018). Without, images come in their order,
    untouched, the last batch as short as it is; those x must not be written to.

    `order`, a CPU generator, gives each pass its permutation; `augment`, a generator on
    `device`, each batch its shifts and flips; None stands for torch's default generators. Every
    loader draws the same numbers, so that the same seeds give the same batches. No batch waits
    for the device.

    With a `shard`, training takes the rank's slice out of every batch of `batch_size` images:
    the ranks' slices, drawn from equal generators, put together are the batch that one process
    would see. Without `train` it takes every `ranks`-th batch from batch number `rank` on.

    Raises `InputError` where no full training batch exists or the ranks cannot share one equally.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        train: bool,
        pad: int = 2,
        flip: bool = False,
        order: torch.Generator | None = None,
        augment: torch.Generator | None = None,
        shard: Shard = WHOLE,
    ) -> None:
        if batch_size < 1 or pad < 0:
            raise InputError(
                f"batch size {batch_size} with padding {pad}: give at least 1 and at least 0"
            )
        if train and batch_size > len(split):
            raise InputError(
                f"a batch of {batch_size} is larger than the {len(split)} training images: "
                f"give a batch size of {len(split)} or less"
            )
        if train and batch_size % shard.ranks:
            raise InputError(
                f"a batch of {batch_size} images cannot be shared equally by {shard.ranks} "
                f"processes: give a multiple of {shard.ranks}"
            )
        self.labels = split.labels.to(device)
        self.device = self.labels.device
        self.batch_size, self.train, self.pad, self.flip = batch_size, train, pad, flip
        self.order, self.augment, self.shard = order, augment, shard
        self._hold(split)

    def __len__(self) -> int:
        """Batches in a pass; without `train`, in this shard's part of it."""
        full, rest = divmod(len(self.labels), self.batch_size)
        if self.train:
            return full
        return len(range(self.shard.rank, full + (rest > 0), self.shard.ranks))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.epoch()

    def epoch(self, skip: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Return one pass that starts at batch `skip`.

        `order` is drawn from here and now, `augment` when a batch is made. So with `order` as it
        was at the start of a pass and `augment` as it was after `skip` batches of it, the rest
        of that pass repeats exactly.
        """
        if not self.train:
            return self._in_order(skip)
        order = torch.randperm(len(self.labels), generator=self.order)
        share = self.batch_size // self.shard.ranks
        own = slice(self.shard.rank * share, (self.shard.rank + 1) * share)
        batches = order[: len(self) * self.batch_size].view(len(self), self.batch_size)
        return self._augmented(batches[skip:, own], own)

    @abstractmethod
    def _hold(self, split: Split) -> None:
        """Keep what batches are made of."""

    @abstractmethod
    def _in_order(self, skip: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this shard's untouched batches from number `skip` on."""

    @abstractmethod
    def _shuffled(self, batches: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield for every row of `batches`, (batches, B) positions in the split on the CPU: a store
        of images (M, H, W, C), where in it the row's images are, (B,), and their labels, (B,).
        """

    def _augmented(self, batches: Tensor, own: slice) -> Iterator[tuple[Tensor, Tensor]]:
        size = self.batch_size
        none = torch.zeros(batches.shape[1], dtype=torch.bool, device=self.device)
        for store, index, labels in self._shuffled(batches):
            dy, dx = self._draw(2 * self.pad + 1, (2, size))[:, own]
            flip = self._draw(2, (size,))[own].bool() if self.flip else none
            yield crop_flip(store, index, dy, dx, flip, self.pad), labels

    def _draw(self, high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(high, shape, generator=self.augment, device=self.device)


class ResidentLoader(Loader):
    """Batches of a split that lives on the device as uint8: 154 MB for CIFAR-10.

    Without `train`, x are views of the resident images.
    """

    def _hold(self, split: Split) -> None:
        self.images = split.images.to(self.device)

    def _in_order(self, skip: int) -> Iterator[tuple[Tensor, Tensor]]:
        size, (rank, ranks) = self.batch_size, self.shard
        for start in range((rank + skip * ranks) * size, len(self.labels), ranks * size):
            span = slice(start, start + size)
            yield self.images[span].permute(0, 3, 1, 2), self.labels[span]

    def _shuffled(self, batches: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for index in batches.to(self.device):
            yield self.images, index, self.labels[index]


def choose(
    wanted: Literal["auto", "resident", "ffcv"], dataset: Dataset, device: torch.device
) -> tuple[Kind, str]:
    """Return the loader that a training takes, and why.

    "auto" takes "ffcv", where it is installed, for a .beton and for images that would fill more
    than half of what is free of the device's memory. Raises `InputError` for "ffcv" where it is
    not installed.
    """
    if wanted == "ffcv" and (reason := obstacle()):
        raise InputError(f"--loader ffcv: {reason}")
    if wanted != "auto":
        return wanted, "it was asked for"
    if dataset.stored:
        return ("ffcv", "it is a .beton") if installed() else ("resident", "FFCV is not installed")
    if fits(dataset.nbytes, device, in_memory=True):
        return "resident", "it fits"
    if installed():
        return "ffcv", f"it takes more than half of the memory that is free on {device}"
    return "resident", "FFCV is not installed"


def fits(nbytes: int, device: torch.device, *, in_memory: bool = False) -> bool:
    """Whether images take at most half of what is free on the device, or lie there already."""
    if in_memory and device.type == "cpu":
        return True
    return nbytes <= free_memory(device) // 2


def make(split: Split, batch_size: int, *, kind: Kind | None = None, **options: Any) -> Loader:
    """Return the loader of a kind, with `Loader`'s arguments; "ffcv" takes a `StoredSplit`.

    Without a kind the split is resident, unless it is stored and does not fit: the commands that
    measure go over the images only a few times.
    """
    if kind is None:
        device = torch.device(options.get("device", "cpu"))
        small = not isinstance(split, StoredSplit) or fits(split.nbytes, device)
        kind = "resident" if small or not installed() else "ffcv"
    if kind == "resident":
        return ResidentLoader(split, batch_size, **options)
    from fastiat.images.ffcv_batches import FFCVLoader

    return FFCVLoader(split, batch_size, **options)
