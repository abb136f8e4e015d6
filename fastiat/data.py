"""Images: the data sets as a `Dataset` of two `Split`s, in memory or in a file, and a hold-out."""

import contextlib
import hashlib
import importlib.resources
import io
import math
import os
import socket
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastiat import beton, folder
from fastiat.device import free_memory
from fastiat.distributed import ranks
from fastiat.errors import InputError, one_line
from fastiat.ffcv_package import installed
from fastiat.guard import read_npz
from fastiat.settings import DATASETS, is_beton

DOWNLOAD_TIMEOUT = 10.0  # seconds without a byte before a download counts as failed


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
    return Path(os.path.expanduser(given)) if given else folder.user_cache("data")


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
    `data_dir` (`fastiat.folder` says what it may hold). `digits` ships with the package:
    scikit-learn's 1,797 scans of 8x8 pixels, 0..16 scaled to 0..255, 1,437 of them to train on.
    Progress bars appear when `progress` is set and stderr is a terminal.

    `data_dir` may be a .beton that was made of the data set. With the `loader` "ffcv" a tree is
    converted into the cache, images of any size, and stays in that file; "auto" does so where FFCV
    is installed and the tree does not fit into memory.

    Without `fetch` nothing is downloaded or unpacked: a file that names a `data_dir`, such as the
    config.json of a stranger's run, must not choose where something is written.

    Raises `InputError` in one line for an unknown name, a folder that is not there, files that
    can neither be found nor downloaded (it says what to put where) and a damaged file (named).
    """
    if is_beton(name):
        return stored(name)
    if name not in DATASETS:
        raise InputError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")
    if is_beton(data_dir) and not os.path.isdir(str(data_dir)):
        return _stored_as(name, str(data_dir))
    if name == "digits":
        return _digits()
    with ranks().one_first():
        return _load(name, data_dir, loader, progress, fetch)


def _load(
    name: str, data_dir: str | os.PathLike[str] | None, loader: str, progress: bool, fetch: bool
) -> Dataset:
    root = tree_root(data_dir) if name == "folder" or data_dir is not None else default_dir()
    if name == "folder":
        if loader == "ffcv" or (loader == "auto" and _needs_converting(root)):
            from fastiat import convert

            return convert.cached_tree(root)
        tree = folder.read(root, progress=progress)
        train, test = (Split(*map(torch.from_numpy, part)) for part in (tree.train, tree.test))
        return Dataset(name, tree.classes, train, test, flip=True)
    return _torchvision(name, root, progress and sys.stderr.isatty(), fetch)


def tree_root(data_dir: str | os.PathLike | None) -> Path:
    """Return the folder that `data_dir` names; raise `InputError` unless it can be read."""
    if data_dir is None:
        raise InputError(
            "the data set 'folder' needs a data folder (--data-dir) with "
            "train/<class>/ and test/<class>/ in it"
        )
    root = Path(os.path.expanduser(data_dir))
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
    file = beton.open_beton(os.path.expanduser(path))
    card, everything = file.card, torch.arange(len(file))
    train, test = (
        StoredSplit(file, part) for part in (everything[: card.n_train], everything[card.n_train :])
    )
    return Dataset(card.name, card.classes, train, test, card.flip, card.fingerprint)


def _stored_as(name: str, path: str) -> Dataset:
    dataset = stored(path)
    if name != "folder" and name != dataset.name and not dataset.name.startswith(f"{name}-"):
        raise InputError(
            f"{path} holds {dataset.name}, not {name}: name it with --dataset {path} alone"
        )
    return dataset


def _needs_converting(root: Path) -> bool:
    """Whether a tree of images of one size takes more memory than there is for it, with FFCV."""
    too_large = folder.decoded_size(root) > free_memory(torch.device("cpu")) // 2
    return too_large and installed()


def _digits() -> Dataset:
    source = importlib.resources.files("fastiat").joinpath("digits.npz")
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


@dataclass(frozen=True)
class _Source:
    """How torchvision fetches and parses one data set. Paths are relative to the data folder."""

    # Whether to take the training split, and to fetch -> images (N, H, W, C), labels, class names.
    parse: Callable[[bool, bool], tuple[Any, Any, Sequence[str]]]
    checksums: dict[str, str]  # MD5 of every file that torchvision checks
    needed: list[str]  # what must be there in the end
    by_hand: str  # what to put where without a network


def _cifar10(root: Path) -> _Source:
    from torchvision.datasets import CIFAR10  # type: ignore[import-untyped]
    from torchvision.datasets.utils import check_integrity  # type: ignore[import-untyped]

    meta = CIFAR10.meta["filename"], CIFAR10.meta["md5"]

    class WholeCIFAR10(CIFAR10):
        # The parent forgets the file of class names here, so would never replace a damaged one.
        def _check_integrity(self) -> bool:
            names = os.path.join(self.root, self.base_folder, meta[0])
            return super()._check_integrity() and check_integrity(names, meta[1])

    def parse(train: bool, fetch: bool) -> tuple[Any, Any, Sequence[str]]:
        # torchvision unpickles the batches, after comparing the checksum of every one of them.
        source = WholeCIFAR10(root, train, download=train and fetch)
        return source.data, source.targets, source.classes

    batches = [*CIFAR10.train_list, *CIFAR10.test_list, meta]
    checksums = {f"{CIFAR10.base_folder}/{file}": md5 for file, md5 in batches}
    return _Source(
        parse,
        {**checksums, CIFAR10.filename: CIFAR10.tgz_md5},
        list(checksums),
        f"{CIFAR10.filename} into {root}",
    )


def _svhn(root: Path) -> _Source:
    from torchvision.datasets import SVHN

    def parse(train: bool, fetch: bool) -> tuple[Any, Any, Sequence[str]]:
        source = SVHN(root, "train" if train else "test", download=fetch)
        return source.data.transpose(0, 2, 3, 1), source.labels, "0123456789"

    files = [SVHN.split_list[split] for split in ("train", "test")]
    checksums = {file: md5 for _, file, md5 in files}
    by_hand = f"{' and '.join(checksums)} into {root}"
    return _Source(parse, checksums, list(checksums), by_hand)


def _fashion_mnist(root: Path) -> _Source:
    from torchvision.datasets import FashionMNIST

    def parse(train: bool, fetch: bool) -> tuple[Any, Any, Sequence[str]]:
        source = FashionMNIST(root, train, download=fetch)
        return source.data.numpy()[..., None], source.targets, source.classes

    raw = "FashionMNIST/raw"
    return _Source(
        parse,
        {f"{raw}/{file}": md5 for file, md5 in FashionMNIST.resources},
        [f"{raw}/{file.removesuffix('.gz')}" for file, _ in FashionMNIST.resources],
        f"{', '.join(file for file, _ in FashionMNIST.resources)} into {root / raw}",
    )


def _torchvision(name: str, root: Path, progress: bool, fetch: bool) -> Dataset:
    makers = {"cifar10": _cifar10, "svhn": _svhn, "fashion-mnist": _fashion_mnist}
    source = makers[name](root)
    splits = []
    try:
        with _quiet(progress):
            for train in (True, False):
                images, labels, names = source.parse(train, fetch)
                pixels = torch.from_numpy(np.ascontiguousarray(images))
                splits.append(Split(pixels, torch.as_tensor(labels, dtype=torch.int64)))
        return Dataset(name, tuple(names), splits[0], splits[1], flip=name == "cifar10")
    # Networks, archives and parsers fail in too many ways to list; the cause stays chained.
    except Exception as error:
        if not fetch:
            raise InputError(
                f"{name} is not whole in {root}, which the run names: name with --data-dir where "
                f"it is, or may be downloaded to"
            ) from error
        raise InputError(_explain(name, root, source, error)) from error


def _explain(name: str, root: Path, source: _Source, error: Exception) -> str:
    """Say in one line which file made `source` fail, and what mends it."""
    from torchvision.datasets.mnist import (  # type: ignore[import-untyped]
        read_sn3_pascalvincent_tensor,
    )
    from torchvision.datasets.utils import check_integrity

    reason = " ".join(str(error).split()) or type(error).__name__
    absent = [file for file in source.needed if not (root / file).exists()]
    for file, md5 in source.checksums.items():
        # An archive or .gz beside its intact contents is not what failed.
        unpacked = file not in source.needed and not absent
        if (root / file).exists() and not unpacked and not check_integrity(root / file, md5):
            return (
                f"{root / file} is damaged (wrong checksum) and could not be downloaded again "
                f"({reason}): put the original file in its place"
            )
    if absent:
        return (
            f"{name} is not in {root} and could not be downloaded ({reason}): put {source.by_hand}"
        )
    for file in source.needed:
        if file not in source.checksums:  # unpacked from a .gz, without a checksum of its own
            try:
                read_sn3_pascalvincent_tensor(os.fspath(root / file))
            except Exception:
                return f"{root / file} is damaged: delete it and run again"
    return f"{name} in {root} cannot be read ({reason}): delete its files there and run again"


@contextlib.contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """Silence torchvision, but for its bars where `progress`, and let no download hang."""
    timeout = socket.getdefaulttimeout()
    with contextlib.ExitStack() as stack:
        if not progress:
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        # CIFAR-10's pickles are older than a NumPy that warns about them.
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        stack.callback(socket.setdefaulttimeout, timeout)
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
        yield


def holdout(split: Split, n: int, seed: int) -> tuple[Split, Split]:
    """Return (`split` without `n` of its images, those `n`), each in the order of `split`.

    Stratified: every class gives its share of `n`, rounded by largest remainder. Which images go
    depends on `seed` and the labels alone. Raises `InputError` unless 0 < n < len(split).
    """
    if not 0 < n < len(split):
        raise InputError(f"cannot hold out {n} of {len(split)} images: give 1 to {len(split) - 1}")
    counts = torch.bincount(split.labels)
    quota, remainder = n * counts // len(split), n * counts % len(split)
    quota[remainder.argsort(descending=True, stable=True)[: n - int(quota.sum())]] += 1
    shuffled = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    held = torch.zeros(len(split), dtype=torch.bool)
    for label, take in enumerate(quota.tolist()):
        held[shuffled[split.labels[shuffled] == label][:take]] = True
    return split.take(~held), split.take(held)
