"""Further training images (`--extra`), such as generated ones: the file and the order in batches.

The file has the layout of Wang et al. 2023: `image`, (N, H, W, C) uint8, and `label`, (N,) whole
numbers. Every batch takes the same number of its images, as in Gowal et al. 2021.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastiat.engine.device import free_memory
from fastiat.images.dataset import Dataset, Split, resized
from fastiat.system.errors import InputError, one_line, out_of_memory, printable
from fastiat.system.untrusted import is_endless, kind_of, read_npz

LAYOUT = "give a .npz file with image, (N, H, W, C) uint8, and label, (N,) whole numbers"


class ExtraImages:
    """The further images of a training, on its device, and the order in which batches take them.

    `share` is the number of images that each batch of all ranks takes. An image is taken again only
    after every other one has been taken; each pass over the images has another order.

    A pass may end within an epoch or last for several. So that a resume needs no position in it,
    the order of a pass depends only on the number of the pass and on a seed, which is drawn from
    `order` here. None means torch's default generator.
    """

    def __init__(
        self, split: Split, share: int, device: torch.device, order: torch.Generator | None = None
    ) -> None:
        self.images, self.labels = split.images.to(device), split.labels.to(device)
        self.share = share
        self.seed = int(torch.randint(2**63 - 1, (), generator=order))

    def picked(self, batches: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all images, (N, H, W, C) uint8, and the indices (B,) of each row of `batches`."""
        return ((self.images, index) for index in batches.to(self.images.device))

    def batches(self, first: int, count: int) -> Tensor:
        """Return the positions of the images of `count` batches, from number `first` of a training.

        The result is (count, share) int64, on the CPU; `count` is 1 or more.
        """
        size = len(self.labels)
        start, stop = first * self.share, (first + count) * self.share
        parts = [
            self._order(number)[max(start - number * size, 0) : stop - number * size]
            for number in range(start // size, (stop - 1) // size + 1)
        ]
        return torch.cat(parts).view(count, self.share)

    def _order(self, number: int) -> Tensor:
        """Return the order, (N,) int64, of pass `number` over the images, counted from 0."""
        (seed,) = np.random.SeedSequence((self.seed, number)).generate_state(1, np.uint64).tolist()
        return torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed >> 1))


def load_extra(path: str | os.PathLike[str], dataset: Dataset, image_size: int | None) -> Split:
    """Read the further training images of a data set from a .npz file.

    With `image_size`, square images of another side are resized to the side of the training images.

    Raises `InputError`, in one line, for a file that is missing, damaged or of another layout, and
    for images and labels that do not fit the data set.
    """
    file = Path(path)
    try:
        images, labels = _read(file)
    except InputError as error:
        raise InputError(f"--extra {file}: {error}") from None
    low, high, count = int(labels.min()), int(labels.max()), len(dataset.classes)
    if low < 0 or high >= count:
        raise InputError(
            f"--extra {file}: its labels are from {low} to {high}, but {dataset.name} has {count} "
            f"classes: give labels from 0 to {count - 1}"
        )
    split = Split(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)))
    (channels, height, width), (wanted, side, _) = split.shape, dataset.train.shape
    if image_size is not None and height == width and channels == wanted:
        return resized(split, side)
    if split.shape != dataset.train.shape:
        raise InputError(
            f"--extra {file}: its images have {height}x{width} pixels and {channels} "
            f"channel{'s' * (channels != 1)}, but those of {dataset.name} have {side}x{side} "
            f"pixels and {wanted}: give images of that shape"
        )
    return split


def _read(file: Path) -> tuple[NDArray[np.uint8], NDArray[np.integer[Any]]]:
    """Return the images and labels in a .npz file; an `InputError` does not name the file."""
    try:
        if is_endless(file):
            raise InputError(f"it is a pipe or a device: {LAYOUT}")
        with open(file, "rb") as opened:
            is_zip = opened.read(2) == b"PK"
        if not is_zip:
            raise InputError(f"it is {kind_of(file) or 'a safetensors file'}: {LAYOUT}")
        arrays = read_npz(file, free_memory(torch.device("cpu")), names=("image", "label"))
    except InputError:
        raise
    # zipfile and NumPy raise errors of any type for a damaged file.
    except Exception as error:
        if out_of_memory(error):
            raise InputError("its images do not fit into memory: give fewer") from None
        if isinstance(error, OSError) and error.errno:
            raise InputError(f"it cannot be read ({error.strerror}): {LAYOUT}") from None
        reason = one_line(error)[:100]
        raise InputError(f"it is damaged ({reason}): download or write it again") from None
    images, labels = arrays["image"], arrays["label"]
    if images.dtype != np.uint8 or images.ndim != 4:
        raise InputError(f"image is {_named(images)}: {LAYOUT}")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise InputError(f"label is {_named(labels)}, for {len(images)} images: {LAYOUT}")
    if not images.size:
        raise InputError(f"it is empty, its image has shape {images.shape}: {LAYOUT}")
    return images, labels


def _named(array: NDArray[Any]) -> str:
    """Return the type and shape of an array, as text."""
    return f"{printable(array.dtype)[:50]} of shape {array.shape}"
