"""Labelled images: a `Split` in memory or in a .beton, a `Dataset` of two, stratified draws."""

import hashlib
import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastiat.images import beton
from fastiat.system.errors import DamagedError, InputError


@dataclass(frozen=True, eq=False)
class Split:
    """Labelled images on the CPU.

    `images` is (N, H, W, C) uint8 and contiguous, `labels` (N,) int64. Raises `InputError` for
    tensors of another shape or type.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dim() != 4 or images.dtype != torch.uint8 or not images.is_contiguous():
            raise InputError(
                f"images are {images.dtype} of shape {tuple(images.shape)}: "
                "give contiguous uint8 (N, H, W, C)"
            )
        if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
            raise InputError(
                f"{len(images)} images come with {labels.dtype} labels of shape "
                f"{tuple(labels.shape)}: give one int64 label for each image"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def nbytes(self) -> int:
        """Size of the pixels in memory, in bytes."""
        return len(self) * math.prod(self.shape)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one image."""
        _, height, width, channels = self.images.shape
        return channels, height, width

    def take(self, index: Tensor) -> "Split":
        """Return the images and labels at `index`, in its order.

        `index` is (M,) int64 positions, or a mask (N,) bool.
        """
        return Split(self.images[index], self.labels[index])

    def pixels(self, count: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the first `count` images, or all, and labels, in the form for attack libraries.

        Pixels are (M, C, H, W) fp32 in [0, 1] and contiguous, labels (M,) int64; both are copies.
        Raises `InputError` for a count below 1 or above the number of images.
        """
        count = len(self) if count is None else count
        if not 1 <= count <= len(self):
            raise InputError(f"{count} images were requested: give 1 to {len(self)}")
        part = self.take(torch.arange(count, device="cpu"))
        return part.images.permute(0, 3, 1, 2).contiguous().to(torch.float32) / 255, part.labels


class StoredSplit(Split):
    """Labelled images in a .beton: a `Split` that reads `images` from the file at every access.

    `positions`, (N,) int64, are the indices of the images in the file.
    """

    file: beton.Beton
    positions: Tensor
    margin: int
    """Pixels that are cut off at each side of every stored image."""

    def __init__(self, file: beton.Beton, positions: Tensor, margin: int = 0) -> None:
        labels = torch.from_numpy(file.labels)[positions]
        # Not `super().__init__`: it would read the images, and the dataclass is frozen.
        self.__dict__.update(file=file, positions=positions, labels=labels, margin=margin)

    @property
    def images(self) -> Tensor:
        """The images, (N, H, W, C) uint8, read into memory."""
        read = torch.from_numpy(self.file.read(self.positions.numpy()))
        return without_margin(read, self.margin).contiguous()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one image."""
        card, side = self.file.card, self.file.card.side - 2 * self.margin
        return card.channels, side, side

    def take(self, index: Tensor) -> "StoredSplit":
        """Return the split of the images at `index`, in its order; no image is read."""
        return StoredSplit(self.file, self.positions[index], self.margin)


def without_margin(images: Tensor, margin: int) -> Tensor:
    """Return a view of images (N, H, W, C) without `margin` pixels at each side."""
    _, height, width, _ = images.shape
    return images[:, margin : height - margin, margin : width - margin]


def centred(split: Split, side: int) -> Split:
    """Return the split of the centre squares of `side` pixels of its images."""
    margin = (split.shape[1] - side) // 2
    if not margin:
        return split
    if isinstance(split, StoredSplit):
        return StoredSplit(split.file, split.positions, split.margin + margin)
    return Split(without_margin(split.images, margin).contiguous(), split.labels)


def resized(split: Split, side: int) -> Split:
    """Return the split of all images resized to `side`, bilinearly and without aliasing."""
    if split.shape[1:] == (side, side):
        return split
    parts = []
    for images in split.images.split(1024):
        pixels = images.permute(0, 3, 1, 2).float()
        pixels = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
        parts.append(pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1))
    return Split(torch.cat(parts).contiguous(), split.labels)


def fingerprint_of(*splits: Split) -> str:
    """Return 16 hex digits of a SHA-256 over the shapes, labels and pixels of splits."""
    digest = hashlib.sha256()
    for split in splits:
        digest.update(str(tuple(split.images.shape)).encode())
        digest.update(split.labels.contiguous().numpy().data)
        digest.update(split.images.numpy().data)
    return digest.hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test split of one data set.

    `classes[label]` is the name of a class. `flip` says whether training mirrors images at random
    (the paper flips CIFAR-10, not SVHN). Raises `InputError` for a split without images, for a
    label outside `classes`, and for splits whose images differ in shape. Only the training images
    may be larger squares, of which `--augment resized-crop` cuts out parts.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    flip: bool
    known_fingerprint: str = ""
    """The fingerprint, if known without reading the images, else ""."""
    context: bool = False
    """Whether training images may be larger than those that the network gets."""

    def __post_init__(self) -> None:
        for split in (self.train, self.test):
            if len(split) == 0:
                raise InputError(f"{self.name} has a split without images")
            low, high = int(split.labels.min()), int(split.labels.max())
            if low < 0 or high >= len(self.classes):
                count = len(self.classes)
                raise InputError(f"{self.name} has labels from {low} to {high} for {count} classes")
        larger = self.context and self.train.shape[1] >= self.test.shape[1]
        if self.train.shape != self.test.shape and not larger:
            raise InputError(
                f"{self.name} has training images of shape {self.train.shape} and "
                f"test images of shape {self.test.shape}"
            )

    @property
    def stored(self) -> bool:
        """Whether the images are in a .beton."""
        return isinstance(self.train, StoredSplit) and isinstance(self.test, StoredSplit)

    @property
    def nbytes(self) -> int:
        """Size of the pixels of both splits in memory, in bytes."""
        return self.train.nbytes + self.test.nbytes

    def fingerprint(self) -> str:
        """Return 16 hex digits of a SHA-256 over both splits' shapes, labels and pixels.

        For a raw .beton it equals that of the same images in memory; for a .beton of JPEGs it is
        computed over the encoded bytes.
        """
        return self.known_fingerprint or fingerprint_of(self.train, self.test)


def stored(path: str | os.PathLike) -> Dataset:
    """Return the data set in a .beton; both of its splits are a `StoredSplit`.

    Raises the errors of `fastiat.images.beton.open_beton`.
    """
    file = beton.open_beton(path)
    card, everything = file.card, torch.arange(len(file))
    train = StoredSplit(file, everything[: card.n_train])
    test = StoredSplit(file, everything[card.n_train :])
    return Dataset(card.name, card.classes, train, test, card.flip, card.fingerprint)


def in_memory(dataset: Dataset) -> Dataset:
    """Read all images of a data set in a raw .beton into memory.

    Raises `DamagedError` if the images differ from those that were written, and `InputError` if
    they do not fit into memory.
    """
    split = dataset.train
    assert isinstance(split, StoredSplit)
    try:
        train, test = (Split(part.images, part.labels) for part in (split, dataset.test))
    except MemoryError:
        _, height, width = split.shape
        raise InputError(
            f"{len(split) + len(dataset.test)} images of {height}x{width} pixels do not fit into "
            f"memory: shrink them or free memory"
        ) from None
    read = Dataset(dataset.name, dataset.classes, train, test, dataset.flip)
    if read.fingerprint() != dataset.fingerprint():
        raise DamagedError(f"{split.file.path} holds images that differ from those written to it")
    return read


def holdout(split: Split, n: int, seed: int) -> tuple[Split, Split]:
    """Divide `split` into (the remaining images, `n` held-out images), each in its order.

    Each class gives its share of `n`, rounded by the largest remainder method, and keeps an image.
    The choice depends only on `seed` and the labels. Raises `InputError` if the classes cannot give
    `n` images.
    """
    counts = torch.bincount(split.labels)
    spare = (counts - 1).clamp(min=0)
    most = int(spare.sum())
    if not 0 < n <= most:
        raise InputError(
            f"cannot hold out {n} of {len(split)} images, as every class keeps at least one: "
            + (f"hold out 1 to {most}" if most else "hold out none")
        )
    held = _drawn(split, _shares(counts, n, torch.zeros_like(counts), spare), seed)
    return split.take(~held), split.take(held)


def draw(split: Split, n: int, seed: int) -> Split:
    """Return `n` images of `split`, in its order, stratified by class as in `holdout`.

    Every class has at least one, if `n` allows it. Raises `InputError` unless 0 < n <= len(split).
    """
    if not 0 < n <= len(split):
        raise InputError(f"cannot draw {n} of {len(split)} images: give 1 to {len(split)}")
    counts = torch.bincount(split.labels)
    least = counts.clamp(max=1)
    if int(least.sum()) > n:
        least = torch.zeros_like(counts)
    return split.take(_drawn(split, _shares(counts, n, least, counts), seed))


def _shares(counts: Tensor, n: int, least: Tensor, most: Tensor) -> Tensor:
    """Return each class's share, (K,), of `n`, in proportion to `counts`, (K,).

    Shares are rounded by the largest remainder method and lie in [`least`, `most`], both (K,).
    """
    total = int(counts.sum())
    quota, remainder = n * counts // total, n * counts % total
    quota[remainder.argsort(descending=True, stable=True)[: n - int(quota.sum())]] += 1
    quota = quota.clamp(least, most)
    # The bounds change the sum. Restore it image by image, each at the class that is furthest from
    # its exact share and not at its bound.
    while (missing := n - int(quota.sum())) != 0:
        step = 1 if missing > 0 else -1
        behind = step * (n * counts - quota * total)
        behind[quota == (most if missing > 0 else least)] = torch.iinfo(torch.int64).min
        quota[behind.argmax()] += step
    return quota


def _drawn(split: Split, quota: Tensor, seed: int) -> Tensor:
    """Return a mask, (N,) bool, of images drawn at random, `quota[k]` of each class k."""
    shuffled = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    drawn = torch.zeros(len(split), dtype=torch.bool)
    for label, take in enumerate(quota.tolist()):
        drawn[shuffled[split.labels[shuffled] == label][:take]] = True
    return drawn


def limited(split: Split, total: int | None, per_class: int | None, seed: int) -> Split:
    """Limit `split` to `per_class` images of each class, then to `total` images, see `draw`.

    None means no limit. Raises `InputError` for a `total` below the number of classes.
    """
    counts = torch.bincount(split.labels)
    if per_class is not None and per_class < int(counts.max()):
        split = split.take(_drawn(split, counts.clamp(max=per_class), seed))
    if total is None or total >= len(split):
        return split
    present = int((counts > 0).sum())
    if total < present:
        raise InputError(
            f"--train-limit {total} cannot cover {present} classes: give {present} or more"
        )
    return draw(split, total, seed)
