"""Write .beton files image by image; read each file back and compare, then rename it into place."""

import glob
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastiat.images import beton
from fastiat.system.errors import InputError
from fastiat.system.files import replacing, temporary_prefix
from fastiat.system.progress import Progress


class Fingerprint:
    """`Dataset.fingerprint`, computed image by image; for JPEGs, over their encoded bytes."""

    def __init__(self, labels: NDArray[np.int64], card: beton.Card) -> None:
        self._digest, self._left, self._card = hashlib.sha256(), 0, card
        self._splits = [labels[: card.n_train], labels[card.n_train :]]

    def add(self, blob: bytes) -> None:
        """Add the next stored image."""
        card = self._card
        if not self._left:
            labels = self._splits.pop(0)
            self._digest.update(str((len(labels), card.side, card.side, card.channels)).encode())
            self._digest.update(np.ascontiguousarray(labels, np.int64).data)
            self._left = len(labels)
        # A grey image is stored as three equal channels; the `Dataset` has only one of them.
        grey = card.format == "raw" and card.channels == 1
        self._digest.update(blob[::3] if grey else blob)
        self._left -= 1

    def __str__(self) -> str:
        return self._digest.hexdigest()[:16]


def write(
    path: Path, labels: NDArray[np.int64], blobs: Iterable[bytes], *, progress: bool = True,
    **card: Any,
) -> beton.Card:  # fmt: skip
    """Write a .beton beside `path`, read it back, compare, and rename it to `path`.

    labels: (N,) int64, training images first.
    blobs: the N images in their stored form: side * side * 3 raw bytes each, or JPEGs.
    card: the fields of `Card` except the fingerprint.

    Returns the card with its fingerprint. Raises `InputError` if the file that is read back differs
    from the data that were written.
    """
    draft = beton.Card(**card, fingerprint="")
    samples = np.zeros(len(labels), beton.SAMPLE)
    samples["image"]["mode"] = beton.MODES[draft.format]
    samples["image"]["width"] = samples["image"]["height"] = draft.side
    samples["label"] = labels
    allocations = np.zeros(len(labels), beton.ALLOCATION)
    allocations["sample_id"] = np.arange(len(labels))
    page = _page_size(draft.raw_size)
    fingerprint = Fingerprint(labels, draft)
    remove_unfinished(path)
    with replacing(path) as file:
        at = beton.data_start(len(labels), page)
        file.seek(at)
        shown = _shown("converting", blobs, len(labels), progress)
        for i, blob in zip(range(len(labels)), shown, strict=True):
            # FFCV reads whole pages, so an image must not extend over a page boundary.
            if at % page + len(blob) > page:
                at = file.seek(beton.round_up(at, page))
            file.write(blob)
            allocations[i] = i, at, len(blob)
            at += len(blob)
            fingerprint.add(blob)
        finished = replace(draft, fingerprint=str(fingerprint))
        text = json.dumps(asdict(finished)).encode()
        file.seek(beton.round_up(at, page))
        file.write(text + len(text).to_bytes(8, "little") + beton.MAGIC)
        header = np.zeros((), beton.HEADER)
        header["version"], header["num_fields"] = beton.VERSION, len(beton.FIELDS)
        header["page_size"], header["num_samples"] = page, len(labels)
        header["alloc_table_ptr"] = file.tell()
        file.write(allocations.tobytes())
        # The head of the file holds the positions of the images, so it is written last.
        samples["image"]["data_ptr"] = allocations["ptr"]
        file.seek(0)
        file.write(header.tobytes() + beton.field_table().tobytes() + samples.tobytes())
        file.flush()
        check(Path(file.name), labels, finished, progress)
    return finished


def check(path: Path, labels: NDArray[np.int64], card: beton.Card, progress: bool) -> None:
    """Read back all images of a file that was just written.

    Raises `InputError` if labels, raw pixels or bytes of JPEGs differ from those that were written,
    or if a JPEG cannot be decoded.
    """
    opened = beton.open_beton(path)
    fingerprint = Fingerprint(opened.labels, card)
    decode = _any_decoder() if card.format == "jpeg" else None
    pixels = np.empty((card.side, card.side, 3), np.uint8)
    for blob in _shown("checking", opened.blobs(range(len(opened))), len(opened), progress):
        fingerprint.add(blob)
        if decode is not None and not decode(blob, pixels):
            raise InputError(f"{path} has a JPEG that cannot be decoded: convert again")
    if str(fingerprint) != card.fingerprint or not np.array_equal(opened.labels, labels):
        raise InputError(f"{path} differs from the data written to it: check the disk")


def _shown(title: str, blobs: Iterable[bytes], total: int, shown: bool) -> Iterable[bytes]:
    """Return the blobs; if `shown`, iterating over them advances a progress bar."""

    def with_bar() -> Iterator[bytes]:
        with Progress(title, total) as progress:
            for blob in blobs:
                yield blob
                progress.advance(1)

    return with_bar() if shown else blobs


def _any_decoder() -> Callable[[bytes, NDArray[np.uint8]], bool]:
    """Return FFCV's JPEG decoder, or Pillow's if FFCV is not installed."""
    with suppress(InputError):
        return beton.jpeg_decoder()

    def decode(blob: bytes, pixels: NDArray[np.uint8]) -> bool:
        with suppress(OSError, SyntaxError), Image.open(io.BytesIO(blob), formats=["JPEG"]) as jpeg:
            jpeg.load()
            return jpeg.size == pixels.shape[1::-1] and jpeg.mode == "RGB"
        return False

    return decode


def remove_unfinished(path: Path) -> None:
    """Remove the unfinished copies of `path` that killed processes of this machine have left."""
    for left in path.parent.glob(f"{glob.escape(temporary_prefix(path))}*.part"):
        pid = left.name.split(".")[-2]
        if pid.isdecimal() and not os.path.exists(f"/proc/{pid}") and os.path.isdir("/proc/self"):
            left.unlink(missing_ok=True)


def _page_size(image: int) -> int:
    """Return a page size of which at most a tenth stays unused for images of `image` bytes."""
    page = beton.SMALLEST_PAGE
    while page < 10 * image:
        page *= 2
    return page
