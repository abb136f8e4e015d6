"""The data sets that torchvision downloads, checks and parses, in one table of their properties."""

import contextlib
import io
import os
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastiat.images import tree
from fastiat.images.dataset import Dataset, Split
from fastiat.system.errors import InputError

DOWNLOAD_TIMEOUT = 10.0  # seconds without a byte before a download counts as failed

Parsed = tuple[Any, Any, Sequence[str]]
"""Images (N, H, W, C) uint8, labels (N,) and class names."""


@dataclass(frozen=True)
class Download:
    """Properties of a data set, and how torchvision reads it. Paths are relative to its folder."""

    train: int
    """Number of training images."""
    test: int
    """Number of test images."""
    side: int
    """Height and width of every image, in pixels."""
    channels: int
    flip: bool
    """Whether training mirrors images at random."""
    parse: Callable[[Path, bool, bool], Parsed]
    """Reads a split; arguments: the folder, whether to read the training split, whether to download
    missing files."""
    files: Callable[[], tuple[dict[str, str], dict[str, str]]]
    """Returns ({archive: MD5}, {unpacked file: MD5}); the MD5 is "" if it is not known."""
    classes: int = 10


def _parse_cifar(kind: str, root: Path, train: bool, fetch: bool) -> Parsed:
    from torchvision import datasets  # type: ignore[import-untyped]
    from torchvision.datasets.utils import check_integrity  # type: ignore[import-untyped]

    cifar = getattr(datasets, kind)

    class Whole(cifar):  # type: ignore[misc, valid-type]
        # torchvision's method does not check the file of class names, so torchvision would never
        # replace a damaged file of class names.
        def _check_integrity(self) -> bool:
            names = os.path.join(self.root, self.base_folder, cifar.meta["filename"])
            return super()._check_integrity() and check_integrity(names, cifar.meta["md5"])

    # torchvision compares the checksum of every batch before it unpickles the batch.
    source = Whole(root, train, download=train and fetch)
    return source.data, source.targets, source.classes


def _files_of_cifar(kind: str) -> tuple[dict[str, str], dict[str, str]]:
    from torchvision import datasets

    cifar = getattr(datasets, kind)
    meta = cifar.meta["filename"], cifar.meta["md5"]
    batches = [*cifar.train_list, *cifar.test_list, meta]
    unpacked = {f"{cifar.base_folder}/{file}": md5 for file, md5 in batches}
    return {cifar.filename: cifar.tgz_md5}, unpacked


def _parse_svhn(root: Path, train: bool, fetch: bool) -> Parsed:
    from torchvision.datasets import SVHN  # type: ignore[import-untyped]

    source = SVHN(root, "train" if train else "test", download=fetch)
    return source.data.transpose(0, 2, 3, 1), source.labels, "0123456789"


def _files_of_svhn() -> tuple[dict[str, str], dict[str, str]]:
    from torchvision.datasets import SVHN

    return {}, {file: md5 for _, file, md5 in map(SVHN.split_list.get, ("train", "test"))}


def _parse_fashion_mnist(root: Path, train: bool, fetch: bool) -> Parsed:
    from torchvision.datasets import FashionMNIST

    source = FashionMNIST(root, train, download=fetch)
    return source.data.numpy()[..., None], source.targets, source.classes


def _files_of_fashion_mnist() -> tuple[dict[str, str], dict[str, str]]:
    from torchvision.datasets import FashionMNIST

    archives = {f"FashionMNIST/raw/{file}": md5 for file, md5 in FashionMNIST.resources}
    return archives, {file.removesuffix(".gz"): "" for file in archives}


DOWNLOADS = {
    "cifar10": Download(
        50_000, 10_000, 32, 3, True, partial(_parse_cifar, "CIFAR10"),
        partial(_files_of_cifar, "CIFAR10"),
    ),
    "cifar100": Download(
        50_000, 10_000, 32, 3, True, partial(_parse_cifar, "CIFAR100"),
        partial(_files_of_cifar, "CIFAR100"), classes=100,
    ),
    "svhn": Download(73_257, 26_032, 32, 3, False, _parse_svhn, _files_of_svhn),
    "fashion-mnist": Download(
        60_000, 10_000, 28, 1, False, _parse_fashion_mnist, _files_of_fashion_mnist
    ),
}  # fmt: skip
"""Every data set that can be downloaded, by its name."""


def held(root: Path) -> list[str]:
    """Return the names of the downloadable data sets that have a file or folder in `root`."""
    return [
        name
        for name, download in DOWNLOADS.items()
        if any((root / file.split("/")[0]).exists() for files in download.files() for file in files)
    ]


def looks_like(root: Path) -> str:
    """Return which images a folder seems to hold, and how to select them; "" if it holds none."""
    sets = held(root)
    return f"holds {sets[0]}: add --dataset {sets[0]}" if sets else tree.looks_like(root)


def read(name: str, root: Path, *, progress: bool, fetch: bool) -> Dataset:
    """Return a data set of `DOWNLOADS` whose files are in `root`, or are downloaded to it.

    Without `fetch`, nothing is downloaded or written to `root`. Raises `InputError`, whose one line
    says which file is missing or damaged and how to correct that.
    """
    download = DOWNLOADS[name]
    archives, unpacked = download.files()
    splits = []
    try:
        with _quiet(progress), _unpacked_elsewhere(archives, unpacked, root) as place:
            for train in (True, False):
                # If `place` is not `root`, all archives exist: torchvision must be allowed to
                # unpack them into the temporary folder, and downloads nothing.
                images, labels, names = download.parse(place, train, fetch or place != root)
                images = torch.from_numpy(np.ascontiguousarray(images))
                splits.append(Split(images, torch.as_tensor(labels).long()))
        train_split, test_split = splits
        return Dataset(name, tuple(names), train_split, test_split, download.flip)
    # Networks, archives and parsers raise errors of too many types to list here.
    except Exception as error:
        if not fetch:
            raise InputError(
                f"{name} is incomplete in {root}, the folder that the run names: give the folder "
                f"that holds it, or a folder to download it to, with --data-dir"
            ) from error
        raise InputError(_explain(name, root, archives, unpacked, error)) from error


@contextlib.contextmanager
def _unpacked_elsewhere(
    archives: dict[str, str], unpacked: dict[str, str], root: Path
) -> Iterator[Path]:
    """Yield the folder to read from: `root`, or a temporary folder with links to the archives.

    torchvision unpacks archives into the folder that holds them. The temporary folder is for a
    `root` that holds only the archives and is read-only.
    """
    whole = all((root / file).exists() for file in unpacked)
    places = {(root / file).parent for file in archives}
    writable = all(os.access(place, os.W_OK | os.X_OK) for place in places)
    if whole or writable or not archives or not all((root / file).exists() for file in archives):
        yield root
        return
    with tempfile.TemporaryDirectory(prefix="fastiat-") as place:
        for file in archives:
            link = Path(place, file)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((root / file).absolute())
        yield Path(place)


def _explain(
    name: str, root: Path, archives: dict[str, str], unpacked: dict[str, str], error: Exception
) -> str:
    """Return one line that says which file caused the error, and how to correct that."""
    from torchvision.datasets.mnist import (  # type: ignore[import-untyped]
        read_sn3_pascalvincent_tensor,
    )
    from torchvision.datasets.utils import check_integrity

    reason = " ".join(str(error).split()) or type(error).__name__
    absent = [file for file in unpacked if not (root / file).exists()]
    # If all unpacked files exist, the archives were not read, so they cannot be the cause.
    for file, md5 in (archives | unpacked if absent else unpacked).items():
        if md5 and (root / file).exists() and not check_integrity(root / file, md5):
            return (
                f"{root / file} is damaged (wrong checksum) and could not be downloaded again "
                f"({reason}): put the original file in its place"
            )
    if absent:
        looks = looks_like(root)
        there = next(place for place in (root, *root.absolute().parents) if place.exists())
        if looks and name not in held(root):
            hint = f"; {root} {looks}"
        elif not os.access(there, os.W_OK | os.X_OK):
            hint = "; or name a folder that can be written to with --data-dir or FASTIAT_DATA"
        else:
            hint = ""
        files = [root / file for file in archives or unpacked]
        return (
            f"{name} is not in {root} and could not be downloaded ({reason}): "
            f"put {', '.join(file.name for file in files)} into {files[0].parent}{hint}"
        )
    for file, md5 in unpacked.items():
        # Only the .gz archives of Fashion-MNIST have a checksum, so parse the unpacked idx files.
        if not md5:
            try:
                read_sn3_pascalvincent_tensor(os.fspath(root / file))
            except Exception:
                return f"{root / file} is damaged: delete it and run again"
    return f"{name} in {root} cannot be read ({reason}): delete its files there and run again"


@contextlib.contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """Silence torchvision and set a timeout for downloads; `progress` keeps its progress bars."""
    timeout = socket.getdefaulttimeout()
    with contextlib.ExitStack() as stack:
        if not progress:
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        # Newer versions of NumPy warn about the pickles of CIFAR-10.
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        stack.callback(socket.setdefaulttimeout, timeout)
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
        yield
