"""Convert data sets, and image trees of any mixture of sizes, to .beton files.

All images of a file are squares of the same side. If all source images are squares of one size,
they keep that size. Otherwise the side is 224 pixels, or the side of the largest square that fits
into any of the images if that is less, and the centre square of each image is resized to that side.
`max_side` replaces the 224, and also limits the side of images of one size. At most a few hundred
images of a tree are in memory at a time.
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
"""Appended to the digest of a source whose images were resized because their sizes differ."""
USUAL_SIDE = 224
"""Side of converted images of mixed sizes, in pixels: the usual input size for photographs."""
LARGEST_TASK = 64
"""Largest number of images in one task of a worker process."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sizes:
    """A summary of the sizes and colours of all images."""

    widest: int
    """Side of the largest square that fits into any of the images, in pixels."""
    grey: bool
    """Whether all images are grey."""
    mixed: str = ""
    """Why the images must be resized, with a remedy; "" if all are squares of one size."""


@dataclass(frozen=True)
class Encoder:
    """Encodes an image as it is stored in a .beton: raw RGB pixels, or a JPEG."""

    side: int
    """Height and width of the stored image, in pixels."""
    quality: int | None
    """JPEG quality, 0 to 100; None for raw pixels."""
    photo: int | None = None
    """Side of the centre squares that are cut out of the stored images later, see `centre_square`;
    None for images that are no photos."""

    def __call__(self, pixels: NDArray[np.uint8]) -> bytes:
        """Resize the centre square of an image, (H, W), (H, W, 1) or (H, W, 3), and encode it.

        Pillow scales the support of the Lanczos filter when it shrinks an image, so there is no
        aliasing. An image that already has the right size is not resampled.
        """
        size = self.side, self.side
        if pixels.ndim == 3 and pixels.shape[2] == 1:
            pixels = pixels[..., 0]
        if pixels.shape[:2] != size:
            image = Image.fromarray(pixels)
            pixels = np.asarray(
                centre_square(image, self.photo)
                if self.photo
                else ImageOps.fit(image, size, Image.Resampling.LANCZOS)
            )
        if pixels.ndim == 2:
            pixels = np.repeat(pixels[..., None], 3, 2)
        if self.quality is None:
            return pixels.tobytes()
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=self.quality)
        return buffer.getvalue()


def with_context(side: int) -> int:
    """Return the side of the stored square for images of `side` pixels: 8/7 of it, 256 for 224."""
    return side + 2 * round(side / 14)


def centre_square(image: Image.Image, side: int) -> Image.Image:
    """Return the square of side `with_context(side)` around the centre of a photo.

    The shorter side of the photo is first resized to that side. The centre square of `side` pixels
    in the result is torchvision's `CenterCrop(side)` of its `Resize(with_context(side))`, which is
    the evaluation recipe for ImageNet.
    """
    width, height = image.size
    short, stored_side = min(width, height), with_context(side)
    size = int(stored_side * width / short), int(stored_side * height / short)
    image = image.resize(size, Image.Resampling.BILINEAR)
    margin = (stored_side - side) // 2
    left, top = (round((length - side) / 2) - margin for length in size)
    return image.crop((left, top, left + stored_side, top + stored_side))


@dataclass(frozen=True)
class Source:
    """Images to convert, training images first."""

    name: str
    classes: tuple[str, ...]
    flip: bool
    labels: NDArray[np.int64]
    n_train: int
    """Number of training images."""
    digest: str
    """Identifies the images: the digest of a tree's listing, or a data set's fingerprint."""
    cache_name: str
    """Name of the source's file in the cache, without the extension."""
    sizes: Callable[[], Sizes]
    """Returns a summary of the sizes of all images."""
    blobs: Callable[[Encoder], AbstractContextManager[Iterable[bytes]]]
    """Returns a context manager that yields the encoded images, in the order of `labels`."""


def tree_source(root: Path) -> Source:
    """Return the image tree at `root` as a `Source`; worker processes decode its images.

    Raises `InputError` for a tree that breaks the rules of `fastiat.images.tree`.
    """
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
    """Return a loaded data set as a `Source`."""
    splits = dataset.train, dataset.test
    channels, height, width = dataset.train.shape

    def blobs(encoder: Encoder) -> AbstractContextManager[Iterable[bytes]]:
        # Take a few images at a time: those of a .beton are read into memory.
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


def write_beton(
    out: Path, source: Source, form: beton.Format, quality: int, max_side: int | None,
    *, resize: bool = True, progress: bool = True, photo: int | None = None,
) -> beton.Card:  # fmt: skip
    """Write a source to the .beton `out` and return its card.

    photo: side of the images that are cut out of photos, see `Encoder.photo`.

    Raises `InputError` for an image that cannot be read, for images that are too large and,
    without `resize`, for images that are not all squares of one size.
    """
    # A signal is raised at once, so that the unfinished file is removed.
    with Signals() as signals, signals.at_once():
        sizes = source.sizes()
        side = _side(sizes, max_side, resize, photo)
        name = source.name
        # The name separates results on resized or JPEG images from results on the original images.
        if name != "folder":
            name += f"-{side}" * (side != sizes.widest) + "-jpeg" * (form == "jpeg")
        encoder = Encoder(side, quality if form == "jpeg" else None, photo)
        origin = source.digest + RESIZED * bool(sizes.mixed)
        with source.blobs(encoder) as blobs:
            return beton_writer.write(
                out, source.labels, blobs, progress=progress, name=name, classes=source.classes,
                flip=source.flip, channels=1 if sizes.grey else 3, side=side,
                n_train=source.n_train, format=form, quality=quality,
                source=_origin(source, photo) if photo else origin, fastiat=__version__,
            )  # fmt: skip


def _origin(source: Source, photo: int) -> str:
    """Return the text that identifies the photos of a source, for images of side `photo`."""
    return f"{source.digest}-photo-{photo}"


def decoded(source: Source, photo: int | None = None) -> Dataset:
    """Decode all images of a source into memory; `photo` and the errors are as in `write_beton`."""
    sizes = source.sizes()
    side = _side(sizes, None, resize=False, photo=photo)
    channels = 1 if sizes.grey else 3
    images = np.empty((len(source.labels), side, side, channels), np.uint8)
    with source.blobs(Encoder(side, None, photo)) as blobs:
        for image, blob in zip(images, blobs, strict=True):
            image[:] = np.frombuffer(blob, np.uint8).reshape(side, side, 3)[..., :channels]
    labels, n = torch.from_numpy(source.labels), source.n_train
    train, test = (
        Split(torch.from_numpy(images[part]), labels[part]) for part in (slice(n), slice(n, None))
    )
    return Dataset(source.name, source.classes, train, test, source.flip)


def _side(sizes: Sizes, max_side: int | None, resize: bool, photo: int | None) -> int:
    """Return the side of all converted images, in pixels; `write_beton` says which errors."""
    if photo:
        return with_context(photo)
    if sizes.mixed and not resize:
        raise InputError(f"{sizes.mixed}, or resize them with --image-size or fastiat convert")
    side = min(max_side or (USUAL_SIDE if sizes.mixed else sizes.widest), sizes.widest)
    if side > beton.LARGEST_SIDE:
        raise InputError(
            f"the images have {side}x{side} pixels: let fastiat convert resize them with "
            f"--max-side {beton.LARGEST_SIDE} or less"
        )
    return side


def cached(
    source: Source, *, resize: bool = True, progress: bool = True, photo: int | None = None
) -> Dataset:
    """Return a source as a raw .beton in the cache, which is written if missing, old or damaged.

    photo: as for `write_beton`; every side has a file of its own.

    Of several processes only one writes the file. Raises `tree.NoFolderError` if the cache folder
    cannot be written to, and the errors of `write_beton`.
    """
    folder = tree.cache_folder("betons", "FASTIAT_CACHE", "converted images with FASTIAT_CACHE")
    file = folder / f"{source.cache_name}{f'-{photo}' if photo else ''}.beton"
    origins = {source.digest} | ({source.digest + RESIZED} if resize else set())
    if photo:
        origins = {_origin(source, photo)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(file.with_suffix(".lock"), "w")  # noqa: SIM115
    except OSError as error:
        if _holds(file, origins):  # a shared cache may be read-only
            return stored(file)
        raise tree.NoFolderError(
            f"{folder} cannot be written to ({error.strerror}): "
            "name another folder for converted images with FASTIAT_CACHE"
        ) from None
    with lock:
        # The check comes after the lock: another process may just have written the file.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _holds(file, origins):
            write_beton(file, source, "raw", 0, None, resize=resize, progress=progress, photo=photo)
    return stored(file)


def _holds(file: Path, origins: set[str]) -> bool:
    """Whether a file of the cache is undamaged and was made from one of these sources."""
    if not file.exists():
        return False
    try:
        made_from = beton.open_beton(file).card.source
    except InputError as error:
        reason, _, _ = str(error).rpartition(": ")  # without the advice to convert it again
        log.warning("the cache %s: it is written again", reason)
        return False
    return made_from in origins


def _images_per_task(side: int) -> int:
    """Return the number of images in a task: as many as fit into `beton.CHUNK`, at least 1."""
    return max(1, min(LARGEST_TASK, beton.CHUNK // (3 * side**2)))


def _sizes_of(paths: list[str], first: str, size: tuple[int, int]) -> Sizes:
    """Return a summary of the images at `paths`; `size` (W, H) is that of the tree's `first` image.

    Reads only the headers. Raises `InputError` for an image that is too small or unreadable.
    """
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
    """Decode the images at `paths` and encode them as they are stored."""
    blobs = []
    for path in paths:
        with pixels.opened(path) as image:
            blobs.append(encoder(pixels.pixels_of(image, path)))
    return blobs
