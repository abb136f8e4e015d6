"""Writing .beton files: streamed, read back and compared, then renamed into place."""

import glob
import io
import json
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastiat.images import beton
from fastiat.system.errors import InputError
from fastiat.system.files import flush_folder
from fastiat.system.progress import Progress


def write(
    path: Path,
    labels: NDArray[np.int64],
    blobs: Iterable[bytes],
    **card: Any,
) -> beton.Card:
    """Write a .beton at `path`: beside it, read back and compared, then renamed onto it.

    labels: of all images, those to train on first; blobs: what is to be stored of each, in that
        order: side * side * 3 bytes, or a JPEG.
    card: the fields of `Card` but the fingerprint.

    Raises `InputError` if the file does not hold afterwards what was written to it.
    """
    draft = beton.Card(**card, fingerprint="")
    samples = np.zeros(len(labels), beton.SAMPLE)
    samples["image"]["mode"] = beton.MODES[draft.format]
    samples["image"]["width"] = samples["image"]["height"] = draft.side
    samples["label"] = labels
    allocations = np.zeros(len(labels), beton.ALLOCATION)
    allocations["sample_id"] = np.arange(len(labels))
    page = _page_size(draft.raw_size)
    fingerprint = beton.Fingerprint(labels, draft.n_train, draft.side, draft.channels)
    with replacing(path) as (part, file):
        at = beton.data_start(len(labels), page)
        file.seek(at)
        with Progress("converting", len(labels)) as progress:
            for i, blob in zip(range(len(labels)), blobs, strict=True):
                if at % page + len(blob) > page:  # no image lies on two pages
                    at = file.seek(beton.round_up(at, page))
                file.write(blob)
                allocations[i] = i, at, len(blob)
                at += len(blob)
                fingerprint.add(_seen(blob, draft))
                progress.advance(1)
        finished = beton.Card(**asdict(draft) | {"fingerprint": str(fingerprint)})
        text = json.dumps(asdict(finished)).encode()
        file.seek(beton.round_up(at, page))
        file.write(text + len(text).to_bytes(8, "little") + beton.MAGIC)
        header = np.zeros((), beton.HEADER)
        header["version"], header["num_fields"] = beton.VERSION, len(beton.FIELDS)
        header["page_size"], header["num_samples"] = page, len(labels)
        header["alloc_table_ptr"] = file.tell()
        file.write(allocations.tobytes())
        samples["image"]["data_ptr"] = allocations["ptr"]
        file.seek(0)
        file.write(header.tobytes() + beton.field_table().tobytes() + samples.tobytes())
        file.flush()
        os.fsync(file.fileno())
        check(part, labels, finished)
    return finished


def _seen(blob: bytes, card: beton.Card) -> bytes | NDArray[np.uint8]:
    """Return what of a stored image counts for the fingerprint."""
    if card.format == "jpeg" or card.channels == 3:
        return blob
    return np.frombuffer(blob, np.uint8)[::3]


def check(path: Path, labels: NDArray[np.int64], card: beton.Card) -> None:
    """Read a file that was just written back, all images, or raise `InputError`.

    Raw pixels and the JPEGs' bytes must be those that were written, and every JPEG must decode.
    """
    opened = beton.open_beton(path)
    fingerprint = beton.Fingerprint(opened.labels, card.n_train, card.side, card.channels)
    decode = _any_decoder() if card.format == "jpeg" else None
    pixels = np.empty((card.side, card.side, 3), np.uint8)
    with Progress("checking", len(opened)) as progress:
        for blob in opened.blobs(range(len(opened))):
            fingerprint.add(_seen(blob, card))
            if decode is not None and not decode(blob, pixels):
                raise InputError(f"{path} cannot be decoded again: convert anew")
            progress.advance(1)
    if str(fingerprint) != card.fingerprint or not np.array_equal(opened.labels, labels):
        raise InputError(f"{path} does not hold what was written to it: check the disk")


def _any_decoder() -> Callable[[bytes, NDArray[np.uint8]], bool]:
    """Return FFCV's decoder, or Pillow's where FFCV is not installed."""
    with suppress(InputError):
        return beton.jpeg_decoder()

    def decode(blob: bytes, pixels: NDArray[np.uint8]) -> bool:
        with suppress(OSError, SyntaxError), Image.open(io.BytesIO(blob), formats=["JPEG"]) as jpeg:
            jpeg.load()
            return jpeg.size == pixels.shape[1::-1] and jpeg.mode == "RGB"
        return False

    return decode


@contextmanager
def replacing(path: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    """Give a file beside `path`, renamed onto it if the block ends well, else removed.

    What a process of this machine that was killed has left beside `path` is removed, too.
    """
    host = socket.gethostname().replace(".", "-")
    for left in path.parent.glob(f".{glob.escape(path.name)}.{glob.escape(host)}.*.part"):
        pid = left.name.split(".")[-2]
        if pid.isdecimal() and not os.path.exists(f"/proc/{pid}") and os.path.isdir("/proc/self"):
            left.unlink(missing_ok=True)
    part = path.with_name(f".{path.name}.{host}.{os.getpid()}.part")
    try:
        with open(part, "w+b") as file:
            yield part, file
        os.replace(part, path)
    except BaseException as error:
        with suppress(OSError):  # where nothing can be written, nothing can be removed
            part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    flush_folder(path.parent)


def _page_size(image: int) -> int:
    """Return a page of which images of so many bytes waste a tenth at the most."""
    page = beton.SMALLEST_PAGE
    while page < 10 * image:
        page *= 2
    return page
