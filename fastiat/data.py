"""The data stage: load a data set, make batches of its images, convert it to a .beton."""

import importlib.resources
import logging
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastiat.config import ConvertConfig, TrainConfig
from fastiat.engine.device import free_memory, own_defaults
from fastiat.images import beton, downloads, tree
from fastiat.images.convert import cached, dataset_source, decoded, tree_source, write_beton
from fastiat.images.dataset import (
    Dataset,
    Split,
    StoredSplit,
    draw,
    holdout,
    in_memory,
    limited,
    stored,
)
from fastiat.images.ffcv import installed, obstacle
from fastiat.images.ffcv_batches import FFCVBatches
from fastiat.kernels import crop_flip
from fastiat.system.errors import Damaged, InputError, one_line
from fastiat.system.ranks import ranks
from fastiat.system.settings import DATASETS, expanded, is_beton
from fastiat.system.untrusted import read_npz

__all__ = [
    "Dataset",
    "Loader",
    "Loaders",
    "Shard",
    "Split",
    "StoredSplit",
    "choose_loader",
    "convert",
    "draw",
    "holdout",
    "limited",
    "load",
    "make_loader",
    "open_loaders",
    "stored",
]


log = logging.getLogger(__name__)


def default_dir() -> Path:
    """Return where data sets are looked for and downloaded to when no folder is named."""
    return tree.cache_folder("data", "FASTIAT_DATA", "data sets with --data-dir or FASTIAT_DATA")


@own_defaults()
def load(
    name: str,
    data_dir: str | os.PathLike | None = None,
    *,
    progress: bool = True,
    loader: str = "resident",
    fetch: bool = True,
) -> Dataset:
    """Return the data set `name`: one of `DATASETS`, or the path of a .beton.

    `cifar10`, `svhn` (73,257 training images, no extra ones) and `fashion-mnist` are downloaded
    by torchvision, which compares checksums, into `data_dir`, else `$FASTIAT_DATA`, else
    `~/.cache/fastiat/data` (`$XDG_CACHE_HOME/fastiat/data`). `folder` is the image tree at
    `data_dir` (`fastiat.images.tree` says what it may hold). `digits` ships with the package:
    scikit-learn's 1,797 scans of 8x8 pixels, 0..16 scaled to 0..255, 1,437 of them to train on.
    Progress bars are shown if `progress` is set and stderr is a terminal.

    `data_dir` may also be a .beton that was made of the data set. For a .beton that was moved,
    `data_dir` is the folder that holds it now, or the file itself. The images of a .beton stay in
    the file. A tree is decoded into a .beton of the cache. With the `loader` "ffcv" its images may
    have any sizes, and stay in that file; with "auto" they stay there if FFCV is installed and they
    take more than half of the free memory; else they are read into memory.

    Without `fetch` nothing is downloaded or unpacked: a file that names a `data_dir`, such as the
    config.json of somebody else's run, must not choose where something is written.

    Raises `InputError` in one line for an unknown name, a folder that does not exist, files that
    can neither be found nor downloaded (it says where to put them) and a damaged file.
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
    root = tree.root_of(data_dir) if name == "folder" or data_dir is not None else default_dir()
    if name == "folder":
        if downloads.held(root) and not os.path.isdir(root / "train"):
            raise InputError(f"{root} is no image tree: it {downloads.looks_like(root)}")
        return _load_tree(root, loader, progress)
    bars = progress and sys.stderr.isatty()
    return downloads.read(name, root, progress=bars, fetch=fetch)


def _load_tree(root: Path, loader: str, progress: bool) -> Dataset:
    """Return an image tree, decoded once into a .beton of the cache.

    The images stay in that file for the `loader` "ffcv", and for "auto" where FFCV is installed
    and they take more than half of the free memory.
    """
    source = tree_source(root)
    options = {"resize": loader == "ffcv", "progress": progress}
    try:
        dataset = cached(source, **options)
    except (tree.NoFolder, OSError) as error:  # `OSError`: the disk is full
        if loader == "ffcv":
            raise
        log.warning("no cache of the images (%s): the next run decodes them again", error)
        return decoded(source)
    too_large = not fits(dataset.nbytes, torch.device("cpu"))
    if loader == "ffcv" or (loader == "auto" and too_large and installed()):
        return dataset
    try:
        return in_memory(dataset)
    except Damaged as error:
        log.warning("the cache %s: it is written again", error)
        assert isinstance(dataset.train, StoredSplit)
        with suppress(OSError):  # a cache that is shared, and read-only
            dataset.train.file.path.unlink()
        return in_memory(cached(source, **options))


def _moved(name: str, data_dir: str) -> str:
    """Return where the .beton `name` is now: in the folder `data_dir`, or at that path."""
    if not os.path.isdir(data_dir):
        return data_dir if is_beton(data_dir) else str(tree.root_of(data_dir) / Path(name).name)
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
    """Raise `InputError`, saying what it holds, for a data folder with other images than `name`'s.

    If the data set was `chosen`, only an image tree is refused, because several data sets may be
    downloaded to one folder. The default data set is not downloaded beside any other images.
    """
    root = Path(expanded(data_dir))
    if not os.path.isdir(root) or name in downloads.held(root) or name == "folder":
        return
    is_tree = all(os.path.isdir(root / split) for split in tree.SPLITS)
    looks = downloads.looks_like(root) if is_tree or not chosen else ""
    if looks:
        raise InputError(f"--data-dir {root} {looks} (the data set asked for is {name})")


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
    # What zipfile, NumPy and torch raise for a damaged file is of any kind.
    except Exception as error:
        raise InputError(
            f"{source} is damaged ({one_line(error)[:100]}): install fastiat again"
        ) from error


@own_defaults()
def convert(config: ConvertConfig) -> beton.Card:
    """Write the .beton that `config` asks for, print what it holds, and return its card.

    Raises `InputError` for images that cannot be read and where OUT cannot be written.
    """
    config.check()
    out = Path(config.out).absolute()
    if os.path.lexists(out) and not config.force:
        raise InputError(f"{out} is there already: choose another name, or replace it with --force")
    if not out.parent.is_dir():
        raise InputError(f"the folder {out.parent} does not exist: create it, or choose another")
    if out.is_dir():
        raise InputError(f"{out} is a folder: name a file in it")
    named = config.dataset in DATASETS
    if config.data_dir is not None and not named:
        raise InputError(
            f"--data-dir is where a data set of a name is: leave it out with {config.dataset}"
        )
    if (named and config.dataset != "folder") or is_beton(config.dataset):
        source = dataset_source(load(config.dataset, config.data_dir))
    else:
        source = tree_source(tree.root_of(config.data_dir if named else config.dataset))
    card = write_beton(out, source, config.format, config.quality, config.max_side)
    print(
        f"{out}: {card.n_train} training and {len(source.labels) - card.n_train} test images of "
        f"{card.side}x{card.side} pixels in {len(card.classes)} classes, {card.format}, "
        f"{out.stat().st_size / 2**20:,.1f} MiB; train on it with --dataset {shlex.quote(str(out))}"
    )
    return card


Kind = Literal["resident", "ffcv"]


class Shard(NamedTuple):
    """The part of every pass that this process takes: number `rank` of `ranks` equal parts."""

    rank: int
    ranks: int

    def gaps(self) -> Iterator[int]:
        """Yield, for each batch of this rank, the number of batches of other ranks since its
        previous one.
        """
        return chain((self.rank,), repeat(self.ranks - 1))


WHOLE = Shard(0, 1)


class ResidentBatches:
    """Batches of a split that is copied to the device's memory."""

    def __init__(self, split: Split, device: torch.device) -> None:
        self.images = split.images.to(device)

    def slices(self, spans: list[slice]) -> Iterator[Tensor]:
        """Yield views, (B, H, W, C), of the images at each span of positions."""
        return (self.images[span] for span in spans)

    def picked(self, batches: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield for each row of `batches`, (batches, B), a store of images, (M, H, W, C), and the
        positions of the row's images in that store, (B,).
        """
        return ((self.images, index) for index in batches.to(self.images.device))


class Loader:
    """Passes over labelled uint8 images, from memory of the device or, with FFCV, from a .beton.

    Iterating yields (x, y): x (B, C, H, W) uint8 and channels-last, y (B,) int64, both on
    `device`. With `train`, a pass is shuffled and its partial last batch is dropped. Every image is
    shifted by up to `pad` pixels in each direction, filled with zeros, and with `flip` mirrored
    with probability 0.5 (section 4.1 of the IAT paper, after Madry et al. 2018). Without `train`,
    images come in their order and unchanged, and the last batch may be smaller; do not write to
    those x.

    `order`, a CPU generator, draws the permutation of each pass; `augment`, a generator on
    `device`, draws the shifts and flips of each batch; None means torch's default generators. Both
    kinds draw the same numbers, so the same seeds give the same batches. No batch waits for the
    device.

    With a `shard`, training takes the rank's slice of every batch of `batch_size` images. The
    slices of all ranks, if their generators are equal, form the batch that one process would
    see. Without `train`, the loader takes every `ranks`-th batch, beginning with number `rank`.

    `kind` says where the images are: "resident" moves the split to the device (154 MB for
    CIFAR-10); "ffcv" reads a `StoredSplit` from its .beton while the training runs.

    Raises `InputError` where no full training batch exists or the ranks cannot share one equally.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        kind: Kind = "resident",
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
        self.kind = kind
        source = FFCVBatches if kind == "ffcv" else ResidentBatches
        self.source: FFCVBatches | ResidentBatches = source(split, self.device)

    def __len__(self) -> int:
        """Number of batches in a pass; without `train`, in this shard's part of it."""
        full, rest = divmod(len(self.labels), self.batch_size)
        if self.train:
            return full
        return len(range(self.shard.rank, full + (rest > 0), self.shard.ranks))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.epoch()

    def epoch(self, skip: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Return one pass that starts at batch `skip`.

        This call draws from `order`; each batch draws from `augment` when it is made. To repeat
        the rest of a pass exactly, set `order` to its state at the start of that pass and `augment`
        to its state after `skip` batches.
        """
        if not self.train:
            return self._in_order(skip)
        order = torch.randperm(len(self.labels), generator=self.order)
        share = self.batch_size // self.shard.ranks
        own = slice(self.shard.rank * share, (self.shard.rank + 1) * share)
        batches = order[: len(self) * self.batch_size].view(len(self), self.batch_size)
        return self._augmented(batches[skip:, own], own)

    def _in_order(self, skip: int) -> Iterator[tuple[Tensor, Tensor]]:
        size, (rank, ranks) = self.batch_size, self.shard
        starts = range((rank + skip * ranks) * size, len(self.labels), ranks * size)
        spans = [slice(start, start + size) for start in starts]
        for span, images in zip(spans, self.source.slices(spans), strict=True):
            yield images.permute(0, 3, 1, 2), self.labels[span]

    def _augmented(self, batches: Tensor, own: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of the images at `batches`, (batches, B) positions in the split on the CPU.

        Every rank draws shifts and flips for the whole batch, and takes those of its `own` part.
        """
        size = self.batch_size
        none = torch.zeros(batches.shape[1], dtype=torch.bool, device=self.device)
        rows = self.labels[batches.to(self.device)]
        for labels, (store, index) in zip(rows, self.source.picked(batches), strict=True):
            dy, dx = self._draw(2 * self.pad + 1, (2, size))[:, own]
            flip = self._draw(2, (size,))[own].bool() if self.flip else none
            yield crop_flip(store, index, dy, dx, flip, self.pad), labels

    def _draw(self, high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(high, shape, generator=self.augment, device=self.device)


def choose_loader(
    wanted: Literal["auto", "resident", "ffcv"], dataset: Dataset, device: torch.device
) -> tuple[Kind, str]:
    """Return the kind of loader for a data set, and the reason.

    If FFCV is installed, "auto" chooses "ffcv" for a .beton and for images that take more than half
    of the device's free memory. Raises `InputError` for "ffcv" if FFCV cannot be used.
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


def convert_if_needed(
    dataset: Dataset, wanted: Literal["auto", "resident", "ffcv"], device: torch.device
) -> tuple[Dataset, Kind, str]:
    """Return the data set, its kind of loader, and the reason for that kind.

    For "ffcv" the data set is one in a .beton, of the cache if it was in memory.

    All ranks of a job must call this together. Raises `InputError` as `choose_loader` does, and
    where the cache cannot be written.
    """
    kind, reason = choose_loader(wanted, dataset, device)
    # If one rank streams from the .beton, all do: their free memory may differ.
    if ranks().all_reduce_max(kind == "ffcv")[0]:
        kind = "ffcv"
    if kind == "ffcv" and not dataset.stored:
        with ranks().local_rank_first():
            dataset = cached(dataset_source(dataset))
    return dataset, kind, reason


def fits(nbytes: int, device: torch.device, *, in_memory: bool = False) -> bool:
    """Whether images take at most half of the device's free memory, or are in it already."""
    if in_memory and device.type == "cpu":
        return True
    return nbytes <= free_memory(device) // 2


def make_loader(
    split: Split, batch_size: int, *, kind: Kind | None = None, **options: Any
) -> Loader:
    """Return a `Loader`. If `kind` is None, it is "resident" for all that fits.

    So commands that measure, which use every image only a few times, need FFCV only for a .beton
    that takes more than half of the device's free memory.
    """
    if kind is None:
        device = torch.device(options.get("device", "cpu"))
        small = not isinstance(split, StoredSplit) or fits(split.nbytes, device)
        kind = "resident" if small or not installed() else "ffcv"
    return Loader(split, batch_size, kind=kind, **options)


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
    dataset, kind, _ = convert_if_needed(dataset, config.loader, device)
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
