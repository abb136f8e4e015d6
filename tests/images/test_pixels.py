"""One image file: kinds of pixels and orientation, each against its bytes or Pillow's own word."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from fastiat.config import ConvertConfig
from fastiat.data import convert, load, stored
from fastiat.images import pixels
from fastiat.system.errors import InputError

VALUES = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def decoded(content: bytes, place: Path, extension: str) -> np.ndarray:
    file = place / f"image.{extension}"
    file.write_bytes(content)
    with pixels.quiet(), pixels.opened(str(file)) as image:
        return pixels.pixels_of(image, str(file))


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(rows: list[bytes], depth: int, colour: int, early: bytes = b"", late: bytes = b"") -> bytes:
    """A PNG of 8 pixels a row, with chunks before and after its pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, len(rows), depth, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + head + early + body + late + chunk(b"IEND", b"")


def tiff(
    stored: bytes, photometric: int, bits: int, *, order: str = "<", samples: int = 1,
    kind: int = 1, **more: int,
) -> bytes:  # fmt: skip
    """An uncompressed TIFF of 8x8 pixels; `kind` is its sample format, `more` has other tags."""
    tags = {256: [8], 257: [8], 258: [bits] * samples, 259: [1], 262: [photometric], 273: [0]}
    tags |= {277: [samples], 278: [8], 279: [len(stored)], 339: [kind] * samples}
    tags |= {int(tag.removeprefix("tag")): [value] for tag, value in more.items()}
    at = 8 + 2 + 12 * len(tags) + 4
    entries, outside = b"", b""
    start = at + sum(2 * len(value) for value in tags.values() if len(value) > 2)
    for tag, value in sorted(tags.items()):
        field = struct.pack(f"{order}{len(value)}H", *([start] if tag == 273 else value))
        if len(field) > 4:
            outside += field
            field = struct.pack(f"{order}I", at + len(outside) - len(field))
        entries += struct.pack(f"{order}HHI", tag, 3, len(value)) + field.ljust(4, b"\0")
    magic = b"II*\0" if order == "<" else b"MM\0*"
    head = magic + struct.pack(f"{order}IH", 8, len(tags)) + entries
    return head + struct.pack(f"{order}I", 0) + outside + stored


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("turn", [1, 6])
def test_sixteen_bit_tiffs_keep_the_high_byte(order: str, turn: int, tmp_path: Path) -> None:
    content = tiff(VALUES.astype(f"{order}u2").tobytes(), 1, 16, order=order, tag274=turn)
    truth = (VALUES // 256).astype(np.uint8)
    got = decoded(content, tmp_path, "tif")
    assert np.array_equal(got, np.rot90(truth, -1) if turn == 6 else truth)


def packed(values: np.ndarray, bits: int) -> bytes:
    """Numbers of so many bits each, one after the other."""
    every = np.unpackbits(values.astype(">u2").view(np.uint8).reshape(-1, 2), axis=1)
    return np.packbits(every[:, 16 - bits :]).tobytes()


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
@pytest.mark.parametrize("white_is_zero", [False, True])
def test_grey_tiffs_are_right_or_refused(bits: int, white_is_zero: bool, tmp_path: Path) -> None:
    most = 2**bits - 1
    values = np.random.default_rng(bits).integers(0, most + 1, (8, 8)).astype(np.uint16)
    raw = values.astype("<u2").tobytes() if bits == 16 else packed(values, bits)
    content = tiff(raw, 0 if white_is_zero else 1, bits)
    # A value's share of the largest, as black to white; of more than 8 bits the highest 8.
    wide = values.astype(np.float64)
    truth = wide * 255 // most if bits <= 8 else wide // 2 ** (bits - 8)
    truth = 255 - truth if white_is_zero else truth
    if bits == 12 and white_is_zero:  # Pillow has none such
        with pytest.raises(InputError):
            decoded(content, tmp_path, "tif")
        return
    assert np.array_equal(decoded(content, tmp_path, "tif"), truth)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_deflate", "packbits"])
def test_compressed_white_is_zero_is_inverted(compression: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    options: dict[str, Any] = {"compression": compression, "tiffinfo": {262: 0}}
    Image.fromarray(VALUES).save(buffer, "TIFF", **options)
    got = decoded(buffer.getvalue(), tmp_path, "tif")
    assert np.array_equal(got, (65535 - VALUES) // 256)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (tiff(VALUES.astype("<u4").tobytes(), 1, 32), "more than 16 bits"),
        (tiff(VALUES.astype("<u4").tobytes(), 1, 32, kind=2), "more than 16 bits"),
        (tiff(bytes(256), 1, 32, kind=3), "floating-point"),
        (tiff(bytes(256), 0, 32, kind=3), "floating-point"),
        (tiff(bytes(64), 1, 8, kind=2), "signed"),
        (tiff(bytes(128), 1, 16, kind=2), "signed"),
        (tiff(bytes(384), 2, 16, samples=3, tag284=2), "one after the other"),
        (tiff(bytes(256), 6, 8, samples=3), "YCbCr"),
    ],
)
def test_tiffs_that_pillow_reads_otherwise_are_refused(
    content: bytes, words: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words) as error:
        decoded(content, tmp_path, "tif")
    assert str(tmp_path / "image.tif") in str(error.value) and "\n" not in str(error.value)


def test_lab_is_shown_in_srgb(tmp_path: Path) -> None:
    # L* 50.2 without colour is sRGB's 119: Y = ((50.2 + 16) / 116)^3, gamma of IEC 61966-2-1.
    got = decoded(tiff(bytes((128, 0, 0)) * 64, 8, 8, samples=3), tmp_path, "tif")
    y = ((128 / 255 * 100 + 16) / 116) ** 3
    assert np.abs(got.astype(int) - round(255 * (1.055 * y ** (1 / 2.4) - 0.055))).max() <= 1


@pytest.mark.parametrize(
    ("mode", "channels"), [("CMYK", 3), ("YCbCr", 3), ("P", 3), ("1", 1), ("LA", 1), ("RGBA", 3)]
)
def test_modes_of_tiff_become_pillows_colours(mode: str, channels: int, tmp_path: Path) -> None:
    colours = np.random.default_rng(1).integers(0, 256, (8, 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(colours).convert(mode).save(buffer, "TIFF")
    with Image.open(buffer) as image:
        truth = np.asarray(image.convert("RGB" if channels == 3 else "L"))
    assert np.array_equal(decoded(buffer.getvalue(), tmp_path, "tif"), truth)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("depth", "row", "value"),
    [(1, b"\xff", 1), (2, b"\xaa\xaa", 2), (4, b"\x55" * 4, 5), (8, b"\x55" * 8, 0x55),
     (16, b"\x55\x66" * 8, 0x5566)],
)  # fmt: skip
def test_the_transparent_colour_of_a_grey_png_is_compared_in_its_own_bits(
    depth: int, row: bytes, value: int, late: bool, tmp_path: Path
) -> None:
    def content(colour: int) -> bytes:
        named = chunk(b"tRNS", struct.pack(">H", colour))
        return png([row] * 8, depth, 0, **{"late" if late else "early": named})

    with pytest.raises(InputError, match="transparent"):
        decoded(content(value), tmp_path, "png")
    truth = value * 255 // (2**depth - 1) if depth <= 8 else value >> 8
    assert (decoded(content(value ^ 1), tmp_path, "png") == truth).all()


def test_the_transparent_colour_of_a_sixteen_bit_png_is_never_missed(tmp_path: Path) -> None:
    def content(*colour: int) -> bytes:
        return png([b"\x55\x66" * 24] * 8, 16, 2, chunk(b"tRNS", struct.pack(">HHH", *colour)))

    with pytest.raises(InputError, match="transparent"):
        decoded(content(0x5566, 0x5566, 0x5566), tmp_path, "png")
    assert (decoded(content(0x55, 0x55, 0x55), tmp_path, "png") == 0x55).all()
    assert decoded(png([b"\x55\x66\xff\xff" * 8] * 8, 16, 4), tmp_path, "png").shape == (8, 8)


def oriented(value: int, image: np.ndarray) -> dict[str, bytes]:
    """Files of one image that say its orientation in every way, by name.extension."""
    exif = Image.Exif()
    exif[0x0112] = value
    block, rows = exif.tobytes(), [row.tobytes() for row in image]
    space = 'xmlns:tiff="http://ns.adobe.com/tiff/1.0/"'
    element = f"<r {space}><tiff:Orientation>{value}</tiff:Orientation></r>".encode()
    attribute = f'<r {space} tiff:Orientation="{value}"/>'.encode()
    text = f"\nexif\n{len(block):8}\n{block.hex()}\n".encode()
    raw = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text))
    files = {"raw.png": png(rows, 8, 0, raw), "raw late.png": png(rows, 8, 0, late=raw)}
    for name, xmp in (("element", element), ("attribute", attribute)):
        part = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
        files |= {f"{name}.png": png(rows, 8, 0, part)}
        files |= {f"{name} late.png": png(rows, 8, 0, late=part)}
        for kind, extension in (("JPEG", "jpg"), ("WEBP", "webp")):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, kind, xmp=xmp, lossless=True)
            files[f"{name}.{extension}"] = buffer.getvalue()
    # libtiff writes no tag of another value.
    files["tag.tif"] = tiff(image.tobytes(), 1, 8, tag274=value)
    for late in ("early", "late"):
        files[f"exif {late}.png"] = png(rows, 8, 0, **{late: chunk(b"eXIf", block[6:])})
    for kind, extension in (("JPEG", "jpg"), ("WEBP", "webp")):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, kind, exif=exif, lossless=True)
        files[f"exif.{extension}"] = buffer.getvalue()
    return files


@pytest.mark.parametrize("value", range(10))
def test_orientation_is_applied_wherever_it_is_said(value: int, tmp_path: Path) -> None:
    turned = {
        2: np.fliplr(GREY), 3: np.rot90(GREY, 2), 4: np.flipud(GREY), 5: GREY.T,
        6: np.rot90(GREY, -1), 7: np.rot90(GREY, 2).T, 8: np.rot90(GREY),
    }.get(value, GREY)  # fmt: skip
    for name, content in oriented(value, GREY).items():
        got = decoded(content, tmp_path, name.rpartition(".")[2])
        got = got[..., 0] if got.ndim == 3 else got
        with Image.open(io.BytesIO(content)) as image:
            pillows = np.asarray(ImageOps.exif_transpose(image).convert("L"))
        assert np.array_equal(got, pillows), name
        if name.endswith((".png", ".tif")):  # no loss
            assert np.array_equal(got, turned), name


def test_training_and_convert_take_the_same_orientation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTIAT_CACHE", str(tmp_path / "cache"))
    content = oriented(6, GREY)
    for split in ("train", "test"):
        for name in "ab":
            (tmp_path / "tree" / split / name).mkdir(parents=True)
            for file in ("element.png", "exif late.png", "raw.png"):
                (tmp_path / "tree" / split / name / file).write_bytes(content[file])
    images = load("folder", tmp_path / "tree").train.images.numpy()
    assert (images[..., 0] == np.rot90(GREY, -1)).all()
    out = tmp_path / "tree.beton"
    convert(ConvertConfig(dataset=str(tmp_path / "tree"), out=str(out)))
    assert np.array_equal(stored(out).train.images.numpy(), images)
