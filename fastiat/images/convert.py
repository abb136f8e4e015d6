"""Converting: data sets and image trees of any size and mixture of sizes to .beton files.

Every image of a file is a square of one side. A tree of squares of one size keeps it. Otherwise the
side is 224 pixels, or that of the largest square that any image holds where that is less; an
image's middle square is resized to it. `max_side` takes the place of the 224 and holds for all.
No more of a tree is in memory at any time than a few hundred images.
"""

import fcntl
import functools
import hashlib
import io
import itertools
import os
import shlex
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fastiat import __version__, data
from fastiat.config import ConvertConfig
from fastiat.engine.device import own_defaults
from fastiat.images import beton, beton_writer, pixels
from fastiat.images import tree as folder
from fastiat.system.errors import InputError
from fastiat.system.settings import DATASETS, expanded, is_beton
from fastiat.system.signals import Signals

USUAL_SIDE = 224
"""Side of the images of a tree of mixed sizes: what networks for photographs are trained on."""
AHEAD = 64
"""Images, at most, that one task of a worker process decodes, resizes and compresses."""


class Source(ABC):
    """Images to convert, those to train on first."""

    name: str
    classes: tuple[str, ...]
    flip: bool
    labels: NDArray[np.int64]
    n_train: int
    digest: str
    """What it is recognised by when it comes again."""

    @abstractmethod
    def sizes(self) -> "Sizes":
        """Look at all images' sizes."""

    @abstractmethod
    def blobs(self, square: "_Square") -> AbstractContextManager[Iterable[bytes]]:
        """Give what is to be stored of every image."""


class Tree(Source):
    """An image tree; its images are decoded by worker processes."""

    def __init__(self, root: Path) -> None:
        listing = folder.scan(root.absolute())
        self.name, self.flip = "folder", True
        self.classes, self.labels, self.n_train = listing.classes, listing.labels, listing.n_train
        self.digest, self.listing = listing.digest, listing

    def sizes(self) -> "Sizes":
        """Read the header of every image; raise `InputError` for one that is too small."""
        with pixels.quiet(), folder.mapped(_sizes_of, self.listing.paths) as results:
            parts = list(results)
        return Sizes(
            max(part.widest for part in parts),
            len({part.widest for part in parts}) == 1 and all(part.uniform for part in parts),
            all(part.grey for part in parts),
        )

    @contextmanager
    def blobs(self, square: "_Square") -> Iterator[Iterable[bytes]]:
        """Decode, resize and encode, in a few tasks ahead."""
        work = functools.partial(_blobs_of, square=square)
        count = _at_a_time(square.side)
        with pixels.quiet(), folder.mapped(work, self.listing.paths, count) as results:
            yield itertools.chain.from_iterable(results)


class Loaded(Source):
    """A data set that has been loaded."""

    def __init__(self, dataset: data.Dataset) -> None:
        self.name, self.classes, self.flip = dataset.name, dataset.classes, dataset.flip
        self.labels = torch.cat([dataset.train.labels, dataset.test.labels]).numpy()
        self.n_train, self.digest = len(dataset.train), dataset.fingerprint()
        self.splits = dataset.train, dataset.test

    def sizes(self) -> "Sizes":
        """Return the one size of all images."""
        channels, height, width = self.splits[0].shape
        return Sizes(min(height, width), height == width, channels == 1)

    def blobs(self, square: "_Square") -> AbstractContextManager[Iterable[bytes]]:
        """Take the images a few at a time, as they may be in a file."""
        parts = (
            split.take(index).images.numpy()
            for split in self.splits
            for index in torch.arange(len(split)).split(_at_a_time(min(split.shape[1:])))
        )
        return nullcontext(square(image) for images in parts for image in images)


def _at_a_time(side: int) -> int:
    """Return how many images a task has: as many as `beton.CHUNK` holds, but one at least."""
    return max(1, min(AHEAD, beton.CHUNK // (3 * side**2)))


@dataclass(frozen=True)
class Sizes:
    """The sizes and colours of all images."""

    widest: int
    """The largest shorter side."""
    uniform: bool
    """Whether all images are square and of that side."""
    grey: bool


@dataclass(frozen=True)
class _Square:
    """What makes of an image the bytes that are stored: RGB pixels, or a JPEG of a quality."""

    side: int
    quality: int | None

    def __call__(self, pixels: NDArray[np.uint8]) -> bytes:
        """Resize the middle square of an image, (H, W), (H, W, 1) or (H, W, 3), and encode it.

        Lanczos's filter is widened to the pixels that become one, so that nothing aliases. An
        image of the right size stays as it is.
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


@own_defaults()
def convert(config: ConvertConfig) -> beton.Card:
    """Write the .beton that `config` asks for, say what is in it, and return its card.

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
    if config.data_dir is not None and config.dataset not in DATASETS:
        raise InputError(
            f"--data-dir is where a data set of a name is: leave it out with {config.dataset}"
        )
    if config.dataset in DATASETS and config.dataset != "folder":
        source: Source = Loaded(data.load(config.dataset, config.data_dir))
    elif is_beton(config.dataset):
        source = Loaded(data.load(config.dataset))
    else:
        place = config.data_dir if config.dataset == "folder" else config.dataset
        tree = Tree(data.tree_root(place))
        folder.warn_ignored(tree.listing)
        source = tree
    with Signals() as signals, signals.at_once():  # so that nothing half-written stays
        card = _write(out, source, config.format, config.quality, config.max_side)
    print(
        f"{out}: {card.n_train} training and {len(source.labels) - card.n_train} test images of "
        f"{card.side}x{card.side} pixels in {len(card.classes)} classes, {card.format}, "
        f"{out.stat().st_size / 2**20:,.1f} MiB; train on it with --dataset {shlex.quote(str(out))}"
    )
    return card


def _write(
    out: Path, source: Source, form: beton.Format, quality: int, max_side: int | None
) -> beton.Card:
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
    square = _Square(side, quality if form == "jpeg" else None)
    with source.blobs(square) as blobs:
        return beton_writer.write(
            out, source.labels, blobs,
            name=name, classes=source.classes, flip=source.flip, channels=1 if sizes.grey else 3,
            side=side, n_train=source.n_train, format=form, quality=quality,
            source=source.digest, fastiat=__version__,
        )  # fmt: skip


def cached_dataset(dataset: data.Dataset) -> data.Dataset:
    """Return a data set as one in a raw .beton of the cache, with the same pixels."""
    source = Loaded(dataset)
    return _cached(source, f"{source.name}-{source.digest}")


def cached_tree(root: Path) -> data.Dataset:
    """Return the tree at `root` as a raw .beton of the cache, written if the tree has changed."""
    source = Tree(root)
    return _cached(source, hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16])


def cache_dir() -> Path:
    """Return where converted data sets lie."""
    given = os.environ.get("FASTIAT_CACHE")
    if given:
        return Path(expanded(given))
    try:
        return folder.user_cache("betons")
    except InputError as error:
        raise InputError(
            f"{error}: name a folder for converted images with FASTIAT_CACHE"
        ) from None


def _cached(source: Source, name: str) -> data.Dataset:
    """Return what the cache has of a source; several processes write it once.

    Raises `InputError` where it has nothing and cannot be written.
    """
    if isinstance(source, Tree):
        folder.warn_ignored(source.listing)
    file = cache_dir() / f"{name}.beton"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = open(file.with_suffix(".lock"), "w")  # noqa: SIM115
    except OSError as error:
        if _is_of(file, source):  # a cache that is shared, and read-only
            return data.stored(file)
        raise InputError(
            f"{file.parent} cannot be written to ({error.strerror}): "
            "name another folder for converted images with FASTIAT_CACHE"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_of(file, source):
            with Signals() as signals, signals.at_once():
                _write(file, source, "raw", 0, None)
    return data.stored(file)


def _is_of(file: Path, source: Source) -> bool:
    if not file.exists():
        return False
    try:
        card = beton.open_beton(file).card
    except InputError as error:
        folder.log.warning("%s; it is written again", error)
        return False
    return card.source == source.digest


def _sizes_of(paths: list[str]) -> Sizes:
    shorter, longer, grey = [], [], True
    for path in paths:
        with pixels.opened(path, head_only=True) as image:
            width, height = image.size
            if min(width, height) < folder.SMALLEST:
                raise InputError(
                    f"{path} is {width}x{height} pixels: {folder.SMALLEST} is the smallest side"
                )
            shorter.append(min(width, height))
            longer.append(max(width, height))
            grey &= pixels.is_grey(image)
    widest = max(shorter)
    return Sizes(widest, min(shorter) == max(longer) == widest, grey)


def _blobs_of(paths: list[str], square: _Square) -> list[bytes]:
    blobs = []
    for path in paths:
        with pixels.opened(path) as image:
            blobs.append(square(pixels.pixels_of(image, path)))
    return blobs
