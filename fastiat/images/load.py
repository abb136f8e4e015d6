"""Load a data set by its name: a download, an image tree, a .beton file, or the digits."""

import hashlib
import importlib.resources
import logging
import os
import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from fastiat.engine.device import free_memory, own_defaults
from fastiat.images import downloads, tree
from fastiat.images.convert import cached, decoded, tree_source
from fastiat.images.dataset import Dataset, Split, StoredSplit, centred, in_memory, resized, stored
from fastiat.images.ffcv import installed
from fastiat.system.errors import DamagedError, InputError, one_line
from fastiat.system.ranks import ranks
from fastiat.system.settings import DATASETS, IN_PYTHON, expanded, is_beton
from fastiat.system.untrusted import read_npz

log = logging.getLogger(__name__)


def default_dir() -> Path:
    """Return the folder that data sets are read from and downloaded to if no folder is given."""
    return tree.cache_folder("data", "FASTIAT_DATA", "data sets with --data-dir or FASTIAT_DATA")


@own_defaults()
def load(
    name: str,
    data_dir: str | os.PathLike | None = None,
    *,
    progress: bool = True,
    loader: str = "resident",
    fetch: bool = True,
    image_size: int | None = None,
    context: bool = False,
) -> Dataset:
    """Return the data set `name`: one of `DATASETS`, or the path of a .beton.

    torchvision downloads `cifar10`, `cifar100`, `svhn` (73,257 training images, without the extra
    images) and `fashion-mnist`, and compares checksums. `folder` is an image tree, see
    `fastiat.images.tree`; it is decoded into a .beton in the cache. `digits` ships with the
    package: scikit-learn's 1,797 scans of 8x8 pixels, with values 0..16 scaled to 0..255; 1,437 of
    them are training images. The images of a .beton stay in the file.

    data_dir: the image tree, or the folder of downloads: else `$FASTIAT_DATA`, else
        `$XDG_CACHE_HOME/fastiat/data`, else `~/.cache/fastiat/data`. It may also be a .beton that
        was made from the data set, or the new folder or path of a .beton that was moved.
    progress: show progress bars if stderr is a terminal.
    loader: with "ffcv", the images of a tree may have any sizes, and stay in the cached file; with
        "auto", they stay there if FFCV is installed and they take more than half of the free
        memory. Otherwise they are read into memory.
    fetch: False downloads and unpacks nothing: a file that names a `data_dir`, such as the
        config.json of a run from an untrusted source, must not choose where files are written.
    image_size: side of all images in pixels. The images of a tree may then have any sizes and
        shapes (see `fastiat train --help`), those of other data sets are resized.
    context: the training images of a tree are not cut to `image_size` but keep 8/7 of it.

    Raises `InputError`, in one line, for an unknown name, a folder that does not exist, files that
    can neither be found nor downloaded (the message says where to put them) and a damaged file.
    """
    name = expanded(name)
    data_dir = None if data_dir is None else expanded(data_dir)
    if is_beton(name):
        path = name if data_dir is None else _moved(name, data_dir)
        return _sized(stored(path), image_size)
    if name == IN_PYTHON:
        raise InputError(
            "the run's images were given to fastiat.fit: name the images with --dataset and "
            "--data-dir, or measure in Python with fastiat.evaluate_model"
        )
    if name not in DATASETS:
        raise InputError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")
    if data_dir is not None and is_beton(data_dir) and not os.path.isdir(data_dir):
        return _sized(_stored_as(name, data_dir), image_size)
    if data_dir is not None:
        check_folder(name, data_dir)
    if name == "digits":
        return _sized(_digits(), image_size)
    # One rank of each machine downloads or decodes; the others then find its files.
    with ranks().local_rank_first():
        if name == "folder":
            return _load_folder(data_dir, loader, progress, image_size, context)
        root = default_dir() if data_dir is None else tree.root_of(data_dir)
        bars = progress and sys.stderr.isatty()
        return _sized(downloads.read(name, root, progress=bars, fetch=fetch), image_size)


def _sized(dataset: Dataset, image_size: int | None) -> Dataset:
    """Return a data set that is no image tree with its images resized to `image_size`."""
    if image_size is None or dataset.test.shape[1:] == (image_size, image_size):
        return dataset
    if dataset.stored:
        raise InputError(
            f"--image-size {image_size}: the images of {dataset.name} are stored with "
            f"{dataset.test.shape[1]} pixels; convert them again with --max-side {image_size}, or "
            f"name the folder that they were converted from"
        )
    train, test = (resized(split, image_size) for split in (dataset.train, dataset.test))
    return replace(dataset, train=train, test=test, known_fingerprint="")


def _load_folder(
    data_dir: str | os.PathLike[str] | None,
    loader: str,
    progress: bool,
    image_size: int | None,
    context: bool,
) -> Dataset:
    root = tree.root_of(data_dir)
    if downloads.held(root) and not os.path.isdir(root / "train"):
        raise InputError(f"{root} is not an image tree: it {downloads.looks_like(root)}")
    if image_size is None:
        return _load_tree(root, loader, progress)
    dataset = _load_tree(root, loader, progress, image_size)
    # The same for images in memory and in the file, and another for every side.
    digest = hashlib.sha256(f"{dataset.fingerprint()} {image_size} {context}".encode())
    return replace(
        dataset,
        train=dataset.train if context else centred(dataset.train, image_size),
        test=centred(dataset.test, image_size),
        known_fingerprint=digest.hexdigest()[:16],
        context=context,
    )


def _load_tree(root: Path, loader: str, progress: bool, photo: int | None = None) -> Dataset:
    """Return the image tree at `root`, which is decoded once into a .beton in the cache.

    photo: as for `fastiat.images.convert.write_beton`.

    The images stay in that file for the `loader` "ffcv", and for "auto" if FFCV is installed and
    the images take more than half of the free memory.
    """
    source = tree_source(root)
    write = partial(cached, source, resize=loader == "ffcv", progress=progress, photo=photo)
    try:
        dataset = write()
    except (tree.NoFolderError, OSError) as error:  # `OSError`: for example, the disk is full
        if loader == "ffcv":
            raise
        log.warning("no cache of the images (%s): the next run decodes them again", error)
        return decoded(source, photo)
    too_large = not fits(dataset.nbytes, torch.device("cpu"))
    if loader == "ffcv" or (loader == "auto" and too_large and installed()):
        return dataset
    try:
        return in_memory(dataset)
    except DamagedError as error:
        log.warning("the cache %s: it is written again", error)
        assert isinstance(dataset.train, StoredSplit)
        with suppress(OSError):  # a shared cache may be read-only
            dataset.train.file.path.unlink()
        return in_memory(write())


def _moved(name: str, data_dir: str) -> str:
    """Return the present path of the .beton `name`: in the folder `data_dir`, or `data_dir`."""
    if not os.path.isdir(data_dir):
        return data_dir if is_beton(data_dir) else str(tree.root_of(data_dir) / Path(name).name)
    place = os.path.join(data_dir, Path(name).name)
    if not os.path.exists(place):
        raise InputError(
            f"{data_dir} holds no {Path(name).name}: name the folder that holds it, or leave "
            f"--data-dir out if it is at {name}"
        )
    return place


def _stored_as(name: str, path: str) -> Dataset:
    """Return the data set in the .beton at `path`; raise `InputError` if it is not `name`."""
    dataset = stored(path)
    if name != "folder" and name != dataset.name and not dataset.name.startswith(f"{name}-"):
        raise InputError(f"{path} holds {dataset.name}, not {name}: give --dataset {path} alone")
    return dataset


def check_folder(name: str, data_dir: str | os.PathLike[str], *, chosen: bool = True) -> None:
    """Raise `InputError` if a data folder holds other images than those of the data set `name`.

    If the user has `chosen` the data set, only an image tree is an error, because several data sets
    may be downloaded to one folder. If `name` is the default, any other images are an error: the
    default data set is not downloaded beside them.
    """
    root = Path(expanded(data_dir))
    if not os.path.isdir(root) or name in downloads.held(root) or name == "folder":
        return
    if (tree.is_tree(root) or not chosen) and (looks := downloads.looks_like(root)):
        raise InputError(f"--data-dir {root} {looks} (the requested data set is {name})")


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
    # zipfile, NumPy and torch raise errors of any type for a damaged file.
    except Exception as error:
        raise InputError(
            f"{source} is damaged ({one_line(error)[:100]}): install fastiat again"
        ) from error


def fits(nbytes: int, device: torch.device, *, in_memory: bool = False) -> bool:
    """Whether images of `nbytes` bytes take at most half of the device's free memory.

    Images that are `in_memory` already always fit on the CPU.
    """
    if in_memory and device.type == "cpu":
        return True
    return nbytes <= free_memory(device) // 2
