"""Image trees, `train/<class>/*` and `test/<class>/*`, decoded once into a cache.

What a tree may hold:

- The classes are the folders' names, sorted; both splits have the same ones, two or more.
- The images are the files directly in a class's folder whose extension is in `EXTENSIONS`, in
  any case, links included. Hidden names, folders in there and other files are left out; a
  warning counts the other files.
- All images are square and of one size, 8x8 or more. Of an animation the first frame counts.
- A tree is colour, 3 channels, as soon as one image is; then grey ones repeat their channel.
  Bilevel and grey images are grey, 16 bits keep the high byte; palettes, CMYK and the rest are
  converted to RGB.
- EXIF orientation is applied: an image is taken as viewers show it.
- An alpha channel is dropped where the image is opaque throughout. Anything transparent is
  refused, because the background is not ours to choose.
"""

import contextlib
import ctypes
import functools
import hashlib
import io
import itertools
import logging
import multiprocessing
import os
import signal
import stat
import sys
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from fastiat.beton import LARGEST_SIDE as LARGEST
from fastiat.errors import InputError, one_line, printable
from fastiat.guard import read_npz
from fastiat.settings import SMALLEST_SIDE as SMALLEST

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
# Named, so that no other reader of Pillow's is let near a file; the EPS one runs a program.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM")
SPLITS = ("train", "test")

GREY = ("1", "L", "LA")  # Pillow's modes; 16-bit grey is I;16, I;16B or I

CHUNK = 128  # images per task of a worker
LARGEST_FILE = 2**28  # bytes of an image, which is read into memory whole
PARALLEL_FROM = 2000  # images from which worker processes are worth their start
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
CACHE_VERSION = 1  # raise it when decoding changes

T = TypeVar("T")
_CONVERT = "let fastiat convert resize them"

log = logging.getLogger(__name__)
# Pillow also logs what it then raises; without a handler that would be a line on stderr.
logging.getLogger("PIL").addHandler(logging.NullHandler())


@dataclass(frozen=True)
class Tree:
    """A decoded tree: (images (N, H, W, C) uint8, labels (N,) int64) of each split."""

    classes: tuple[str, ...]
    train: tuple[NDArray[np.uint8], NDArray[np.int64]]
    test: tuple[NDArray[np.uint8], NDArray[np.int64]]


def read(root: str | os.PathLike, *, progress: bool = True) -> Tree:
    """Return the images of the tree at `root`, from the cache if nothing changed since.

    The cache is a file in `$FASTIAT_CACHE`, else `~/.cache/fastiat/folders`, found by the tree's
    absolute path and valid for one list of files with their sizes and modification times. A
    cache that is damaged or cannot be written costs a warning and time. Raises `InputError`,
    naming the file or folder, for a tree that breaks the rules at the head of `fastiat.folder`
    and for a damaged image.
    """
    root = Path(root).absolute()
    listing = scan(root)
    cache = _cache_file(root)
    images = _load_cache(cache, listing)
    if images is None:
        images = _decode_all(listing.paths, progress)
        _save_cache(cache, listing, images)
        warn_ignored(listing)
    n = listing.n_train
    train, test = (images[:n], listing.labels[:n]), (images[n:], listing.labels[n:])
    return Tree(listing.classes, train, test)


def decoded_size(root: Path) -> int:
    """Return the bytes of a tree's images, if all are as large as the first."""
    paths = scan(root).paths
    with opened(paths[0], head_only=True) as image:
        width, height = image.size
    return len(paths) * width * height * 3


def warn_ignored(listing: "Listing") -> None:
    """Warn of the files that were left out of a listing, if there are any."""
    if listing.ignored:
        log.warning(
            "%s: %d files have no image's extension and were left out, the first is %s",
            *(listing.root, len(listing.ignored), printable(listing.ignored[0])),
        )


def user_cache(name: str) -> Path:
    """Return fastiat's folder `name` in the user's cache folder; it need not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastiat" / name


@dataclass(frozen=True)
class Listing:
    """What a tree holds, training images first."""

    root: Path
    classes: tuple[str, ...]
    paths: list[str]
    labels: NDArray[np.int64]
    n_train: int
    ignored: list[str]
    digest: str  # SHA-256 over every image's path in the tree, size and modification time


def scan(root: Path) -> Listing:
    """List a tree; raise `InputError` where it breaks the rules of folders and names."""
    names = {split: _class_names(root, split) for split in SPLITS}
    for here, there in (SPLITS, SPLITS[::-1]):
        for name in sorted(names[here] - names[there]):
            raise InputError(
                f"class {name!r} is in {root / here} but not in {root / there}: "
                "every class needs images in both"
            )
    classes = tuple(sorted(names["train"]))
    if len(classes) < 2:
        raise InputError(f"{root} has only the class {classes[0]!r}: a classifier needs two")

    paths: list[str] = []
    labels: list[int] = []
    ignored: list[str] = []
    digest = hashlib.sha256(b"%d" % CACHE_VERSION)
    n_train = 0
    for split in SPLITS:
        for label, name in enumerate(classes):
            for file, size, mtime_ns in _image_files(root / split / name, ignored):
                digest.update(os.fsencode(f"\0{split}/{name}/{file}\0{size}\0{mtime_ns}"))
                paths.append(os.path.join(root, split, name, file))
                labels.append(label)
        n_train = n_train or len(paths)
    everything = np.array(labels, np.int64)
    return Listing(root, classes, paths, everything, n_train, ignored, digest.hexdigest())


def _class_names(root: Path, split: str) -> set[str]:
    try:
        with os.scandir(root / split) as entries:
            names = {e.name for e in entries if e.is_dir() and not e.name.startswith(".")}
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{root} has no folder {split!r}: an image tree is train/<class>/* and test/<class>/*"
        ) from None
    except OSError as error:
        raise InputError(f"{root / split} cannot be read: {error.strerror}") from error
    if not names:
        raise InputError(f"{root / split} has no class folders: put images in {split}/<class>/")
    return names


def _image_files(folder: Path, ignored: list[str]) -> list[tuple[str, int, int]]:
    """Return the sorted (name, bytes, mtime_ns) of `folder`'s images; list others in `ignored`."""
    images = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.is_dir():
                    continue
                if not entry.name.lower().endswith(EXTENSIONS):
                    ignored.append(entry.path)
                    continue
                status = entry.stat()
                if not stat.S_ISREG(status.st_mode):
                    raise InputError(f"{entry.path} is not a file: remove it")
                images.append((entry.name, status.st_size, status.st_mtime_ns))
    except OSError as error:  # of a link to nothing, too
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error
    if not images:
        raise InputError(f"{folder} holds no images ({' '.join(EXTENSIONS)}) for its class")
    return sorted(images)


def _decode_all(paths: list[str], progress: bool) -> NDArray[np.uint8]:
    """Return the images at `paths` as one (N, H, W, C) array, C = 3 if one of them is colour."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet())
        side = len(_decode(paths[0]))
        try:
            images = np.empty((len(paths), side, side, 3), np.uint8)
        except MemoryError:
            raise InputError(
                f"{len(paths)} images of {side}x{side} pixels do not fit into memory: shrink them"
            ) from None
        work = functools.partial(_decode_chunk, first=paths[0], side=side)
        results = stack.enter_context(mapped(work, paths))
        bar = stack.enter_context(
            # None: shown on a terminal alone.
            tqdm(total=len(paths), desc="decoding", unit=" images", disable=not progress or None)
        )
        done, colour = 0, False
        for pixels, coloured in results:
            images[done : done + len(pixels)] = pixels
            done += len(pixels)
            colour |= coloured
            bar.update(len(pixels))
    return images if colour else images[..., :1].copy()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence Pillow, which warns of what is refused or harmless here; a bomb is an error.

    It warns of a bomb only up to twice its limit.
    """
    with warnings.catch_warnings(action="ignore"):
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


@contextlib.contextmanager
def mapped(
    work: Callable[[list[str]], T], paths: list[str], chunk: int = CHUNK
) -> Iterator[Iterable[T]]:
    """Give the results of `work` on `paths`, a chunk at a time and in order.

    Worker processes do it where there are enough images; they are at most a few chunks ahead.
    """
    chunks = (paths[i : i + chunk] for i in range(0, len(paths), chunk))
    workers = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    if workers == 1 or len(paths) < PARALLEL_FROM:
        yield map(work, chunks)
        return
    # Threads would queue for the interpreter's lock, which small images mostly hold. Forked
    # workers need no `if __name__ == "__main__"` in the caller's script and touch neither torch
    # nor CUDA.
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("fork"), _follow_parent, (os.getpid(),)
    )

    def results() -> Iterator[T]:
        ahead = deque(pool.submit(work, part) for part in itertools.islice(chunks, 4 * workers))
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(pool.submit(work, part) for part in itertools.islice(chunks, 1))

    try:
        yield results()
    except BrokenProcessPool:
        raise InputError(
            "a process that decodes images was killed: free memory, then run again"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _follow_parent(parent: int) -> None:
    """Let the parent handle the signals, and end with it, even where it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(OSError, AttributeError):  # not this libc
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was killed before
        os._exit(1)


def _decode_chunk(paths: list[str], first: str, side: int) -> tuple[NDArray[np.uint8], bool]:
    """Return the images at `paths`, grey ones in three equal channels, and whether any is colour.

    `first` names the image that set the `side`.
    """
    pixels = np.empty((len(paths), side, side, 3), np.uint8)
    colour = False
    for i, path in enumerate(paths):
        image = _decode(path, first, side)
        pixels[i] = image if image.ndim == 3 else image[..., None]
        colour |= image.ndim == 3
    return pixels, colour


def _decode(path: str, first: str = "", side: int = 0) -> NDArray[np.uint8]:
    """Return one image as (H, W) if it is grey, (H, W, 3) if not."""
    with opened(path) as image:
        width, height = image.size
        if width != height:
            raise InputError(
                f"{path} is {width}x{height} pixels: make every image square, or {_CONVERT}"
            )
        if width < SMALLEST:
            raise InputError(
                f"{path} is {width}x{height} pixels: {SMALLEST}x{SMALLEST} is the smallest size"
            )
        if width > LARGEST:
            raise InputError(
                f"{path} is {width}x{height} pixels: {LARGEST}x{LARGEST} is the largest size"
            )
        if side and width != side:
            raise InputError(
                f"{path} is {width}x{height} pixels but {first} is {side}x{side}: "
                f"bring all images to one size, or {_CONVERT}"
            )
        return pixels_of(image, path)


@contextlib.contextmanager
def opened(path: str, *, head_only: bool = False) -> Iterator[Image.Image]:
    """Open an image, to decode it or for its `head_only`; errors in the block are `InputError`s."""
    try:
        with contextlib.ExitStack() as stack:
            if os.stat(path).st_size > LARGEST_FILE:
                raise InputError(f"{path} is larger than {LARGEST_FILE >> 20} MiB: shrink it")
            # Decoding asks a file for as many bytes as a damaged head names.
            source = path if head_only else io.BytesIO(Path(path).read_bytes())
            image = stack.enter_context(Image.open(source, formats=FORMATS))
            if image.format == "TIFF":  # libtiff prints by itself what it dislikes as it decodes
                stack.enter_context(_muted())
            yield image
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{path} is too large to be decoded safely: shrink it") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path} is not an image or damaged: replace or remove it") from error
    # Pillow's readers raise whatever a damaged file makes them stumble on.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path} cannot be decoded ({reason}): replace or remove it") from error


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    """Let nothing of a C library reach stderr."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def pixels_of(image: Image.Image, path: str) -> NDArray[np.uint8]:
    """Return an opened image as viewers show it, (H, W) if it is grey, (H, W, 3) if not."""
    if "exif" in image.info:
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # Pillow holds 16-bit grey in modes I;16, I;16B and I
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise InputError(f"{path} has more than 16 bits per pixel: save it with 8 or 16")
        return (values >> 8).astype(np.uint8)
    if image.mode == "F":
        raise InputError(f"{path} has floating-point pixels: save it with 8 or 16 bits")
    if image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
        raise InputError(f"{path} has transparent pixels: flatten it onto a background")
    mode = "L" if image.mode in GREY else "RGB"
    return np.asarray(image if image.mode == mode else image.convert(mode))


def _cache_file(root: Path) -> Path:
    folder = Path(os.environ.get("FASTIAT_CACHE") or user_cache("folders")).expanduser()
    return folder / f"{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]}.npz"


def _load_cache(cache: Path, listing: Listing) -> NDArray[np.uint8] | None:
    try:
        arrays = read_npz(cache, largest=cache.stat().st_size)
        if str(arrays["digest"]) != listing.digest:
            return None
        images = arrays["images"]
        n, height, width, channels = images.shape
        square = height == width >= SMALLEST and channels in (1, 3)
        if images.dtype != np.uint8 or n != len(listing.paths) or not square:
            raise ValueError("not this tree's images")
        return images
    except FileNotFoundError:
        return None
    # NumPy and zipfile raise whatever a damaged file makes them stumble on.
    except Exception as error:
        log.warning("the cache %s cannot be used (%s): decoding again", cache, one_line(error))
        return None


def _save_cache(cache: Path, listing: Listing, images: NDArray[np.uint8]) -> None:
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        part, name = tempfile.mkstemp(prefix=f"{cache.stem}.", suffix=".part", dir=cache.parent)
        try:
            with os.fdopen(part, "wb") as file:
                np.savez(file, digest=np.array(listing.digest), images=images)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, cache)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        log.warning("no cache of the images (%s): the next run decodes them again", error)
