"""One image file: opened without trusting it, and decoded to what viewers show."""

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

# Named, so that no other reader of Pillow's is let near a file; the EPS one runs a program.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM")
LARGEST_FILE = 2**28  # bytes of an image, which is read into memory whole

GREY = ("1", "L", "LA", "La")  # Pillow's modes; 16-bit grey is I;16, I;16B or I

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What shows an image upright, by its EXIF orientation; any other value turns nothing."""
# Tags of a TIFF.
_BITS, _PHOTOMETRIC, _PLANAR, _SAMPLE_FORMAT = 258, 262, 284, 339
_YCBCR_SUBSAMPLING, _REFERENCE_BLACK_WHITE = 530, 532

# Pillow also logs what it then raises; without a handler that would be a line on stderr.
logging.getLogger("PIL").addHandler(logging.NullHandler())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence Pillow, which warns of what is refused or harmless here; a bomb is an error.

    It warns of a bomb only up to twice its limit.
    """
    with warnings.catch_warnings(action="ignore"):
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


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


def is_grey(image: Image.Image) -> bool:
    """Whether an opened image, which need not be decoded yet, has one channel besides alpha."""
    return image.mode in GREY or image.mode.startswith("I") or _raw_mode(image) == "LA;16B"


def pixels_of(image: Image.Image, path: str) -> NDArray[np.uint8]:
    """Return an opened image as viewers show it, (H, W) if it is grey, (H, W, 3) if not.

    Raises `InputError`, naming `path`, for transparent pixels and for kinds of pixels that Pillow
    does not read as viewers do.
    """
    # Decoding forgets the raw mode.
    raw, grey = _raw_mode(image), is_grey(image)
    tags = getattr(image, "tag_v2", {})
    if image.format == "TIFF":
        _check_tiff(image, path)
    if image.mode == "F":
        raise InputError(f"{path} has floating-point pixels: save it with 8 or 16 bits")
    # Orientation may come after the pixels, and lie in XMP.
    image.load()
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    if turn is not None:
        image = image.transpose(turn)
    if _is_transparent(image, raw):
        raise InputError(f"{path} has transparent pixels: flatten it onto a background")
    if image.mode.startswith("I"):  # Pillow holds 16-bit grey in modes I;16, I;16B and I
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise InputError(f"{path} has more than 16 bits per pixel: save it with 8 or 16")
        high = (values >> (4 if raw.startswith("I;12") else 8)).astype(np.uint8)
        white_is_zero = bool(tags) and tags.get(_PHOTOMETRIC, 0) == 0  # which Pillow leaves so
        return ~high if white_is_zero else high
    if image.mode == "La":
        image = image.convert("LA")
    mode = "L" if grey else "RGB"
    return np.asarray(image if image.mode == mode else image.convert(mode))


def _raw_mode(image: Image.Image) -> str:
    """Return how the pixels lie in the file, in Pillow's words, or "" where it does not say."""
    tile = getattr(image, "tile", None)
    args = tile[0][3] if tile else ""
    raw = args[0] if isinstance(args, tuple) and args else args
    return raw if isinstance(raw, str) else ""


def _check_tiff(image: Image.Image, path: str) -> None:
    """Raise `InputError` for the TIFFs that Pillow opens and reads otherwise than viewers do."""
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
    """Whether a decoded image has a pixel that is not opaque, or may have one."""
    if not image.has_transparency_data:
        return False
    colour = image.info.get("transparency")
    if colour is None or image.mode in ("P", "PA"):
        if image.mode == "La":
            image = image.convert("LA")
        return bool(np.asarray(image.convert("RGBA"))[..., 3].min() < 255)
    # A PNG names one transparent colour with as many bits as its pixels have in the file; Pillow
    # compares it with pixels of 8 bits.
    values, named = np.asarray(image), np.asarray(colour)
    if image.mode == "1":
        return bool((values == (named != 0)).any())
    if raw == "RGB;16B":
        named = named >> 8  # the low bytes are lost, so that equal high ones may mean transparent
    elif image.mode in ("L", "RGB"):
        depth = {"L;2": 2, "L;4": 4}.get(raw, 8)
        named = (named & (1 << depth) - 1) * (255 // ((1 << depth) - 1))
    equal = values == named
    return bool((equal.all(-1) if image.mode == "RGB" else equal).any())
