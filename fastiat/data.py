"""Images: the data sets as a `Dataset` of two `Split`s, in memory or in a file, and a hold-out."""

import hashlib
import importlib.resources
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastiat.engine.device import free_memory, own_defaults
from fastiat.images import beton, downloads
from fastiat.images import tree as folder
from fastiat.images.ffcv import installed
from fastiat.system.errors import InputError, one_line
from fastiat.system.ranks import ranks
from fastiat.system.settings import DATASETS, expanded, is_beton
from fastiat.system.untrusted import read_npz


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
        """Bytes of the pixels in memory."""
        return len(self) * math.prod(self.shape)

    @property
    def shape(self) -> tuple[int, int, int]:
        """One image's (C, H, W)."""
        _, height, width, channels = self.images.shape
        return channels, height, width

    def take(self, index: Tensor) -> "Split":
        """Return the images and labels that `index`, (M,) int64, picks, in its order."""
        return Split(self.images[index], self.labels[index])

    def pixels(self, count: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the first `count` images, or all, and their labels, as attack libraries take them.

        Pixels are (M, C, H, W) fp32 in [0, 1] and contiguous, labels (M,) int64; both are copies.
        Raises `InputError` for a count below 1 or above the number of images.
        """
        count = len(self) if count is None else count
        if not 1 <= count <= len(self):
            raise InputError(f"{count} images are asked for: give 1 to {len(self)}")
        part = self.take(torch.arange(count, device="cpu"))
        return part.images.permute(0, 3, 1, 2).contiguous().to(torch.float32) / 255, part.labels


class StoredSplit(Split):
    """Labelled images in a .beton: a `Split` whose `images` are read anew whenever they are named.

    `positions`, (N,) int64, are the images' in the file.
    """

    file: beton.Beton
    positions: Tensor

    def __init__(self, file: beton.Beton, positions: Tensor) -> None:
        labels = torch.from_numpy(file.labels)[positions]
        # The dataclass is frozen, and would check images in memory.
        self.__dict__.update(file=file, positions=positions, labels=labels)

    @property
    def images(self) -> Tensor:
        """The images, (N, H, W, C) uint8, read into memory."""
        return torch.from_numpy(self.file.read(self.positions.numpy()))

    @property
    def shape(self) -> tuple[int, int, int]:
        """One image's (C, H, W)."""
        card = self.file.card
        return card.channels, card.side, card.side

    def take(self, index: Tensor) -> "StoredSplit":
        """Return the images and labels that `index` picks, in its order; no image is read."""
        return StoredSplit(self.file, self.positions[index])


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test split of one data set.

    `classes[label]` is a class's name; `flip` says whether training mirrors images (the paper
    flips CIFAR-10, not SVHN). Raises `InputError` for a label without a class and for splits
    whose images differ in shape.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    flip: bool
    known_fingerprint: str = ""
    """The fingerprint, where it is known without reading the images."""

    def __post_init__(self) -> None:
        for split in (self.train, self.test):
            if len(split) == 0:
                raise InputError(f"{self.name} has a split without images")
            low, high = int(split.labels.min()), int(split.labels.max())
            if low < 0 or high >= len(self.classes):
                raise InputError(
                    f"{self.name} has labels from {low} to {high} for {len(self.classes)} classes"
                )
        if self.train.shape != self.test.shape:
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
        """Bytes of both splits' pixels in memory."""
        return self.train.nbytes + self.test.nbytes

    def fingerprint(self) -> str:
        """Return 16 hex digits of a SHA-256 over both splits' shapes, labels and pixels.

        A raw .beton has that of the images it was made from; one of JPEGs that of their bytes.
        """
        if self.known_fingerprint:
            return self.known_fingerprint
        digest = hashlib.sha256()
        for split in (self.train, self.test):
            digest.update(str(tuple(split.images.shape)).encode())
            digest.update(split.labels.contiguous().numpy().data)
            digest.update(split.images.numpy().data)
        return digest.hexdigest()[:16]


def default_dir() -> Path:
    """Return where data sets are looked for and downloaded to when no folder is named."""
    given = os.environ.get("FASTIAT_DATA")
    if given:
        return Path(expanded(given))
    try:
        return folder.user_cache("data")
    except InputError as error:
        raise InputError(
            f"{error}: name one for data sets with --data-dir or FASTIAT_DATA"
        ) from None


@own_defaults()
def load(
    name: str,
    data_dir: str | os.PathLike | None = None,
    *,
    progress: bool = True,
    loader: str = "resident",
    fetch: bool = True,
) -> Dataset:
    """Return the data set `name`, one of `DATASETS` or the path of a .beton, which is not read yet.

    `cifar10`, `svhn` (73,257 training images, no extra ones) and `fashion-mnist` are downloaded
    by torchvision, which compares checksums, into `data_dir`, else `$FASTIAT_DATA`, else
    `~/.cache/fastiat/data` (`$XDG_CACHE_HOME/fastiat/data`). `folder` is the image tree at
    `data_dir` (`fastiat.images.tree` says what it may hold). `digits` ships with the package:
    scikit-learn's 1,797 scans of 8x8 pixels, 0..16 scaled to 0..255, 1,437 of them to train on.
    Progress bars appear when `progress` is set and stderr is a terminal.

    `data_dir` may be a .beton that was made of the data set. Of a .beton it is the folder that the
    file lies in now, or the file itself, for one that was moved since it was named. With
    the `loader` "ffcv" a tree is converted into the cache, images of any size, and stays in that
    file; "auto" does so where FFCV is installed and the tree does not fit into memory.

    Without `fetch` nothing is downloaded or unpacked: a file that names a `data_dir`, such as the
    config.json of a stranger's run, must not choose where something is written.

    Raises `InputError` in one line for an unknown name, a folder that is not there, files that
    can neither be found nor downloaded (it says what to put where) and a damaged file (named).
    """
    name = expanded(name)
    data_dir = None if data_dir is None else expanded(data_dir)
    if is_beton(name):
        return stored(name if data_dir is None else _moved(name, data_dir))
    if name not in DATASETS:
        raise InputError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")
    if data_dir is not None and is_beton(data_dir) and not os.path.isdir(data_dir):
        return _stored_as(name, data_dir)
    if data_dir is not None:
        check_folder(name, data_dir)
    if name == "digits":
        return _digits()
    with ranks().local_rank_first():
        return _load(name, data_dir, loader, progress, fetch)


def _load(
    name: str, data_dir: str | os.PathLike[str] | None, loader: str, progress: bool, fetch: bool
) -> Dataset:
    root = tree_root(data_dir) if name == "folder" or data_dir is not None else default_dir()
    if name == "folder":
        if downloads.held(root) and not os.path.isdir(root / "train"):
            raise InputError(f"{root} is no image tree: it {downloads.looks_like(root)}")
        if loader == "ffcv" or (loader == "auto" and _needs_converting(root)):
            from fastiat.images import convert

            return convert.cached_tree(root)
        tree = folder.read(root, progress=progress)
        train, test = (Split(*map(torch.from_numpy, part)) for part in (tree.train, tree.test))
        return Dataset(name, tree.classes, train, test, flip=True)

    def build(splits: list[tuple[Any, Any]], names: Sequence[str]) -> Dataset:
        train, test = (
            Split(torch.from_numpy(np.ascontiguousarray(images)), torch.as_tensor(labels).long())
            for images, labels in splits
        )
        return Dataset(name, tuple(names), train, test, flip=name == "cifar10")

    bars = progress and sys.stderr.isatty()
    return downloads.read(name, root, build, progress=bars, fetch=fetch)


def tree_root(data_dir: str | os.PathLike | None) -> Path:
    """Return the folder that `data_dir` names; raise `InputError` unless it can be read."""
    if data_dir is None:
        raise InputError(
            "the data set 'folder' needs a data folder (--data-dir) with "
            "train/<class>/ and test/<class>/ in it"
        )
    root = Path(expanded(data_dir))
    if not os.path.exists(root):  # Path.exists would raise for a path no system takes
        raise InputError(f"the data folder {root} does not exist: create it or name another")
    if not os.path.isdir(root):
        raise InputError(f"the data folder {root} is a file: name the folder that holds it")
    if not os.access(root, os.R_OK | os.X_OK):
        raise InputError(f"the data folder {root} cannot be read: check its permissions")
    return root


def stored(path: str | os.PathLike) -> Dataset:
    """Return the data set in a .beton; its splits are `StoredSplit`s.

    Raises `InputError`, naming the file, unless it is a whole .beton of fastiat.
    """
    file = beton.open_beton(path)
    card, everything = file.card, torch.arange(len(file))
    train, test = (
        StoredSplit(file, part) for part in (everything[: card.n_train], everything[card.n_train :])
    )
    return Dataset(card.name, card.classes, train, test, card.flip, card.fingerprint)


def _moved(name: str, data_dir: str) -> str:
    """Return where the .beton that was `name` is now, in or at `data_dir`."""
    if not os.path.isdir(data_dir):
        return data_dir if is_beton(data_dir) else str(tree_root(data_dir) / Path(name).name)
    place = os.path.join(data_dir, Path(name).name)
    if not os.path.exists(place):
        raise InputError(
            f"{data_dir} holds no {Path(name).name}: name the folder that it is in, or leave "
            f"--data-dir out where {name} is"
        )
    return place


def _stored_as(name: str, path: str) -> Dataset:
    dataset = stored(path)
    if name != "folder" and name != dataset.name and not dataset.name.startswith(f"{name}-"):
        raise InputError(
            f"{path} holds {dataset.name}, not {name}: name it with --dataset {path} alone"
        )
    return dataset


def check_folder(name: str, data_dir: str | os.PathLike[str], *, chosen: bool = True) -> None:
    """Raise `InputError` for a data folder that holds other images than `name`'s, saying which.

    Of a data set that was `chosen`, only an image tree is refused: one folder may serve several
    data sets, to be downloaded to it. One that nobody chose is not downloaded beside others.
    """
    root = Path(expanded(data_dir))
    if not os.path.isdir(root) or name in downloads.held(root) or name == "folder":
        return
    tree = all(os.path.isdir(root / split) for split in folder.SPLITS)
    looks = downloads.looks_like(root) if tree or not chosen else ""
    if looks:
        raise InputError(f"--data-dir {root} {looks} (the data set asked for is {name})")


def _needs_converting(root: Path) -> bool:
    """Whether a tree of images of one size takes more memory than there is for it, with FFCV."""
    too_large = folder.decoded_size(root) > free_memory(torch.device("cpu")) // 2
    return too_large and installed()


def _digits() -> Dataset:
    source = importlib.resources.files("fastiat.images").joinpath("digits.npz")
    try:
        with source.open("rb") as file:
            arrays = read_npz(file, largest=2**20)
        images = torch.from_numpy(arrays["images"])[..., None]
        labels = torch.from_numpy(arrays["labels"]).long()
        in_test = torch.zeros(len(labels), dtype=torch.bool)
        in_test[torch.from_numpy(arrays["test"])] = True
        everything = Split(images, labels)
        train, test = everything.take(~in_test), everything.take(in_test)
        return Dataset("digits", tuple("0123456789"), train, test, flip=False)
    # zipfile, NumPy and torch raise whatever a damaged file makes them stumble on.
    except Exception as error:
        raise InputError(
            f"{source} is damaged ({one_line(error)[:100]}): install fastiat again"
        ) from error


def holdout(split: Split, n: int, seed: int) -> tuple[Split, Split]:
    """Return (`split` without `n` of its images, those `n`), each in the order of `split`.

    Stratified: every class gives its share of `n`, rounded by largest remainder, but keeps one
    image at least. Which images go depends on `seed` and the labels alone. Raises `InputError`
    where the classes cannot give `n` so.
    """
    counts = torch.bincount(split.labels)
    spare = (counts - 1).clamp(min=0)
    most = int(spare.sum())
    if not 0 < n <= most:
        raise InputError(
            f"cannot hold out {n} of {len(split)} images, as every class keeps one at least: "
            + (f"hold out 1 to {most}" if most else "hold out none")
        )
    held = _drawn(split, _shares(counts, n, torch.zeros_like(counts), spare), seed)
    return split.take(~held), split.take(held)


def draw(split: Split, n: int, seed: int) -> Split:
    """Return `n` images of `split`, in its order: a stratified draw, as that of `holdout`.

    Every class has one image at least where `n` is enough for that. Raises `InputError` unless
    0 < n <= len(split).
    """
    if not 0 < n <= len(split):
        raise InputError(f"cannot draw {n} of {len(split)} images: give 1 to {len(split)}")
    counts = torch.bincount(split.labels)
    least = counts.clamp(max=1)
    if int(least.sum()) > n:
        least = torch.zeros_like(counts)
    return split.take(_drawn(split, _shares(counts, n, least, counts), seed))


def _shares(counts: Tensor, n: int, least: Tensor, most: Tensor) -> Tensor:
    """Divide `n` in proportion to `counts`, (K,), by largest remainder, within two bounds, (K,)."""
    total = int(counts.sum())
    quota, remainder = n * counts // total, n * counts % total
    quota[remainder.argsort(descending=True, stable=True)[: n - int(quota.sum())]] += 1
    quota = quota.clamp(least, most)
    # What the bounds took or gave goes to, or comes from, the classes furthest from their share.
    while (missing := n - int(quota.sum())) != 0:
        step = 1 if missing > 0 else -1
        behind = step * (n * counts - quota * total)
        behind[quota == (most if missing > 0 else least)] = torch.iinfo(torch.int64).min
        quota[behind.argmax()] += step
    return quota


def _drawn(split: Split, quota: Tensor, seed: int) -> Tensor:
    """Return (N,) bool: which images are drawn, `quota`, (K,), of each class."""
    shuffled = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    drawn = torch.zeros(len(split), dtype=torch.bool)
    for label, take in enumerate(quota.tolist()):
        drawn[shuffled[split.labels[shuffled] == label][:take]] = True
    return drawn


def limited(split: Split, total: int | None, per_class: int | None, seed: int) -> Split:
    """Return at most `per_class` images of each class of `split` and `total` of all, in its order.

    A stratified draw of `total` gives every class at least one image. Which images stay depends on
    `seed` and the labels alone. None is no limit. Raises `InputError` for a `total` below the
    number of classes.
    """
    counts = torch.bincount(split.labels)
    if per_class is not None and per_class < int(counts.max()):
        split = split.take(_drawn(split, counts.clamp(max=per_class), seed))
    if total is None or total >= len(split):
        return split
    present = int((counts > 0).sum())
    if total < present:
        raise InputError(
            f"{total} training images cannot show {present} classes: give --train-limit at least "
            f"{present}"
        )
    return draw(split, total, seed)
