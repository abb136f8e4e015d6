"""FFCV's .beton files: their layout, the checks before a file is used, reading without FFCV.

A .beton of fastiat has the fields "image" (RGB, raw or JPEG) and "label" (integer), and FFCV's own
loader can read it. Training images come first. All images are squares of the same side; a grey
image is stored as three equal channels. The `Card` is stored between the images and FFCV's
allocation table, where FFCV does not read. It consists of JSON, the length of the JSON in 8 bytes
(little-endian), and `MAGIC`.

All numbers in the file are little-endian. Positions are bytes from the start of the file.
"""

import ctypes
import io
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastiat.images.pixels import quiet
from fastiat.system.errors import InputError
from fastiat.system.settings import expanded, validated

# Copies of the types in `ffcv.types` and in FFCV's RGB image and integer fields, so that a file can
# be checked and read without FFCV.
HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"),
     ("alloc_table_ptr", "<u8")], align=True,
)  # fmt: skip
FIELD = np.dtype([("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)], align=True)
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
SAMPLE = np.dtype([("image", IMAGE), ("label", "<i8")], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
VERSION = 2
FIELDS = {"image": 2, "label": 1}
"""The names of the fields, with FFCV's number for each field type."""
MODES = {"jpeg": 0, "raw": 1}
"""FFCV's number for each way to store an image."""

MAGIC = b"fastiat1"
LONGEST_CARD = 1 << 24
"""Largest size of a card, in bytes."""
SMALLEST_PAGE, LARGEST_PAGE = 1 << 21, 1 << 31
"""Limits of FFCV's page size, in bytes."""
LARGEST_SIDE = 4096
"""Largest side of an image, in pixels."""
CHECKED_JPEGS = 1024
"""Number of JPEGs whose header is checked when a file is opened; decoding checks every JPEG."""
CHUNK = 1 << 23
"""Bytes of raw images in one task of a conversion."""

Format = Literal["raw", "jpeg"]


@dataclass(frozen=True)
class Card:
    """The metadata that fastiat stores in a .beton in addition to FFCV's own."""

    name: str
    """Name of the data set, as recorded in results."""
    classes: tuple[str, ...]
    """Names of the classes, indexed by label."""
    flip: bool
    """Whether training mirrors images at random."""
    channels: int
    """1 for grey images, 3 for colour images; three channels are stored in both cases."""
    side: int
    """Height and width of every image, in pixels."""
    n_train: int
    """Number of training images, which come first."""
    format: Format
    quality: int
    """JPEG quality, 0 to 100; not used for raw images."""
    fingerprint: str
    """`Dataset.fingerprint` of raw images; for JPEGs, the same digest over the encoded bytes."""
    source: str
    """Identifies the source images: the digest of a tree's listing, or a data set's fingerprint."""
    fastiat: str
    """Version of fastiat that wrote the file."""

    @property
    def raw_size(self) -> int:
        """Size of one raw image in the file, in bytes."""
        return 3 * self.side**2


@dataclass(frozen=True, eq=False)
class Beton:
    """A checked .beton file.

    `labels` is (N,) int64. `ptrs` and `sizes`, (N,) uint64, are the position and the size of each
    stored image, in bytes.
    """

    path: Path
    card: Card
    labels: NDArray[np.int64]
    ptrs: NDArray[np.uint64]
    sizes: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.labels)

    def blobs(self, index: Iterable[int]) -> Iterator[bytes]:
        """Yield the stored bytes of the images at `index`.

        Raises `InputError` if the file was truncated after it was opened.
        """
        with open(self.path, "rb", buffering=0) as file:
            for i in index:
                blob = os.pread(file.fileno(), int(self.sizes[i]), int(self.ptrs[i]))
                if len(blob) != self.sizes[i]:
                    raise refusal(self.path, "it is truncated")
                yield blob

    def read(self, index: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the images at `index`, (M,), as (M, H, W, C) uint8.

        JPEGs need FFCV, whose decoder gives the pixels of its loader. Raises `InputError` if it is
        not installed, for a damaged JPEG and for a truncated file.
        """
        side, channels = self.card.side, self.card.channels
        images = np.empty((len(index), side, side, channels), np.uint8)
        pixels = np.empty((side, side, 3), np.uint8)
        jpeg = self.card.format == "jpeg"
        decode = jpeg_decoder() if jpeg else None
        for i, blob in zip(range(len(index)), self.blobs(index.tolist()), strict=True):
            if decode is None:
                image = np.frombuffer(blob, np.uint8).reshape(side, side, 3)
            else:
                if not decode(blob, pixels):
                    raise refusal(self.path, f"its image {index[i]} is damaged")
                image = pixels
            images[i] = image[..., :channels]
        return images


@cache
def jpeg_decoder() -> Callable[[bytes, NDArray[np.uint8]], bool]:
    """Return FFCV's JPEG decoder, a function of (JPEG bytes, output (H, W, 3) uint8).

    The decoder fills the output and returns True, or returns False for a damaged JPEG. Raises
    `InputError` if FFCV is not installed.
    """
    from fastiat.images.ffcv import import_ffcv

    import_ffcv()
    from ffcv.libffcv import ctypes_imdecode

    def decode(blob: bytes, pixels: NDArray[np.uint8]) -> bool:
        height, width, _ = pixels.shape
        source = ctypes.cast(ctypes.c_char_p(blob), ctypes.c_void_p)
        target = pixels.ctypes.data_as(ctypes.c_void_p)
        # Size and offset of the crop, scale as a fraction, whether to crop, whether to mirror.
        whole = (height, width, 0, 0, 1, 1, False, False)
        return ctypes_imdecode(source, len(blob), height, width, target, *whole) == 0

    return decode


def open_beton(path: str | os.PathLike[str]) -> Beton:
    """Open a .beton and check every position and size in it: FFCV would crash for a wrong one.

    Raises `InputError`, in one line that names the file, if the file is missing, unreadable or
    damaged, or was not written by fastiat.
    """
    path = Path(expanded(path)).absolute()
    try:
        # O_NONBLOCK: to open a named pipe would wait for a writer.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise InputError(f"{path} is not a file: name a .beton")
            return _open(path, file)
    except FileNotFoundError:
        raise InputError(
            f"{path} does not exist: name its new place with --data-dir if it was moved, or write "
            f"it with fastiat convert DATASET {path.name}"
        ) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except InputError:
        raise
    # NumPy and json raise these for a damaged file.
    except (ValueError, TypeError, RecursionError, MemoryError, OverflowError) as error:
        raise refusal(path, f"it is damaged ({str(error)[:60]})") from None


def _open(path: Path, file: IO[bytes]) -> Beton:
    size = os.fstat(file.fileno()).st_size

    def read(dtype: Any, count: int, at: int) -> NDArray[Any]:
        end = at + count * np.dtype(dtype).itemsize
        if not 0 <= at <= end <= size:
            raise refusal(path, "it is truncated")
        return np.fromfile(file, dtype, count, offset=at - file.tell())

    header = read(HEADER, 1, 0)[0]
    n, page, table = (int(header[name]) for name in ("num_samples", "page_size", "alloc_table_ptr"))
    fields = read(FIELD, len(FIELDS), HEADER.itemsize)
    ours = field_table()
    if (
        (header["version"], header["num_fields"]) != (VERSION, len(FIELDS))
        or not np.array_equal(fields["type_id"], ours["type_id"])
        or not np.array_equal(fields["name"], ours["name"])
    ):
        raise refusal(path, "it is not a .beton of fastiat, with an image and a label field")
    if page & (page - 1) or not SMALLEST_PAGE <= page <= LARGEST_PAGE:
        raise refusal(path, f"its page size is {page}")
    if table + n * ALLOCATION.itemsize < size:
        raise refusal(path, "it has bytes after its end")
    start, tail = data_start(n, page), len(MAGIC) + 8
    if n < 2 or table < start + tail:
        raise refusal(path, "it is truncated")
    ending = read(np.uint8, tail, table - tail).tobytes()
    length = int.from_bytes(ending[:8], "little")
    end = table - tail - length
    if ending[8:] != MAGIC or length > LONGEST_CARD or end < start:
        raise refusal(path, "it is not a .beton of fastiat: fastiat's metadata are missing")
    card = _card(path, read(np.uint8, length, end).tobytes(), n)
    samples = read(SAMPLE, n, HEADER.itemsize + fields.nbytes)
    allocations = read(ALLOCATION, n, table)
    _check_samples(path, card, samples, allocations, start, end)
    beton = Beton(
        path, card, samples["label"].astype(np.int64), allocations["ptr"].copy(),
        allocations["size"].copy(),
    )  # fmt: skip
    if card.format == "jpeg":
        _check_jpegs(beton)
    return beton


def _card(path: Path, text: bytes, n: int) -> Card:
    try:
        card: Card = validated(json.loads(text), Card)
    except (InputError, ValueError, RecursionError, TypeError) as error:
        raise refusal(path, f"its metadata are damaged ({str(error)[:60]})") from None
    good = (
        card.channels in (1, 3)
        and 1 <= card.side <= LARGEST_SIDE
        and 1 <= card.n_train < n
        and len(card.classes) >= 2
    )
    if not good:
        raise refusal(path, "its metadata do not match its images")
    return card


def _check_samples(
    path: Path, card: Card, samples: NDArray[Any], allocations: NDArray[Any], start: int, end: int
) -> None:
    image, ptrs, sizes = samples["image"], allocations["ptr"], allocations["size"]
    if (image["mode"] != MODES[card.format]).any():
        raise refusal(path, f"not all of its images are {card.format}")
    if (image["width"] != card.side).any() or (image["height"] != card.side).any():
        raise refusal(path, f"not all of its images are {card.side}x{card.side}")
    labels = samples["label"]
    if labels.min() < 0 or labels.max() >= len(card.classes):
        raise refusal(path, f"it has labels outside its {len(card.classes)} classes")
    # Check the bounds first, because the sum of uint64 positions and sizes below must not overflow.
    inside = (ptrs >= start).all() and (ptrs < end).all() and (sizes <= end).all()
    if card.format == "raw":
        inside = inside and (sizes == card.raw_size).all()
    else:
        inside = inside and (sizes > 0).all()
    ends = ptrs + sizes
    inside = inside and (ends[:-1] <= ptrs[1:]).all() and ends[-1] <= end
    matching = (allocations["sample_id"] == np.arange(len(ptrs))).all()
    if not (inside and matching and np.array_equal(image["data_ptr"], ptrs)):
        raise refusal(path, "its images are not at the positions that it records")


def _check_jpegs(beton: Beton) -> None:
    """Check size and mode in the headers of about `CHECKED_JPEGS` JPEGs, spread over the file."""
    side = beton.card.side
    every = range(0, len(beton), -(-len(beton) // CHECKED_JPEGS))
    for i, blob in zip(every, beton.blobs(every), strict=True):
        try:
            with quiet(), Image.open(io.BytesIO(blob), formats=["JPEG"]) as jpeg:
                good = jpeg.size == (side, side) and jpeg.mode == "RGB"
        except Exception:  # Pillow's readers raise errors of any kind for a damaged file
            good = False
        if not good:
            raise refusal(beton.path, f"its image {i} is not a JPEG of {side}x{side} pixels")


def refusal(path: Path, reason: str) -> InputError:
    """Return the error for a .beton that cannot be used; the remedy is to convert again."""
    return InputError(
        f"{path} cannot be used, {reason}: write it again with fastiat convert DATASET {path.name}"
    )


def field_table() -> NDArray[Any]:
    """Return the (2,) `FIELD` records of the two fields, as FFCV stores them."""
    table = np.zeros(len(FIELDS), FIELD)
    for row, (name, type_id) in zip(table, FIELDS.items(), strict=True):
        row["type_id"] = type_id
        row["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
    return table


def data_start(n: int, page: int) -> int:
    """Return the position of the first page of images in a file of `n` samples."""
    return round_up(HEADER.itemsize + len(FIELDS) * FIELD.itemsize + n * SAMPLE.itemsize, page)


def round_up(at: int, page: int) -> int:
    """Return the smallest multiple of `page` that is at least `at`."""
    return -(-at // page) * page
