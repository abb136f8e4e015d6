"""Image trees, `train/<class>/*` and `test/<class>/*`, decoded once into a cache.

What a tree may hold:

- The classes are the folders' names, sorted; both splits have the same ones, two or more.
- The images are the files directly in a class's folder whose extension is in `EXTENSIONS`, in
  any case, links included. A warning counts what is left out: files beside the class folders, in
  folders within a class, without such an extension, and images with a hidden name. A link to
  nothing is refused where it may be an image or a class.
- All images are square and of one size, 8x8 or more. Of an animation the first frame counts.
- A tree is colour, 3 channels, as soon as one image is; then grey ones repeat their channel.
  Bilevel and grey images are grey, 16 bits keep the high byte; palettes, CMYK and the rest are
  converted to RGB.
- EXIF orientation is applied, in XMP too: an image is taken as viewers show it.
- An alpha channel is dropped where the image is opaque throughout. Anything transparent is
  refused, because the background is not ours to choose.
"""

import contextlib
import ctypes
import hashlib
import itertools
import logging
import multiprocessing
import os
import signal
import stat
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fastiat.system.errors import InputError, printable
from fastiat.system.ranks import ranks
from fastiat.system.settings import expanded

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
SPLITS = ("train", "test")

CHUNK = 128  # images per task of a worker
PARALLEL_FROM = 2000  # images from which worker processes are worth their start
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
CACHE_VERSION = 2  # raise it when decoding changes

CLOCK_TICK = 20_000_000
"""Nanoseconds between two times of files at the most; a system's clock for them ticks that slowly.
"""

# Why files are left out.
_BESIDE = "beside the class folders"
_NESTED = "in folders within a class"
_HIDDEN = "hidden"
_UNKNOWN = f"without an image's extension ({' '.join(EXTENSIONS)})"

T = TypeVar("T")

log = logging.getLogger(__name__)


def root_of(data_dir: str | os.PathLike | None) -> Path:
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


def warn_ignored(listing: "Listing") -> None:
    """Warn of the files that were left out of a listing, if there are any."""
    if not listing.ignored or not ranks().first:
        return
    reasons = (
        f"{len(paths)} {'file' if len(paths) == 1 else 'files'} {why}, the first is "
        f"{printable(paths[0])}"
        for why, paths in listing.ignored.items()
    )
    log.warning("%s, left out: %s", listing.root, "; ".join(reasons))


def looks_like(root: Path) -> str:
    """Say what of an image tree a folder looks like, and what then to do; "" for any other."""
    inside = _entries(root)
    if all(os.path.isdir(root / split) for split in SPLITS):
        return "is an image tree (train/<class>/*, test/<class>/*): add --dataset folder"
    betons = sorted(name for name in inside if name.endswith(".beton"))
    if betons:
        return f"holds {betons[0]}: name it with --dataset {root / betons[0]}"
    below = [root / name for name in inside]
    classes = any(_has_images(_entries(place)) for place in below)
    splits = any(_has_images(_entries(p / name)) for p in below for name in _entries(p)[:10])
    if not (classes or splits or _has_images(inside)):
        return ""
    if root.name in SPLITS and classes:
        return f"is one split of an image tree: give --dataset folder --data-dir {root.parent}"
    return (
        "holds images: move them to train/<class>/ and test/<class>/ in it, "
        "then add --dataset folder"
    )


def _entries(folder: Path) -> list[str]:
    """Return the first names in a folder that are not hidden; none where it cannot be read."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        return [e.name for e in itertools.islice(entries, 1000) if not e.name.startswith(".")]
    return []


def _has_images(names: list[str]) -> bool:
    return any(name.lower().endswith(EXTENSIONS) for name in names)


def user_cache(name: str) -> Path:
    """Return fastiat's folder `name` in the user's cache folder; it need not exist yet.

    Raises `InputError` where there is no home folder and no `$XDG_CACHE_HOME`.
    """
    given = os.environ.get("XDG_CACHE_HOME")
    cache = expanded(given) if given else os.path.join(os.path.expanduser("~"), ".cache")
    if cache.startswith("~"):
        raise InputError("there is no home folder (HOME is not set)")
    return Path(cache) / "fastiat" / name


@dataclass(frozen=True)
class Listing:
    """What a tree holds, training images first."""

    root: Path
    classes: tuple[str, ...]
    paths: list[str]
    labels: NDArray[np.int64]
    n_train: int
    ignored: dict[str, list[str]]
    """What is left out: {why: paths}."""
    digest: str
    """SHA-256 over every image's path in the tree, size, inode and times of modification and of
    change: the last, which no program can set, tells files that were swapped."""


def scan(root: Path) -> Listing:
    """List a tree; raise `InputError` where it breaks the rules of folders and names."""
    ignored: dict[str, list[str]] = {_BESIDE: [], _NESTED: [], _HIDDEN: [], _UNKNOWN: []}
    names = {split: _class_names(root, split, ignored) for split in SPLITS}
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
    digest = hashlib.sha256(b"%d" % CACHE_VERSION)
    n_train, newest = 0, 0
    for split in SPLITS:
        for label, name in enumerate(classes):
            for file, status in _image_files(root / split / name, ignored):
                stamp = status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
                newest = max(newest, status.st_ctime_ns)
                digest.update(os.fsencode(f"\0{split}/{name}/{file}\0{stamp}"))
                paths.append(os.path.join(root, split, name, file))
                labels.append(label)
        n_train = n_train or len(paths)
    if time.time_ns() - newest < CLOCK_TICK:
        # A change after the images are read must get another time than the last one before.
        time.sleep(CLOCK_TICK / 1e9)
    everything = np.array(labels, np.int64)
    left_out = {why: sorted(found) for why, found in ignored.items() if found}
    return Listing(root, classes, paths, everything, n_train, left_out, digest.hexdigest())


def _class_names(root: Path, split: str, ignored: dict[str, list[str]]) -> set[str]:
    names = set()
    try:
        with os.scandir(root / split) as entries:
            for entry in entries:
                if entry.is_symlink() and not os.path.exists(entry.path):
                    raise InputError(
                        f"{entry.path} is a link to nothing: mount what it leads to, or remove it"
                    )
                if entry.name.startswith("."):
                    _leave_out(entry, _HIDDEN, ignored)
                elif entry.is_dir():
                    names.add(entry.name)
                else:
                    ignored[_BESIDE].append(entry.path)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{root} has no folder {split!r}: an image tree is train/<class>/* and test/<class>/*"
        ) from None
    except OSError as error:
        raise InputError(f"{root / split} cannot be read: {error.strerror}") from error
    if not names:
        raise InputError(f"{root / split} has no class folders: put images in {split}/<class>/")
    return names


def _image_files(folder: Path, ignored: dict[str, list[str]]) -> list[tuple[str, os.stat_result]]:
    """Return the sorted names of `folder`'s images; add everything else to `ignored`."""
    images = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    _leave_out(entry, _HIDDEN, ignored)
                    continue
                if entry.is_dir():
                    _leave_out(entry, _NESTED, ignored)
                    continue
                if not entry.name.lower().endswith(EXTENSIONS):
                    ignored[_UNKNOWN].append(entry.path)
                    continue
                status = entry.stat()
                if not stat.S_ISREG(status.st_mode):
                    raise InputError(f"{entry.path} is not a file: remove it")
                images.append((entry.name, status))
    except OSError as error:  # of a link to nothing, too
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error
    if not images:
        raise InputError(f"{folder} holds no images ({' '.join(EXTENSIONS)}) for its class")
    return sorted(images, key=lambda image: image[0])


def _leave_out(entry: os.DirEntry[str], why: str, ignored: dict[str, list[str]]) -> None:
    """Add an entry to `ignored`: of a folder all files in it, of what is hidden images alone.

    A folder that is a link or cannot be read is added itself.
    """

    def add(path: str) -> None:
        if why != _HIDDEN or path.lower().endswith(EXTENSIONS):
            ignored[why].append(path)

    if not entry.is_dir():
        add(entry.path)
    elif entry.is_symlink():
        ignored[why].append(entry.path)
    else:
        unread = lambda error: ignored[why].append(error.filename)  # noqa: E731
        for place, folders, files in os.walk(entry.path, onerror=unread):
            links = [name for name in folders if os.path.islink(os.path.join(place, name))]
            ignored[why] += [os.path.join(place, name) for name in links]
            for name in files:
                add(os.path.join(place, name))


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
