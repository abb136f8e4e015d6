"""Convert data sets, and image trees of any mixture of sizes, to .beton files.

Every image of a file is a square of one side. A tree of squares of one size keeps that size.
Otherwise the side is 224 pixels, or the side of the largest square that any image holds if that is
less, and the centre square of each image is resized to it. `max_side` replaces the 224, also for a
tree of one size. At most a few hundred images of a tree are in memory at a time.
"""

import fcntl
import functools
import hashlib
import io
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fastiat import __version__
from fastiat.images import beton, beton_writer, pixels, tree
from fastiat.images.dataset import Dataset, Split, stored
from fastiat.system.errors import InputError
from fastiat.system.settings import SMALLEST_SIDE
from fastiat.system.signals import Signals

RESIZED = "-resized"
"""Added to the digest of a source whose images were resized because their sizes differ."""
USUAL_SIDE = 224
"""Side of the images of a tree of mixed sizes: the usual input size for photographs."""
AHEAD = 64
"""Largest number of images in one task of a worker process."""

log = logging.getLogger(__name__)


@contextmanager
def stoppable() -> Iterator[None]:
    """End the block with `SignalInterrupt` when SIGINT or SIGTERM arrives, so that the code that
    writes a file can delete the unfinished one.
    """
    with Signals() as signals, signals.at_once():
        yield


@dataclass(frozen=True)
class Sizes:
    """The sizes and colours of all images."""

    widest: int
    """The largest shorter side."""
    grey: bool
    mixed: str = ""
    """Why the images cannot stay as they are; "" if all are squares of one size."""


@dataclass(frozen=True)
class Encoder:
    """Turns an image into the bytes that are stored: RGB pixels, or a JPEG of a quality."""

    side: int
    quality: int | None

    def __call__(self, pixels: NDArray[np.uint8]) -> bytes:
        """Resize the centre square of an image, (H, W), (H, W, 1) or (H, W, 3), and encode it.

        Pillow widens the Lanczos filter when it shrinks an image, so there is no aliasing. An
        image that has the right size already is not resampled.
        """
        size = self.side, self.side
        if pixels.ndim == 3 and pixels.shape[2] == 1:
            pixels = pixels[..., 0]
        if pixels.shape[:2] != size:
            image = Image.fromarray(pixels)
            pixels = np.asarray(ImageOps.fit(image, size, Image.Resampling.LANCZOS))
        if pixels.ndim == 2:
            pixels = np.repeat(pixels[..., None], 3, 2)
        if self.quality is None:
            return pixels.tobytes()
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=self.quality)
        return buffer.getvalue()


@dataclass(frozen=True)
class Source:
    """Images to convert, training images first."""

    name: str
    classes: tuple[str, ...]
    flip: bool
    labels: NDArray[np.int64]
    n_train: int
    digest: str
    """Identifies the images: a digest of a tree's listing, or a data set's fingerprint."""
    cache_name: str
    """Name of its file in the cache, without the extension."""
    sizes: Callable[[], Sizes]
    """Reads the size of every image."""
    blobs: Callable[[Encoder], AbstractContextManager[Iterable[bytes]]]
    """Yields the encoded images, in the order of `labels`."""


def tree_source(root: Path) -> Source:
    """Return the image tree at `root` as a source; worker processes decode its images."""
    listing = tree.scan(root.absolute())
    tree.warn_ignored(listing)

    def sizes() -> Sizes:
        with pixels.quiet(), pixels.opened(listing.paths[0], head_only=True) as image:
            work = functools.partial(_sizes_of, first=listing.paths[0], size=image.size)
        with pixels.quiet(), tree.mapped(work, listing.paths) as results:
            parts = list(results)
        mixed = next((part.mixed for part in parts if part.mixed), "")
        return Sizes(max(p.widest for p in parts), all(p.grey for p in parts), mixed)

    @contextmanager
    def blobs(encoder: Encoder) -> Iterator[Iterable[bytes]]:
        work = functools.partial(_blobs_of, encoder=encoder)
        count = _images_per_task(encoder.side)
        with pixels.quiet(), tree.mapped(work, listing.paths, count) as results:
            yield itertools.chain.from_iterable(results)

    return Source(
        "folder", listing.classes, True, listing.labels, listing.n_train, listing.digest,
        hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16], sizes, blobs,
    )  # fmt: skip


def dataset_source(dataset: Dataset) -> Source:
    """Return a data set that is loaded as a source."""
    splits = dataset.train, dataset.test
    channels, height, width = dataset.train.shape

    def blobs(encoder: Encoder) -> AbstractContextManager[Iterable[bytes]]:
        # A few images at a time, because those of a .beton are read from the file.
        parts = (
            split.take(index).images.numpy()
            for split in splits
            for index in torch.arange(len(split)).split(_images_per_task(min(height, width)))
        )
        return nullcontext(encoder(image) for images in parts for image in images)

    sizes = Sizes(min(height, width), channels == 1, "not square" * (height != width))
    labels = torch.cat([split.labels for split in splits]).numpy()
    fingerprint = dataset.fingerprint()
    return Source(
        dataset.name, dataset.classes, dataset.flip, labels, len(dataset.train), fingerprint,
        f"{dataset.name}-{fingerprint}", lambda: sizes, blobs,
    )  # fmt: skip


@stoppable()
def write_beton(
    out: Path, source: Source, form: beton.Format, quality: int, max_side: int | None,
    *, resize: bool = True, progress: bool = True,
) -> beton.Card:  # fmt: skip
    """Write a source to the .beton `out` and return its card.

    Raises `InputError` for an image that cannot be read, for images that are too large and,
    without `resize`, for images that are not all squares of one size.
    """
    sizes = source.sizes()
    side = _side(sizes, max_side, resize)
    name = source.name
    if name != "folder":  # results must not pass for those of the original images
        name += f"-{side}" * (side != sizes.widest) + "-jpeg" * (form == "jpeg")
    with source.blobs(Encoder(side, quality if form == "jpeg" else None)) as blobs:
        return beton_writer.write(
            out, source.labels, blobs, progress=progress,
            name=name, classes=source.classes, flip=source.flip, channels=1 if sizes.grey else 3,
            side=side, n_train=source.n_train, format=form, quality=quality,
            source=source.digest + RESIZED * bool(sizes.mixed), fastiat=__version__,
        )  # fmt: skip


def decoded(source: Source) -> Dataset:
    """Return a source's images in memory, without a file; they must be squares of one size."""
    sizes = source.sizes()
    side, channels = _side(sizes, None, resize=False), 1 if sizes.grey else 3
    images = np.empty((len(source.labels), side, side, channels), np.uint8)
    with source.blobs(Encoder(side, None)) as blobs:
        for image, blob in zip(images, blobs, strict=True):
            image[:] = np.frombuffer(blob, np.uint8).reshape(side, side, 3)[..., :channels]
    labels, n = torch.from_numpy(source.labels), source.n_train
    train, test = (
        Split(torch.from_numpy(images[part]), labels[part]) for part in (slice(n), slice(n, None))
    )
    return Dataset(source.name, source.classes, train, test, source.flip)


def _side(sizes: Sizes, max_side: int | None, resize: bool) -> int:
    """Return the side that all images get."""
    if sizes.mixed and not resize:
        raise InputError(f"{sizes.mixed}, or let fastiat convert resize them")
    side = min(max_side or (USUAL_SIDE if sizes.mixed else sizes.widest), sizes.widest)
    if side > beton.LARGEST_SIDE:
        raise InputError(
            f"the images have {side}x{side} pixels: let fastiat convert resize them with "
            f"--max-side {beton.LARGEST_SIDE} or less"
        )
    return side


def cached(source: Source, *, resize: bool = True, progress: bool = True) -> Dataset:
    """Return a source as a raw .beton of the cache, written if it is missing, old or damaged.

    Of several processes one writes it. Raises `tree.NoFolder` where that is not possible, and what
    `write_beton` raises.
    """
    folder = tree.cache_folder("betons", "FASTIAT_CACHE", "converted images with FASTIAT_CACHE")
    file = folder / f"{source.cache_name}.beton"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(file.with_suffix(".lock"), "w")  # noqa: SIM115
    except OSError as error:
        if _holds(file, source, resize):  # a cache that is shared, and read-only
            return stored(file)
        raise tree.NoFolder(
            f"{folder} cannot be written to ({error.strerror}): "
            "name another folder for converted images with FASTIAT_CACHE"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _holds(file, source, resize):
            write_beton(file, source, "raw", 0, None, resize=resize, progress=progress)
    return stored(file)


def _holds(file: Path, source: Source, resize: bool) -> bool:
    """Whether a file of the cache is whole and was made from these images."""
    if not file.exists():
        return False
    try:
        made_from = beton.open_beton(file).card.source
    except InputError as error:
        reason, _, _ = str(error).rpartition(": ")  # without the advice to convert it again
        log.warning("the cache %s: it is written again", reason)
        return False
    return made_from == source.digest or (resize and made_from == source.digest + RESIZED)


def _images_per_task(side: int) -> int:
    """Return how many images a task has: as many as `beton.CHUNK` holds, but at least one."""
    return max(1, min(AHEAD, beton.CHUNK // (3 * side**2)))


def _sizes_of(paths: list[str], first: str, size: tuple[int, int]) -> Sizes:
    """Return the sizes of the images at `paths`; `size` is that of the tree's `first` image."""
    widest, grey, mixed = 0, True, ""
    for path in paths:
        with pixels.opened(path, head_only=True) as image:
            width, height = image.size
            is_size = f"{path} is {width}x{height} pixels"
            if min(width, height) < SMALLEST_SIDE:
                raise InputError(f"{is_size}: {SMALLEST_SIDE}x{SMALLEST_SIDE} is the smallest size")
            if width != height:
                mixed = mixed or f"{is_size}: make every image square"
            elif image.size != size:
                mixed = mixed or (
                    f"{is_size} but {first} is {size[0]}x{size[1]}: bring all images to one size"
                )
            widest = max(widest, min(width, height))
            grey &= pixels.is_grey(image)
    return Sizes(widest, grey, mixed)


def _blobs_of(paths: list[str], encoder: Encoder) -> list[bytes]:
    blobs = []
    for path in paths:
        with pixels.opened(path) as image:
            blobs.append(encoder(pixels.pixels_of(image, path)))
    return blobs
