"""Images: the data sets as a `Dataset` of two `Split`s, in memory or in a file, and a hold-out."""

import importlib.resources
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastiat.config import TrainConfig
from fastiat.engine.device import free_memory, own_defaults
from fastiat.images import beton, downloads
from fastiat.images import tree as folder
from fastiat.images.dataset import Dataset, Split, StoredSplit, draw, holdout, limited
from fastiat.images.ffcv import installed, obstacle
from fastiat.kernels import crop_flip
from fastiat.system.errors import InputError, one_line
from fastiat.system.ranks import ranks
from fastiat.system.settings import DATASETS, expanded, is_beton
from fastiat.system.untrusted import read_npz

__all__ = [
    "Dataset",
    "Loader",
    "Loaders",
    "ResidentLoader",
    "Shard",
    "Split",
    "StoredSplit",
    "choose_loader",
    "converted",
    "draw",
    "holdout",
    "limited",
    "load",
    "make_loader",
    "open_loaders",
]


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


def choose_loader(
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


def make_loader(
    split: Split, batch_size: int, *, kind: Kind | None = None, **options: Any
) -> Loader:
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


def converted(
    dataset: Dataset, wanted: Literal["auto", "resident", "ffcv"], device: torch.device
) -> tuple[Dataset, Kind]:
    """Return the data set and its loader; convert it into the cache where FFCV is to read it.

    All ranks of a job must call this together: they take the same loader.
    """
    kind, _ = choose_loader(wanted, dataset, device)
    # Ranks may find different amounts of free memory: if one needs FFCV, all of them use it.
    if ranks().all_reduce_max(kind == "ffcv")[0]:
        kind = "ffcv"
    if kind == "ffcv" and not dataset.stored:
        from fastiat.images import convert

        with ranks().local_rank_first():
            dataset = convert.cached_dataset(dataset)
    return dataset, kind


class Loaders(NamedTuple):
    """The batches of a training, and the fingerprint of the data set that they come from."""

    train: Loader
    test: Loader
    holdout: Loader | None
    fingerprint: str


EVAL_BATCH = 500
"""Images evaluated at a time during a training, or as many as an update takes if that is less."""


def open_loaders(
    config: TrainConfig,
    dataset: Dataset,
    device: torch.device,
    *,
    order: torch.Generator,
    augment: torch.Generator,
) -> Loaders:
    """Open the loaders of a training; `order` and `augment` are as for `Loader`.

    The training images are limited (`--train-limit`, `--class-limit`) before some are held out.
    All ranks of a job must call this together. Raises `InputError` for settings that leave nothing
    to train on or that the ranks cannot share.
    """
    dataset, kind = converted(dataset, config.loader, device)
    train = limited(dataset.train, config.train_limit, config.class_limit, config.seed)
    test, held_out = dataset.test, None
    kept_out = min(1000, len(train) // 10) if config.holdout is None else config.holdout
    if kept_out >= len(train):
        raise InputError(f"--holdout {kept_out} leaves none of the {len(train)} training images")
    if kept_out:
        train, held_out = holdout(train, kept_out, config.seed)
    if config.eval_limit is not None and config.eval_limit < len(test):
        test = draw(test, config.eval_limit, config.seed)
    if config.pad >= min(train.shape[1:]):
        raise InputError(
            f"--pad {config.pad} can shift images of {train.shape[1]} pixels out of sight: "
            f"give less"
        )
    if config.batch_size > len(train):
        raise InputError(
            f"--batch-size {config.batch_size} is more than the {len(train)} training images"
        )
    shard = Shard(ranks().rank, ranks().count)
    if config.batch_size % shard.ranks:
        raise InputError(
            f"--batch-size {config.batch_size} cannot be shared equally by {shard.ranks} "
            f"processes: give a multiple of {shard.ranks}, or start another number of them"
        )
    # Memory for a rank's part of an update is needed anyway.
    at_a_time = max(min(EVAL_BATCH, config.batch_size // shard.ranks), 1)
    open_loader = partial(make_loader, kind=kind, device=device, shard=shard)
    return Loaders(
        open_loader(
            train,
            config.batch_size,
            train=True,
            pad=config.pad,
            flip=dataset.flip if config.flip is None else config.flip,
            order=order,
            augment=augment,
        ),
        open_loader(test, at_a_time, train=False),
        None if held_out is None else open_loader(held_out, at_a_time, train=False),
        dataset.fingerprint(),
    )
