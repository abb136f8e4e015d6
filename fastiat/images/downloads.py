"""The data sets that torchvision downloads, checks and parses."""

import contextlib
import io
import os
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastiat.images import tree as folder
from fastiat.system.errors import InputError

T = TypeVar("T")

DOWNLOAD_TIMEOUT = 10.0  # seconds without a byte before a download counts as failed


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


SOURCES: dict[str, Callable[[Path], _Source]] = {
    "cifar10": _cifar10,
    "svhn": _svhn,
    "fashion-mnist": _fashion_mnist,
}
"""What reads each data set from a folder."""
MARKS = {
    "cifar10": ("cifar-10-python.tar.gz", "cifar-10-batches-py"),
    "svhn": ("train_32x32.mat", "test_32x32.mat"),
    "fashion-mnist": ("FashionMNIST",),
}
"""What shows that a folder holds a data set."""


def held(root: Path) -> list[str]:
    """Return the data sets of which there is something in a folder."""
    return [name for name, files in MARKS.items() if any((root / f).exists() for f in files)]


def looks_like(root: Path) -> str:
    """Say what images a folder holds, and how to name them; "" where it looks like none."""
    sets = held(root)
    return f"holds {sets[0]}: add --dataset {sets[0]}" if sets else folder.looks_like(root)


def read(
    name: str,
    root: Path,
    build: Callable[[list[tuple[Any, Any]], Sequence[str]], T],
    *,
    progress: bool,
    fetch: bool,
) -> T:
    """Return what `build` makes of a data set's training and test split and its class names.

    name: "cifar10", "svhn" or "fashion-mnist".
    root: the folder where its files are, or with `fetch` are downloaded to.
    build: takes [(images (N, H, W, C) uint8, labels (N,)), ...] and the names.

    Raises `InputError` in one line that says which file is missing or damaged, for what `build`
    raises too, and what mends it.
    """
    source = SOURCES[name](root)
    splits = []
    try:
        with _quiet(progress), _unpacked_elsewhere(source, root) as place:
            if place != root:
                source, fetch = SOURCES[name](place), True  # from the archive, which is there
            for train in (True, False):
                images, labels, names = source.parse(train, fetch)
                splits.append((images, labels))
        return build(splits, names)
    # Networks, archives and parsers fail in too many ways to list; the cause stays chained.
    except Exception as error:
        source = SOURCES[name](root)
        if not fetch:
            raise InputError(
                f"{name} is not whole in {root}, which the run names: name with --data-dir where "
                f"it is, or may be downloaded to"
            ) from error
        raise InputError(_explain(name, root, source, error)) from error


@contextlib.contextmanager
def _unpacked_elsewhere(source: _Source, root: Path) -> Iterator[Path]:
    """Give the folder to read from: `root`, or one in its place for as long as the block runs.

    That is where `root` has the archives alone and cannot be written to: they are unpacked in a
    temporary folder.
    """
    archives = [file for file in source.checksums if file not in source.needed]
    whole = all((root / file).exists() for file in source.needed)
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
        looks = looks_like(root)
        there = next(place for place in (root, *root.absolute().parents) if place.exists())
        if looks and name not in held(root):
            hint = f"; {root} {looks}"
        elif not os.access(there, os.W_OK | os.X_OK):
            hint = "; or name a folder that can be written to with --data-dir or FASTIAT_DATA"
        else:
            hint = ""
        return (
            f"{name} is not in {root} and could not be downloaded ({reason}): "
            f"put {source.by_hand}{hint}"
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
