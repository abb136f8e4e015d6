"""Open an untrusted image file safely, and decode it to the pixels that image viewers show."""

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from fastiat.system.errors import InputError

# An allow-list of Pillow's readers: its EPS reader, for example, runs another program.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM")
LARGEST_FILE = 2**28  # bytes; the whole file is read into memory

GREY = ("1", "L", "LA", "La")  # Pillow's modes for grey; 16-bit grey has mode I;16, I;16B or I

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition for each EXIF orientation; other values mean no transposition.

`ImageOps.exif_transpose` also rewrites the EXIF block, which fails for some damaged EXIF blocks."""
# Numbers of TIFF tags.
_BITS, _PHOTOMETRIC, _PLANAR, _SAMPLE_FORMAT = 258, 262, 284, 339
_YCBCR_SUBSAMPLING, _REFERENCE_BLACK_WHITE = 530, 532

# Pillow also logs the errors that it raises; without a handler, logging would print them on stderr.
logging.getLogger("PIL").addHandler(logging.NullHandler())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Ignore Pillow's warnings, but turn its warning of a decompression bomb into an error.

    Pillow itself raises an error only above twice its limit of pixels; from the limit on it warns.
    """
    with warnings.catch_warnings(action="ignore"):
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


@contextlib.contextmanager
def opened(path: str, *, head_only: bool = False) -> Iterator[Image.Image]:
    """Yield the image in a file, to decode it or, with `head_only`, to read only its header.

    Every `Exception` raised while opening the file or in the block becomes an `InputError` that
    names `path`.
    """
    try:
        with contextlib.ExitStack() as stack:
            if os.stat(path).st_size > LARGEST_FILE:
                raise InputError(f"{path} is larger than {LARGEST_FILE >> 20} MiB: shrink it")
            # A damaged header may claim gigabytes. Pillow requests that many bytes, and a file
            # object allocates them before it reads; `BytesIO` returns only the bytes that exist.
            source = path if head_only else io.BytesIO(Path(path).read_bytes())
            image = stack.enter_context(Image.open(source, formats=FORMATS))
            if image.format == "TIFF":  # libtiff prints messages to stderr while it decodes
                stack.enter_context(_muted())
            yield image
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{path} is too large to be decoded safely: shrink it") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path} is not an image or damaged: replace or remove it") from error
    # Pillow's readers raise errors of any kind for a damaged file.
    except Exception as error:
        if isinstance(error, OSError) and error.errno:  # of the system, not of a reader
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path} cannot be decoded ({reason}): replace or remove it") from error


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    """Discard messages that a C library prints to stderr."""
    # C code writes to file descriptor 2, so that replacing `sys.stderr` would not suffice.
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def is_grey(image: Image.Image) -> bool:
    """Whether an opened image, decoded or not, has one channel, not counting alpha."""
    return image.mode in GREY or image.mode.startswith("I") or _raw_mode(image) == "LA;16B"


def pixels_of(image: Image.Image, path: str) -> NDArray[np.uint8]:
    """Return an opened image as viewers show it: (H, W) uint8 if it is grey, else (H, W, 3).

    Raises `InputError`, naming `path`, for transparent pixels and for pixel formats that Pillow
    reads differently from viewers.
    """
    # Read the raw mode before `load`, which deletes it.
    raw, grey = _raw_mode(image), is_grey(image)
    tags = getattr(image, "tag_v2", {})
    if image.format == "TIFF":
        _check_tiff(image, path)
    if image.mode == "F":
        raise InputError(f"{path} has floating-point pixels: save it with 8 or 16 bits")
    image.load()
    # Read the orientation after `load`, because a PNG may hold EXIF or XMP after its pixels.
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    if turn is not None:
        image = image.transpose(turn)
    if _is_transparent(image, raw):
        raise InputError(f"{path} has transparent pixels: flatten it onto a background")
    if image.mode.startswith("I"):  # Pillow holds 16-bit grey in modes I;16, I;16B and I
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise InputError(f"{path} has more than 16 bits per pixel: save it with 8 or 16")
        # Keep the 8 high bits, of 12 or 16.
        high = (values >> (4 if raw.startswith("I;12") else 8)).astype(np.uint8)
        white_is_zero = bool(tags) and tags.get(_PHOTOMETRIC, 0) == 0  # Pillow does not invert
        return ~high if white_is_zero else high
    if image.mode == "La":
        image = image.convert("LA")
    mode = "L" if grey else "RGB"
    return np.asarray(image if image.mode == mode else image.convert(mode))


def _raw_mode(image: Image.Image) -> str:
    """Return Pillow's name for the pixel layout in the file (its raw mode), or "" if unknown."""
    tile = getattr(image, "tile", None)
    args = tile[0][3] if tile else ""
    raw = args[0] if isinstance(args, tuple) and args else args
    return raw if isinstance(raw, str) else ""


def _check_tiff(image: Image.Image, path: str) -> None:
    """Raise `InputError` for pixel formats of TIFF that Pillow reads differently from viewers."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    bits = tags.get(_BITS, (1,))
    if image.mode == "I" and max(bits) > 16:
        raise InputError(f"{path} has more than 16 bits per pixel: save it with 8 or 16")
    if 2 in tags.get(_SAMPLE_FORMAT, (1,)):
        raise InputError(f"{path} has signed pixels: save it with 8 or 16 unsigned bits")
    if tags.get(_PLANAR, 1) == 2 and len(bits) > 1 and max(bits) > 8:
        raise InputError(f"{path} has 16-bit channels one after the other: save it with 8 bits")
    as_is = tags.get(_YCBCR_SUBSAMPLING, (2, 2)) == (1, 1) and tuple(
        tags.get(_REFERENCE_BLACK_WHITE, (0, 255, 128, 255, 128, 255))
    ) == (0, 255, 128, 255, 128, 255)
    if image.mode == "YCbCr" and not as_is:
        raise InputError(f"{path} has YCbCr pixels without compression: save it as RGB")


def _is_transparent(image: Image.Image, raw: str) -> bool:
    """Whether a decoded image has, or may have, a pixel that is not opaque."""
    if not image.has_transparency_data:
        return False
    colour = image.info.get("transparency")
    if colour is None or image.mode in ("P", "PA"):
        if image.mode == "La":
            image = image.convert("LA")
        return bool(np.asarray(image.convert("RGBA"))[..., 3].min() < 255)
    # A PNG may name one transparent colour, in the bit depth of the pixels in the file. Pillow has
    # scaled the pixels to 8 bits but not this colour, so scale the colour before comparing.
    values, named = np.asarray(image), np.asarray(colour)
    if image.mode == "1":
        return bool((values == (named != 0)).any())
    if raw == "RGB;16B":
        # Pillow has dropped the low bytes, so a pixel with equal high bytes may be transparent.
        named = named >> 8
    elif image.mode in ("L", "RGB"):
        depth = {"L;2": 2, "L;4": 4}.get(raw, 8)
        named = (named & (1 << depth) - 1) * (255 // ((1 << depth) - 1))
    equal = values == named
    return bool((equal.all(-1) if image.mode == "RGB" else equal).any())
