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
import signal
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
from fastiat.images.dataset import Dataset, stored
from fastiat.system.errors import InputError
from fastiat.system.settings import SMALLEST_SIDE, expanded
from fastiat.system.signals import Now, Signals

USUAL_SIDE = 224
"""Side of the images of a tree of mixed sizes: the usual input size for photographs."""
AHEAD = 64
"""Largest number of images in one task of a worker process."""

log = logging.getLogger(__name__)


class Stopped(Exception):
    """SIGTERM, whose number is `signum`, ended the conversion."""

    signum = signal.SIGTERM


@contextmanager
def stoppable() -> Iterator[None]:
    """End the block when SIGINT or SIGTERM arrives, so that no unfinished file is left.

    Raises `KeyboardInterrupt` or `Stopped`.
    """
    with Signals() as signals:
        try:
            with signals.at_once():
                yield
        except Now:  # not an `Exception`, so no reader takes it for a damaged image
            if signals.received == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise Stopped("terminated, nothing was written") from None


@dataclass(frozen=True)
class Sizes:
    """The sizes and colours of all images."""

    widest: int
    """The largest shorter side."""
    uniform: bool
    """Whether all images are squares of that side."""
    grey: bool


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
    sizes: Callable[[], Sizes]
    """Reads the size of every image."""
    blobs: Callable[[Encoder], AbstractContextManager[Iterable[bytes]]]
    """Yields the encoded images, in the order of `labels`."""


def tree_source(root: Path) -> Source:
    """Return the image tree at `root` as a source; worker processes decode its images."""
    listing = tree.scan(root.absolute())
    tree.warn_ignored(listing)

    def sizes() -> Sizes:
        with pixels.quiet(), tree.mapped(_sizes_of, listing.paths) as results:
            parts = list(results)
        return Sizes(
            max(part.widest for part in parts),
            len({part.widest for part in parts}) == 1 and all(part.uniform for part in parts),
            all(part.grey for part in parts),
        )

    @contextmanager
    def blobs(encoder: Encoder) -> Iterator[Iterable[bytes]]:
        work = functools.partial(_blobs_of, encoder=encoder)
        count = _images_per_task(encoder.side)
        with pixels.quiet(), tree.mapped(work, listing.paths, count) as results:
            yield itertools.chain.from_iterable(results)

    return Source(
        "folder", listing.classes, True, listing.labels, listing.n_train, listing.digest, sizes,
        blobs,
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

    return Source(
        dataset.name, dataset.classes, dataset.flip,
        torch.cat([split.labels for split in splits]).numpy(), len(dataset.train),
        dataset.fingerprint(), lambda: Sizes(min(height, width), height == width, channels == 1),
        blobs,
    )  # fmt: skip


@stoppable()
def write_beton(
    out: Path, source: Source, form: beton.Format, quality: int, max_side: int | None
) -> beton.Card:
    """Write a source to the .beton `out` and return its card.

    Raises `InputError` for an image that cannot be read and for images that are too large.
    """
    sizes = source.sizes()
    most = max_side or (sizes.widest if sizes.uniform else USUAL_SIDE)
    side = min(most, sizes.widest)
    if side > beton.LARGEST_SIDE:
        raise InputError(
            f"the images have {side}x{side} pixels: give a --max-side of "
            f"{beton.LARGEST_SIDE} or less"
        )
    name = source.name
    if name != "folder":  # results must not pass for those of the original images
        name += f"-{side}" * (side != sizes.widest) + "-jpeg" * (form == "jpeg")
    with source.blobs(Encoder(side, quality if form == "jpeg" else None)) as blobs:
        return beton_writer.write(
            out, source.labels, blobs,
            name=name, classes=source.classes, flip=source.flip, channels=1 if sizes.grey else 3,
            side=side, n_train=source.n_train, format=form, quality=quality,
            source=source.digest, fastiat=__version__,
        )  # fmt: skip


def cached_dataset(dataset: Dataset) -> Dataset:
    """Return a data set as one in a raw .beton of the cache, with the same pixels."""
    source = dataset_source(dataset)
    return _cached(source, f"{source.name}-{source.digest}")


def cached_tree(root: Path) -> Dataset:
    """Return the tree at `root` as a raw .beton of the cache, written if the tree has changed."""
    return _cached(tree_source(root), hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16])


def cache_dir() -> Path:
    """Return the folder of converted data sets."""
    given = os.environ.get("FASTIAT_CACHE")
    if given:
        return Path(expanded(given))
    try:
        return tree.user_cache("betons")
    except InputError as error:
        raise InputError(
            f"{error}: name a folder for converted images with FASTIAT_CACHE"
        ) from None


def _cached(source: Source, name: str) -> Dataset:
    """Return a source's file of the cache; of several processes one writes it.

    Raises `InputError` where the file is not there and cannot be written.
    """
    file = cache_dir() / f"{name}.beton"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = open(file.with_suffix(".lock"), "w")  # noqa: SIM115
    except OSError as error:
        if _holds(file, source):  # a cache that is shared, and read-only
            return stored(file)
        raise InputError(
            f"{file.parent} cannot be written to ({error.strerror}): "
            "name another folder for converted images with FASTIAT_CACHE"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _holds(file, source):
            write_beton(file, source, "raw", 0, None)
    return stored(file)


def _holds(file: Path, source: Source) -> bool:
    """Whether a file of the cache is whole and was made from these images."""
    if not file.exists():
        return False
    try:
        card = beton.open_beton(file).card
    except InputError as error:
        log.warning("%s; it is written again", error)
        return False
    return card.source == source.digest


def _images_per_task(side: int) -> int:
    """Return how many images a task has: as many as `beton.CHUNK` holds, but at least one."""
    return max(1, min(AHEAD, beton.CHUNK // (3 * side**2)))


def _sizes_of(paths: list[str]) -> Sizes:
    shorter, longer, grey = [], [], True
    for path in paths:
        with pixels.opened(path, head_only=True) as image:
            width, height = image.size
            if min(width, height) < SMALLEST_SIDE:
                raise InputError(
                    f"{path} is {width}x{height} pixels: {SMALLEST_SIDE} is the smallest side"
                )
            shorter.append(min(width, height))
            longer.append(max(width, height))
            grey &= pixels.is_grey(image)
    widest = max(shorter)
    return Sizes(widest, min(shorter) == max(longer) == widest, grey)


def _blobs_of(paths: list[str], encoder: Encoder) -> list[bytes]:
    blobs = []
    for path in paths:
        with pixels.opened(path) as image:
            blobs.append(encoder(pixels.pixels_of(image, path)))
    return blobs
