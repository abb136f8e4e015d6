"""List the files of image trees, `train/<class>/*` and `test/<class>/*`.

Rules for the contents of a tree:

- The classes are the sorted names of the folders. Both splits have the same two or more classes.
- The images are the files directly in a class folder whose extension is in `EXTENSIONS`, in upper
  or lower case; symbolic links are followed. A warning counts the ignored files: images outside
  `train` and `test`, files beside the class folders, files in folders within a class, files without
  such an extension, and images with a hidden name. A broken link is an error if it may be an image
  or a class.
- All images are squares of one size, 8x8 pixels or larger, unless `fastiat convert` or the FFCV
  loader resizes them. The first frame of an animation is used.
- A tree has 3 channels if any of its images is a colour image; the channel of grey images is then
  repeated. Bilevel images count as grey. The high byte of 16-bit grey is kept. Palettes, CMYK and
  other modes are converted to RGB.
- The orientation in EXIF or XMP is applied, so that an image is read as viewers show it.
- An alpha channel is dropped if all pixels are opaque. An image with transparent pixels is an
  error, because its background is unknown.
"""

import contextlib
import ctypes
import hashlib
import itertools
import logging
import multiprocessing
import os
import signal
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

_PNM = (".ppm", ".pgm", ".pbm", ".pnm")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", *_PNM)
SPLITS = ("train", "test")

CHUNK = 128
"""Number of images in a task of a worker process."""
PARALLEL_FROM = 2000
"""Number of images from which starting worker processes saves time."""
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h
CLOCK_TICK = 20_000_000
"""Upper bound, in nanoseconds, for the resolution of the clock that gives files their times."""

# Reasons why files are ignored, as the warning states them.
_OUTSIDE = "outside train and test"
_BESIDE = "beside the class folders"
_NESTED = "in folders within a class"
_HIDDEN = "hidden"
_UNKNOWN = f"without an image's extension ({' '.join(EXTENSIONS)})"

T = TypeVar("T")

log = logging.getLogger(__name__)


def root_of(data_dir: str | os.PathLike | None) -> Path:
    """Return `data_dir` as a path; raise `InputError` unless it is a folder that can be read."""
    if data_dir is None:
        raise InputError(
            "the data set 'folder' needs a data folder (--data-dir) with "
            "train/<class>/ and test/<class>/ in it"
        )
    root = Path(expanded(data_dir))
    if not os.path.exists(root):  # Path.exists raises for a path that is too long
        raise InputError(f"the data folder {root} does not exist: create it or name another")
    if not os.path.isdir(root):
        raise InputError(f"the data folder {root} is a file: name the folder that holds it")
    if not os.access(root, os.R_OK | os.X_OK):
        raise InputError(f"the data folder {root} cannot be read: check its permissions")
    return root


class NoFolderError(InputError):
    """No folder is available for a cache to be written to."""


def cache_folder(name: str, variable: str, purpose: str) -> Path:
    """Return the folder `$variable`, else `$XDG_CACHE_HOME/fastiat/name`, else in `~/.cache`.

    It need not exist. Raises `NoFolderError`, whose message `purpose` completes, if none is set.
    """
    if given := os.environ.get(variable):
        return Path(expanded(given))
    try:
        cache = expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    except InputError:
        raise NoFolderError(f"there is no home folder: name a folder for {purpose}") from None
    return Path(cache) / "fastiat" / name


def warn_ignored(listing: "Listing") -> None:
    """Log a warning, on the first rank, if files of the tree are not in the listing."""
    if not listing.ignored or not ranks().first:
        return
    reasons = (
        f"{len(paths)} {'file' if len(paths) == 1 else 'files'} {why}, the first is "
        f"{printable(paths[0])}"
        for why, paths in listing.ignored.items()
    )
    log.warning("%s, left out: %s", listing.root, "; ".join(reasons))


def looks_like(root: Path) -> str:
    """Return which part of an image tree a folder seems to be, with a remedy; "" for neither."""
    inside = _entries(root)
    if is_tree(root):
        return "is an image tree (train/<class>/*, test/<class>/*): add --dataset folder"
    if inner := _tree_below(root):
        return f"holds the image tree {inner}: give --dataset folder --data-dir {inner}"
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


def is_tree(folder: Path) -> bool:
    """Whether a folder has the two folders of an image tree."""
    return all(os.path.isdir(folder / split) for split in SPLITS)


def _tree_below(root: Path) -> Path | None:
    """Return the first image tree one or two levels below a folder, or None."""
    below = [root / name for name in _entries(root)]
    inner = (place / name for place in below for name in _entries(place)[:10])
    return next(filter(is_tree, itertools.chain(below, inner)), None)


def _entries(folder: Path) -> list[str]:
    """Return up to 1,000 names in a folder, without hidden ones; [] if it cannot be read."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        return [e.name for e in itertools.islice(entries, 1000) if not e.name.startswith(".")]
    return []


def _has_images(names: list[str]) -> bool:
    return any(name.lower().endswith(EXTENSIONS) for name in names)


@dataclass(frozen=True)
class Listing:
    """The classes and image files of a tree, training images first."""

    root: Path
    classes: tuple[str, ...]
    paths: list[str]
    labels: NDArray[np.int64]
    n_train: int
    ignored: dict[str, list[str]]
    """The ignored files: {reason: paths}."""
    digest: str
    """SHA-256 over each image's path in the tree, size, inode, modification time and change time.
    No program can set the change time (ctime), so the digest changes even if files are swapped."""


def scan(root: Path) -> Listing:
    """List a tree; raise `InputError` if its folders or names break the rules or are unreadable."""
    try:
        return _scan(root)
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error


def _scan(root: Path) -> Listing:
    ignored: dict[str, list[str]] = {
        reason: [] for reason in (_OUTSIDE, _BESIDE, _NESTED, _HIDDEN, _UNKNOWN)
    }
    names = {split: _class_names(root, split, ignored) for split in SPLITS}
    ignored[_OUTSIDE] = _images_outside(root)
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
    digest = hashlib.sha256()
    n_train, newest = 0, 0
    for split in SPLITS:
        for label, name in enumerate(classes):
            for entry in _images(root / split / name, ignored):
                status = entry.stat()
                stamp = status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
                newest = max(newest, status.st_ctime_ns)
                digest.update(os.fsencode(f"\0{split}/{name}/{entry.name}\0{stamp}"))
                paths.append(entry.path)
                labels.append(label)
        n_train = n_train or len(paths)
    if time.time_ns() - newest < CLOCK_TICK:
        # Wait for the clock's next step: a file that changes after this listing must get another
        # change time than the one in the digest.
        time.sleep(CLOCK_TICK / 1e9)
    left_out = {why: sorted(found) for why, found in ignored.items() if found}
    everything = np.array(labels, np.int64)
    return Listing(root, classes, paths, everything, n_train, left_out, digest.hexdigest())


def _class_names(root: Path, split: str, ignored: dict[str, list[str]]) -> set[str]:
    if not os.path.isdir(root / split):
        inner, form = _tree_below(root), "train/<class>/* and test/<class>/*"
        remedy = f"name {inner}, which has one" if inner else f"an image tree is {form}"
        raise InputError(f"{root} has no folder {split!r}: {remedy}")
    names = set()
    for entry in _visible(root / split, ignored, of_classes=True):
        if entry.is_dir():
            names.add(entry.name)
        else:
            ignored[_BESIDE].append(entry.path)
    if not names:
        raise InputError(f"{root / split} has no class folders: put images in {split}/<class>/")
    return names


def _images_outside(root: Path) -> list[str]:
    """Return the images of a tree, by their names, that are in neither of its splits."""
    found: list[str] = []
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.name not in SPLITS and not entry.name.startswith("."):
                found += _files_below(entry) if entry.is_dir() else [entry.path]
    return [path for path in found if path.lower().endswith(EXTENSIONS)]


def _images(folder: Path, ignored: dict[str, list[str]]) -> list[os.DirEntry[str]]:
    """Return the images of a class, sorted by name; add all other files to `ignored`."""
    images = []
    for entry in _visible(folder, ignored):
        if entry.is_dir():
            ignored[_NESTED] += _files_below(entry)
        elif not entry.name.lower().endswith(EXTENSIONS):
            ignored[_UNKNOWN].append(entry.path)
        elif not entry.is_file():
            raise InputError(f"{entry.path} is not a file: remove it")
        else:
            images.append(entry)
    if not images:
        raise InputError(f"{folder} holds no images ({' '.join(EXTENSIONS)}) for its class")
    return sorted(images, key=lambda entry: entry.name)


def _visible(
    folder: Path, ignored: dict[str, list[str]], *, of_classes: bool = False
) -> Iterator[os.DirEntry[str]]:
    """Yield the entries of a folder that are not hidden, and add hidden images to `ignored`.

    Raises `InputError` for a broken link that may be an image or, with `of_classes`, a class.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            hidden = entry.name.startswith(".")
            named_like_image = entry.name.lower().endswith(EXTENSIONS)
            wanted = of_classes or (named_like_image and not hidden)
            if wanted and entry.is_symlink() and not os.path.exists(entry.path):
                raise InputError(f"{entry.path} is a link to nothing: mount or remove it")
            if not hidden:
                yield entry
            elif not entry.is_dir():
                ignored[_HIDDEN] += [entry.path] if named_like_image else []
            else:
                ignored[_HIDDEN] += [
                    path
                    for path in _files_below(entry)
                    if path.lower().endswith(EXTENSIONS) or os.path.isdir(path)
                ]


def _files_below(folder: os.DirEntry[str]) -> list[str]:
    """Return the paths of all files below a folder.

    A folder that is a link or cannot be read is returned itself, in place of its files.
    """
    if folder.is_symlink():
        return [folder.path]
    found: list[str] = []

    def unreadable(error: OSError) -> None:
        found.append(error.filename)

    for place, folders, files in os.walk(folder.path, onerror=unreadable):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        found += [os.path.join(place, name) for name in (*files, *links)]
    return found


@contextlib.contextmanager
def mapped(
    work: Callable[[list[str]], T], paths: list[str], chunk: int = CHUNK
) -> Iterator[Iterable[T]]:
    """Yield the results of `work` on `paths`, one result for each chunk of paths, in order.

    Worker processes compute them if there are `PARALLEL_FROM` or more paths, at most four chunks
    per worker ahead, to bound the memory. Raises `InputError` if a worker was killed.
    """
    chunks = (paths[i : i + chunk] for i in range(0, len(paths), chunk))
    workers = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    if workers == 1 or len(paths) < PARALLEL_FROM:
        yield map(work, chunks)
        return
    # Processes, not threads: decoding small images holds the GIL most of the time.
    # Forked, not spawned: a caller's script then needs no `if __name__ == "__main__"`. The workers
    # call neither torch nor CUDA, which a fork could break.
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
        raise InputError("a process that decodes images was killed: free some memory") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _follow_parent(parent: int) -> None:
    """Set up a worker: it ignores Ctrl-C, which the parent handles, and ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(OSError, AttributeError):  # this C library has no prctl
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before prctl was called
        os._exit(1)
