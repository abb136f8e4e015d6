"""The data stage: load a data set, make batches of its images, convert a data set to a .beton."""

import shlex
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastiat.config import ConvertConfig, TrainConfig
from fastiat.engine.device import own_defaults
from fastiat.images import beton, resized_crop, tree
from fastiat.images.convert import cached, dataset_source, tree_source, write_beton
from fastiat.images.dataset import (
    Dataset,
    Split,
    StoredSplit,
    centred,
    draw,
    fingerprint_of,
    holdout,
    limited,
    resized,
    stored,
)
from fastiat.images.extra import ExtraImages, load_extra
from fastiat.images.ffcv import installed, obstacle
from fastiat.images.ffcv_batches import FFCVBatches
from fastiat.images.load import check_folder, default_dir, fits, load
from fastiat.kernels import crop_flip
from fastiat.system.errors import InputError
from fastiat.system.files import check_new
from fastiat.system.ranks import ranks
from fastiat.system.settings import DATASETS, IN_PYTHON, is_beton

__all__ = [
    "IN_PYTHON",
    "Dataset",
    "Loader",
    "Loaders",
    "Shard",
    "Split",
    "StoredSplit",
    "check_folder",
    "choose_loader",
    "convert",
    "default_dir",
    "draw",
    "fits",
    "holdout",
    "limited",
    "load",
    "make_loader",
    "open_loaders",
    "resized",
    "stored",
]


@own_defaults()
def convert(config: ConvertConfig) -> beton.Card:
    """Write the .beton that `config` describes, print a summary of it, and return its card.

    Raises `InputError` for images that cannot be read and for an OUT that cannot be written.
    """
    config.check()
    out = Path(config.out).absolute()
    check_new(out, config.force)
    named = config.dataset in DATASETS
    if config.data_dir is not None and not named:
        raise InputError(f"--data-dir is for data sets by name: leave it out with {config.dataset}")
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
"""Kind of a loader, see `Loader`."""
Wanted = Literal["auto", "resident", "ffcv"]
"""Kind of a loader that a user asks for, see `choose_loader`."""


class Shard(NamedTuple):
    """The part of every pass that one rank reads: number `rank` of `ranks` equal parts."""

    rank: int
    ranks: int

    def gaps(self) -> Iterator[int]:
        """Yield, for each batch of this rank, the number of batches of other ranks since its
        previous one.
        """
        return chain((self.rank,), repeat(self.ranks - 1))


WHOLE = Shard(0, 1)


class ResidentBatches:
    """Batches of a split whose images are all copied to the device's memory at the start."""

    def __init__(self, split: Split, device: torch.device) -> None:
        self.images = split.images.to(device)

    def slices(self, spans: list[slice]) -> Iterator[Tensor]:
        """Yield a view, (B, H, W, C) uint8, of the images at each span of positions."""
        return (self.images[span] for span in spans)

    def picked(self, batches: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images (M, H, W, C) uint8, indices (B,) into them) for each row of `batches`.

        `batches` is (batches, B) int64, positions in the split.
        """
        return ((self.images, index) for index in batches.to(self.images.device))


class Part(NamedTuple):
    """The part of every batch of a pass that comes from one set of images."""

    source: FFCVBatches | ResidentBatches | ExtraImages
    labels: Tensor
    """The labels of the set, (N,) int64, on the device."""
    batches: Tensor
    """Positions in the set, (batches, B) int64, on the CPU."""
    places: slice
    """The places of these images in the batch of all ranks."""


class Loader:
    """Passes over labelled uint8 images, from memory of the device or, with FFCV, from a .beton.

    Iterating yields (x, y): x (B, C, H, W) uint8 and channels-last, y (B,) int64, both on
    `device`. Making a batch does not wait for the device. With `train`, a pass is shuffled and
    drops its partial last batch. Without it, images are unchanged and in the order of the split,
    and the last batch may be smaller; x may be a view of the split, so do not write to it.

    kind: "resident" copies the split to the device (154 MB for CIFAR-10); "ffcv" reads a
        `StoredSplit` from its .beton during the training. Equal seeds give equal batches.
    pad, flip: every training image is shifted by up to `pad` pixels in each direction, filled with
        zeros, and, with `flip`, mirrored with probability 0.5 (section 4.1 of the IAT paper, after
        Madry et al. 2018).
    crop: side in pixels; a training image is then a part of 25 to 100 % of the area of the image in
        the split, resized to that side (`fastiat.images.resized_crop`), instead of a shifted image.
    order, augment: a CPU generator for the permutation of each pass, and one on `device` for the
        augmentation of each batch. None means torch's default generators.
    shard: with `train`, this rank's slice of every batch; if the generators of all ranks have equal
        states, the slices form the batch of a single process. Otherwise every `ranks`-th batch,
        from number `rank` on.
    extra: a training batch is `batch_size - extra.share` images of the split, of which a pass uses
        each once, followed by `extra.share` further images, which are in the device's memory.

    Raises `InputError` for a `batch_size` below 1, a negative `pad`, fewer training images than a
    batch takes, and parts of a training batch that are not multiples of the number of ranks.
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
        crop: int | None = None,
        order: torch.Generator | None = None,
        augment: torch.Generator | None = None,
        shard: Shard = WHOLE,
        extra: ExtraImages | None = None,
    ) -> None:
        if batch_size < 1 or pad < 0:
            raise InputError(
                f"batch size {batch_size} with padding {pad}: give a batch size of 1 or more and a "
                f"padding of 0 or more"
            )
        self.share = batch_size - (extra.share if extra else 0)
        """Images of the split in a training batch."""
        if train and self.share > len(split):
            raise InputError(
                f"--batch-size {batch_size} takes {self.share} training images, more than the "
                f"{len(split)} that there are: give less"
            )
        if train and (batch_size % shard.ranks or self.share % shard.ranks):
            raise InputError(
                f"--batch-size {batch_size} cannot be shared equally by {shard.ranks} processes: "
                f"give a multiple of {shard.ranks}, or start another number of them"
            )
        self.labels = split.labels.to(device)
        self.device = self.labels.device
        self.batch_size, self.train, self.pad, self.flip = batch_size, train, pad, flip
        self.crop, self.order, self.augment, self.shard = crop, order, augment, shard
        self.extra, self.passes = extra, 0
        self.kind = kind
        source = FFCVBatches if kind == "ffcv" else ResidentBatches
        self.source: FFCVBatches | ResidentBatches = source(split, self.device)

    def __len__(self) -> int:
        """Number of batches that a pass yields on this rank."""
        if self.train:
            return len(self.labels) // self.share
        full, rest = divmod(len(self.labels), self.batch_size)
        return len(range(self.shard.rank, full + (rest > 0), self.shard.ranks))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.epoch()

    def epoch(self, skip: int = 0, number: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Return one pass without its first `skip` batches.

        number: passes before this one, which decide which images of `extra` it takes; None counts
            the passes that this loader has begun.

        This call draws from `order`; each batch draws from `augment` when it is made. To repeat
        the rest of a pass exactly, set `order` to its state before that pass and `augment` to its
        state after `skip` batches.
        """
        if not self.train:
            return self._in_order(skip)
        order = torch.randperm(len(self.labels), generator=self.order)
        batches = order[: len(self) * self.share].view(len(self), self.share)
        own = self._own_part(0, self.share)
        parts = [Part(self.source, self.labels, batches[skip:, own], own)]
        number = self.passes if number is None else number
        self.passes = number + 1
        if self.extra is not None:
            batches = self.extra.batches(number * len(self), len(self))
            own = self._own_part(0, self.extra.share)
            place = self._own_part(self.share, self.extra.share)
            parts.append(Part(self.extra, self.extra.labels, batches[skip:, own], place))
        return self._augmented(parts)

    def _own_part(self, start: int, count: int) -> slice:
        """Return this rank's equal part of `count` places from `start` on."""
        share = count // self.shard.ranks
        return slice(start + self.shard.rank * share, start + (self.shard.rank + 1) * share)

    def _in_order(self, skip: int) -> Iterator[tuple[Tensor, Tensor]]:
        size, (rank, ranks) = self.batch_size, self.shard
        starts = range((rank + skip * ranks) * size, len(self.labels), ranks * size)
        spans = [slice(start, start + size) for start in starts]
        for span, images in zip(spans, self.source.slices(spans), strict=True):
            yield images.permute(0, 3, 1, 2), self.labels[span]

    def _augmented(self, parts: list[Part]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the augmented images of each batch, with their labels, one part after the other.

        Every rank draws shifts and flips for the whole batch and uses those of its own places, so
        that the number of ranks changes no draw.
        """
        labels = [part.labels[part.batches.to(self.device)] for part in parts]
        stores = [part.source.picked(part.batches) for part in parts]
        for y, picked in zip(zip(*labels, strict=True), zip(*stores, strict=True), strict=True):
            _, height, width, _ = picked[0][0].shape
            change = self._draw_change(height, width)
            x = [
                change(store, index, part.places)
                for part, (store, index) in zip(parts, picked, strict=True)
            ]
            yield (x[0], y[0]) if len(parts) == 1 else (torch.cat(x), torch.cat(y))

    def _draw_change(self, height: int, width: int) -> Callable[[Tensor, Tensor, slice], Tensor]:
        """Draw the augmentation of a batch of images of this shape.

        Returns a function of images (M, H, W, C), indices (N,) into them, and the places of these N
        images in the batch, that returns them augmented.
        """
        size = self.batch_size
        if self.crop is not None:
            side = self.crop
            boxes = resized_crop.draw_boxes(size, height, width, self.augment, self.device)
            flip = self._draw_flips()
            return lambda store, index, own: resized_crop.crop(
                store, index, boxes[own], flip[own], side
            )
        dy, dx = self._draw(2 * self.pad + 1, (2, size))
        flip = self._draw_flips()
        return lambda store, index, own: crop_flip(
            store, index, dy[own], dx[own], flip[own], self.pad
        )

    def _draw_flips(self) -> Tensor:
        """Draw which images of a batch are mirrored, (batch_size,) bool."""
        if self.flip:
            return self._draw(2, (self.batch_size,)).bool()
        return torch.zeros(self.batch_size, dtype=torch.bool, device=self.device)

    def _draw(self, high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(high, shape, generator=self.augment, device=self.device)


def choose_loader(wanted: Wanted, dataset: Dataset, device: torch.device) -> Kind:
    """Return the kind of loader for a data set.

    If FFCV is installed, "auto" chooses "ffcv" for a .beton and for images that take more than half
    of the device's free memory; otherwise "resident". Raises `InputError` for "ffcv" if FFCV cannot
    be used.
    """
    if wanted == "ffcv" and (reason := obstacle()):
        raise InputError(f"--loader ffcv: {reason}")
    if wanted != "auto":
        return wanted
    streamed = dataset.stored or not fits(dataset.nbytes, device, in_memory=True)
    return "ffcv" if streamed and installed() else "resident"


def convert_if_needed(
    dataset: Dataset, wanted: Wanted, device: torch.device
) -> tuple[Dataset, Kind]:
    """Return the data set and the kind of its loader; for "ffcv" it is a .beton in the cache.

    All ranks of a job must call this function together. Raises the errors of `choose_loader`, and
    `InputError` if the cache cannot be written.
    """
    kind = choose_loader(wanted, dataset, device)
    # Free memory may differ between ranks. If any rank streams from the .beton, all do.
    if ranks().all_reduce_max(kind == "ffcv")[0]:
        kind = "ffcv"
    if kind == "ffcv" and not dataset.stored:
        with ranks().local_rank_first():
            dataset = cached(dataset_source(dataset))
    return dataset, kind


def make_loader(
    split: Split, batch_size: int, *, kind: Kind | None = None, **options: Any
) -> Loader:
    """Return a `Loader`; `options` are its other arguments.

    If `kind` is None, it is "ffcv" only for a .beton whose images take more than half of the
    device's free memory, and only if FFCV is installed. This is the choice of the commands that
    measure: they use every image only a few times.
    """
    if kind is None:
        device = torch.device(options.get("device", "cpu"))
        small = not isinstance(split, StoredSplit) or fits(split.nbytes, device)
        kind = "resident" if small or not installed() else "ffcv"
    return Loader(split, batch_size, kind=kind, **options)


class Loaders(NamedTuple):
    """The loaders of a training, and the fingerprint of their images.

    It is the fingerprint of the data set; with --extra, "+" and that of the further images follow.
    """

    train: Loader
    test: Loader
    holdout: Loader | None
    """Held-out training images; None if none are held out."""
    fingerprint: str


EVAL_BATCH = 500
"""Largest batch of a validation during a training; never larger than a rank's part of an update."""


def open_loaders(
    config: TrainConfig,
    dataset: Dataset,
    device: torch.device,
    *,
    order: torch.Generator,
    augment: torch.Generator,
) -> Loaders:
    """Open the loaders of a training; `order` and `augment` are as for `Loader`.

    The training images are limited (`--train-limit`, `--class-limit`) before `--holdout` takes its
    images from them. All ranks of a job must call this function together. Raises `InputError` if
    the settings leave no image to train on, if `--pad` is not less than the side of an image, for
    a share of `--extra` that leaves a rank without images of one kind or that the ranks cannot
    divide, and for the errors of `Loader` and `load_extra`.
    """
    dataset, kind = convert_if_needed(dataset, config.loader, device)
    side = dataset.test.shape[1]
    train = limited(dataset.train, config.train_limit, config.class_limit, config.seed)
    test, held_out, kept_out = dataset.test, None, config.holdout
    if kept_out is None or (kept_out == 0 and config.adv == "n-fgsm"):
        kept_out = min(1000, len(train) // 10)
    if kept_out >= len(train):
        raise InputError(
            f"--holdout {kept_out} leaves none of the {len(train)} training images: give less"
        )
    if kept_out:
        train, held_out = holdout(train, kept_out, config.seed)
        held_out = centred(held_out, side)
    if config.eval_limit is not None and config.eval_limit < len(test):
        test = draw(test, config.eval_limit, config.seed)
    shifts = config.augment == "crop"
    if shifts and config.pad >= side:
        raise InputError(
            f"--pad {config.pad} can shift all pixels out of an image of side {side}: give less"
        )
    shard = Shard(ranks().rank, ranks().count)
    share = _extra_share(config, shard.ranks)
    flip = config.flip
    if flip is None:
        flip = dataset.flip and config.augment != "none"
    extra, mark = None, dataset.fingerprint()
    if config.extra is not None:
        images = load_extra(config.extra, dataset, config.image_size)
        extra, mark = ExtraImages(images, share, device, order), f"{mark}+{fingerprint_of(images)}"
    # An update needs the memory for a rank's part anyway, so a validation batch of that size fits.
    at_a_time = max(min(EVAL_BATCH, config.batch_size // shard.ranks), 1)
    open_loader = partial(make_loader, kind=kind, device=device, shard=shard)
    return Loaders(
        open_loader(
            train,
            config.batch_size,
            train=True,
            pad=config.pad if shifts else 0,
            flip=flip,
            crop=side if config.augment == "resized-crop" else None,
            order=order,
            augment=augment,
            extra=extra,
        ),
        open_loader(test, at_a_time, train=False),
        None if held_out is None else open_loader(held_out, at_a_time, train=False),
        mark,
    )


def _extra_share(config: TrainConfig, count: int) -> int:
    """Return how many images of a batch of all `count` ranks come from `--extra`."""
    size = config.batch_size
    if config.extra is None:
        return 0
    share = round(config.extra_fraction * size)
    settings = f"--extra-fraction {config.extra_fraction:g} of --batch-size {size}"
    if not 0 < share < size:
        raise InputError(
            f"{settings} is {share} image{'s' * (share != 1)}: give values that leave at least 1 "
            f"image of --extra and 1 training image in a batch"
        )
    if share % count and size % count == 0:
        near = min(max(round(share / count), 1), size // count - 1) * count
        raise InputError(
            f"{settings} is {share} images of --extra and {size - share} training images, which "
            f"cannot be shared equally by {count} processes: give, say, "
            + (
                f"--extra-fraction {near}/{size}"
                if near
                else f"--batch-size {2 * size} --extra-fraction 0.5"
            )
        )
    return share
