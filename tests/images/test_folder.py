"""Image trees: what they may hold, what is refused, and the cache."""

import contextlib
import io
import logging
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from fastiat import data
from fastiat.config import ConvertConfig
from fastiat.images import beton, beton_writer, convert, pixels
from fastiat.images import tree as tree_module
from fastiat.system.errors import InputError

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTIAT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def random_image(side: int = 8, mode: str = "RGB") -> Image.Image:
    shape = (side, side) if mode == "L" else (side, side, len(mode))
    return Image.fromarray(RNG.integers(0, 256, shape, np.uint8), mode)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two images of each of two classes in both splits, 8x8 colour PNGs."""
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "tree" / split / name).mkdir(parents=True)
            for i in range(2):
                random_image().save(tmp_path / "tree" / split / name / f"{i}.png")
    return tmp_path / "tree"


def read(root: Path | str) -> SimpleNamespace:
    """Return a tree's classes and its splits as (images, labels) arrays."""
    dataset = data.load("folder", root)
    train, test = (
        (part.images.numpy(), part.labels.numpy()) for part in (dataset.train, dataset.test)
    )
    return SimpleNamespace(classes=dataset.classes, train=train, test=test)


def cached(root: Path) -> data.Dataset:
    return convert.cached(convert.tree_source(root))


def refusal(tree: Path) -> str:
    """Return the one line that reading `tree` is refused with."""
    with pytest.raises(InputError) as error:
        read(tree)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_pixels_labels_and_classes_are_those_of_the_tree(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    expected: dict[str, list[tuple[int, np.ndarray]]] = {"train": [], "test": []}
    for split, n in (("train", 3), ("test", 2)):
        for label, name in enumerate(("10", "9", "Äpfel", "лес")):  # sorted as text
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                path = root / split / name / f"图{i}.png"
                image = random_image(9)
                image.save(path)
                expected[split].append((label, np.asarray(image)))
    dataset = data.load("folder", root)
    assert dataset.classes == ("10", "9", "Äpfel", "лес")
    assert dataset.flip
    for split, part in (("train", dataset.train), ("test", dataset.test)):
        assert part.labels.tolist() == [label for label, _ in expected[split]]
        assert part.images.shape == (len(expected[split]), 9, 9, 3)
        for got, (_, truth) in zip(part.images, expected[split], strict=True):
            assert np.array_equal(got.numpy(), truth)


@pytest.mark.parametrize(
    ("extension", "mode", "options"),
    [
        ("jpg", "RGB", {}),
        ("JPEG", "L", {}),
        ("jpg", "RGB", {"progressive": True, "subsampling": 0}),
        ("jpg", "CMYK", {}),
        ("png", "RGB", {}),
        ("PNG", "L", {}),
        ("png", "1", {}),
        ("png", "P", {}),
        ("bmp", "RGB", {}),
        ("bmp", "1", {}),
        ("webp", "RGB", {"lossless": True}),
        ("webp", "RGB", {"quality": 50}),
        ("tif", "RGB", {}),
        ("tiff", "L", {"compression": "tiff_lzw"}),
        ("ppm", "RGB", {}),
        ("pgm", "L", {}),
    ],
)
def test_every_format_decodes_to_pillows_pixels(
    tree: Path, extension: str, mode: str, options: dict[str, object]
) -> None:
    channels = 3 if mode in ("RGB", "CMYK", "P") else 1
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            for i in range(2):
                path = tree / split / name / f"{i}.png"
                image = random_image(16).convert(mode)
                path.unlink()
                image.save(path.with_suffix(f".{extension}"), **options)
    images, _ = read(tree).train
    assert images.shape == (4, 16, 16, channels)
    with Image.open(tree / f"train/dog/1.{extension}") as image:
        assert image.mode == mode
        truth = np.asarray(image.convert("RGB" if channels == 3 else "L"))
    assert np.array_equal(images[3], truth.reshape(16, 16, channels))


def grey_tree(tree: Path) -> None:
    for path in tree.rglob("*.png"):
        random_image(8, "L").save(path)


def test_sixteen_bit_grey_keeps_the_high_byte(tree: Path) -> None:
    grey_tree(tree)
    values = RNG.integers(0, 65536, (8, 8)).astype(np.uint16)
    values[1, 2], values[2, 1] = 0x1234, 0xFFFF
    Image.fromarray(values).save(tree / "train/cat/0.png")
    big_endian = b"P5\n8 8\n65535\n" + values.astype(">u2").tobytes()
    (tree / "train/cat/1.pgm").write_bytes(big_endian)
    (tree / "train/cat/1.png").unlink()
    images, _ = read(tree).train
    assert images.shape == (4, 8, 8, 1)
    assert (images[0, 1, 2, 0], images[0, 2, 1, 0]) == (0x12, 0xFF)
    for image in images[:2]:
        assert np.array_equal(image[..., 0], values // 256)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.full((8, 8), 70000, np.int32), "more than 16 bits"),
        (np.full((8, 8), -1, np.int32), "more than 16 bits"),
        (np.full((8, 8), 0.5, np.float32), "floating-point"),
    ],
)
def test_pixels_beyond_sixteen_bits_are_refused(tree: Path, values: np.ndarray, words: str) -> None:
    Image.fromarray(values).save(tree / "test/dog/0.tif")
    assert words in refusal(tree)
    assert str(tree / "test/dog/0.tif") in refusal(tree)


@pytest.mark.parametrize(("mode", "channels"), [("RGBA", 3), ("LA", 1)])
def test_opaque_alpha_is_dropped(tree: Path, mode: str, channels: int) -> None:
    grey_tree(tree)
    image = random_image(8, "RGB" if channels == 3 else "L")
    image.convert(mode).save(tree / "train/cat/0.png")
    images, _ = read(tree).train
    assert images.shape[3] == channels
    assert np.array_equal(images[0], np.asarray(image).reshape(8, 8, channels))


def test_transparent_pixels_are_refused(tree: Path) -> None:
    path = tree / "test/cat/1.png"
    see_through = random_image(8, "RGB")
    see_through.putalpha(254)
    palette = random_image().convert("P")
    for image, options in (
        (see_through, {}),
        (see_through.convert("LA"), {}),
        (palette, {"transparency": palette.getpixel((0, 0))}),
        (Image.new("RGB", (8, 8), (1, 2, 3)), {"transparency": (1, 2, 3)}),
        (Image.new("L", (8, 8), 7), {"transparency": 7}),
    ):
        image.save(path, **options)
        assert refusal(tree) == f"{path} has transparent pixels: flatten it onto a background"


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tif"])
def test_exif_orientation_is_applied(tree: Path, extension: str) -> None:
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8, :8] = 200  # bright at the top left as stored
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    for path in list(tree.rglob("*.png")):
        path.unlink()
        Image.fromarray(pixels).save(path.with_suffix(f".{extension}"), exif=exif)
    images, _ = read(tree).train
    quarters = images[0, ..., 0].reshape(2, 8, 2, 8).mean((1, 3))
    assert np.allclose(quarters, [[0, 200], [0, 0]], atol=12)


@pytest.mark.parametrize("index", [0, 2, 7])
def test_one_colour_image_makes_the_tree_colour(
    tree: Path, monkeypatch: pytest.MonkeyPatch, index: int
) -> None:
    monkeypatch.setattr(tree_module, "CHUNK", 3)
    grey_tree(tree)
    paths = [*sorted(tree.glob("train/*/*")), *sorted(tree.glob("test/*/*"))]
    random_image().save(paths[index])
    tree_read = read(tree)
    images = np.concatenate([tree_read.train[0], tree_read.test[0]])
    for image, path in zip(images, paths, strict=True):
        assert np.array_equal(image, np.asarray(Image.open(path).convert("RGB")))


def test_an_animation_counts_with_its_first_frame(tree: Path) -> None:
    frames = [random_image(), random_image()]
    frames[0].save(
        tree / "train/cat/0.webp", save_all=True, append_images=frames[1:], lossless=True
    )
    (tree / "train/cat/0.png").unlink()
    images, _ = read(tree).train
    assert np.array_equal(images[0], np.asarray(frames[0]))


def test_what_is_left_out_is_counted_by_name_every_time(
    tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = read(tree).train[0]
    (tree / "train/cat/.DS_Store").write_bytes(b"\0")  # these hold no images
    (tree / ".git").mkdir()
    (tree / "train/.ipynb_checkpoints").mkdir()
    (tree / "train/cat/empty").mkdir()
    read(tree)
    assert not caplog.records
    for file in ("train/cat/Thumbs.db", "test/dog/README.txt", "train/README.txt", "test/0.png"):
        (tree / file).write_text("about")
    for file in ("train/cat/inner.png/0.png", "train/cat/inner.png/more/1.png"):
        (tree / file).parent.mkdir(parents=True)
        random_image(9).save(tree / file)
    random_image(9).save(tree / "train/cat/.hidden.png")
    random_image(9).save(tree / "train/.ipynb_checkpoints/0.png")
    (tree / "train/dog/linked").symlink_to(tree / "train/cat")
    (tree / "train/dog/unmounted").symlink_to("/mnt/nowhere")
    wanted = {
        "beside the class folders": ["test/0.png", "train/README.txt"],
        "in folders within a class": [
            *("train/cat/inner.png/0.png", "train/cat/inner.png/more/1.png", "train/dog/linked"),
        ],
        "hidden": ["train/.ipynb_checkpoints/0.png", "train/cat/.hidden.png"],
        "extension": ["test/dog/README.txt", "train/cat/Thumbs.db", "train/dog/unmounted"],
    }
    found = tree_module.scan(tree).ignored
    for (why, paths), (words, files) in zip(found.items(), wanted.items(), strict=True):
        assert words in why and paths == [str(tree / file) for file in files]
    for _ in range(2):  # from the cache, too
        caplog.clear()
        assert np.array_equal(read(tree).train[0], before)
        (record,) = caplog.records
        message = record.getMessage()
        for words, files in wanted.items():
            assert f"{len(files)} files" in message and words in message
            assert str(tree / files[0]) in message


def test_images_outside_of_train_and_test_are_counted(
    tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tree / "README.md").write_text("about")
    (tree / "notes").mkdir()
    read(tree)
    assert not caplog.records
    for file in ("0.png", "valid/cat/0.PNG", "valid/dog/0.png"):
        (tree / file).parent.mkdir(parents=True, exist_ok=True)
        random_image().save(tree / file)
    read(tree)
    (record,) = caplog.records
    assert f"3 files outside train and test, the first is {tree / '0.png'}" in record.getMessage()


@pytest.mark.parametrize("name", ["2.pbm", "2.PNM"])
def test_every_kind_of_pnm_is_read(name: str, tree: Path) -> None:
    (tree / "train/cat" / name).write_bytes(b"P4\n8 8\n" + bytes((0b10000000,) * 8))
    images, _ = read(tree).train
    assert images[2, 0, :, 0].tolist() == [0, *[255] * 7]  # in PBM, 1 is black


def test_training_measuring_and_convert_warn_of_what_is_left_out(
    tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tree / "train/cat/more").mkdir()
    random_image().save(tree / "train/cat/more/0.png")
    data.convert(ConvertConfig(dataset=str(tree), out=str(tmp_path / "tree.beton")))
    cached(tree)
    cached(tree)
    data.load("folder", tree)
    assert len(caplog.records) == 4
    assert all("1 file in folders within a class" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("place", ["train/bird", "test/bird", "train/.bird.png"])
def test_a_class_folder_that_leads_nowhere_is_refused(tree: Path, place: str) -> None:
    (tree / place).symlink_to("/mnt/nowhere")
    assert refusal(tree).startswith(f"{tree / place} is a link to nothing")


def test_links_are_followed_and_a_link_to_nothing_is_named(tree: Path, tmp_path: Path) -> None:
    image = random_image()
    image.save(tmp_path / "elsewhere.png")
    (tree / "train/cat/2.png").symlink_to(tmp_path / "elsewhere.png")
    images, _ = read(tree).train
    assert np.array_equal(images[2], np.asarray(image))
    (tmp_path / "elsewhere.png").unlink()
    assert refusal(tree).startswith(f"{tree / 'train/cat/2.png'} is a link to nothing")


def test_a_pipe_named_like_an_image_is_refused_without_waiting_for_it(tree: Path) -> None:
    os.mkfifo(tree / "train/cat/2.png")
    assert refusal(tree) == f"{tree / 'train/cat/2.png'} is not a file: remove it"


def test_an_image_that_may_not_be_read_is_not_called_damaged(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tree / "train/cat/0.png"

    def forbidden(file: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    assert refusal(tree) == f"{path} cannot be read: Permission denied"


def test_mixed_sizes_name_two_files_with_their_sizes(tree: Path) -> None:
    random_image(12).save(tree / "test/cat/0.png")
    message = refusal(tree)
    assert f"{tree / 'test/cat/0.png'} is 12x12 pixels" in message
    assert f"{tree / 'train/cat/0.png'} is 8x8" in message


def test_an_image_that_is_not_square_is_named(tree: Path) -> None:
    Image.new("RGB", (8, 9)).save(tree / "train/dog/1.png")
    image = tree / "train/dog/1.png"
    assert refusal(tree) == (
        f"{image} is 8x9 pixels: make every image square, or resize them with --image-size or "
        "fastiat convert"
    )


def test_images_below_eight_pixels_are_refused(tree: Path) -> None:
    for path in tree.rglob("*.png"):
        random_image(7).save(path)
    assert f"{tree / 'train/cat/0.png'} is 7x7 pixels: 8x8 is the smallest" in refusal(tree)


def png_claiming(side: int) -> bytes:
    """A PNG whose header claims `side` x `side` pixels, of which it holds none."""
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")):
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        content += struct.pack(">I", len(body)) + kind + body + checksum
    return content


def saved(format_: str, side: int = 64) -> bytes:
    file = io.BytesIO()
    random_image(side).save(file, format_)
    return file.getvalue()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("x.jpg", saved("JPEG")[:-1000]),
        ("x.png", saved("PNG")[:-1000]),
        ("x.png", saved("PNG")[:1000] + b"torn" + saved("PNG")[1004:]),
        ("x.bmp", saved("BMP")[:-1]),
        ("x.webp", saved("WEBP")[:-1000]),
        ("x.tif", saved("TIFF")[:-1000]),
        ("x.ppm", saved("PPM")[:-1]),
        ("x.png", saved("PNG")[:20]),
        ("x.png", b""),
        ("x.jpg", b"<html>404</html>"),
    ],
    ids=lambda each: each if isinstance(each, str) else f"{len(each)} bytes",
)
def test_a_damaged_image_is_named(tree: Path, file: str, content: bytes) -> None:
    for path in tree.rglob("*.png"):
        random_image(64).save(path)
    (tree / "test/cat" / file).write_bytes(content)
    message = refusal(tree)
    assert message.startswith(str(tree / "test/cat" / file))
    assert message.endswith("replace or remove it")


@pytest.mark.parametrize(
    "content",
    [saved("GIF"), b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"],
    ids=["gif", "eps"],
)
def test_a_format_outside_the_list_is_not_opened_under_a_borrowed_name(
    tree: Path, content: bytes
) -> None:
    path = tree / "train/cat/0.png"
    path.write_bytes(content)
    assert refusal(tree) == f"{path} is not an image or damaged: replace or remove it"


@pytest.mark.parametrize("side", [10_000, 60_000])
@pytest.mark.parametrize("file", ["train/cat/0.png", "test/dog/1.png"])
def test_an_image_bomb_is_named_before_it_goes_off(
    tree: Path, file: str, side: int, recwarn: pytest.WarningsRecorder
) -> None:
    (tree / file).write_bytes(png_claiming(side))
    expected = f"{tree / file} is too large to be decoded safely: shrink it"
    assert refusal(tree) == expected
    assert not recwarn.list


def test_a_compressed_text_bomb_is_named(tree: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("k", "a" * 2_000_000, zip=True)
    random_image().save(tree / "train/cat/0.png", pnginfo=info)
    assert refusal(tree).startswith(f"{tree / 'train/cat/0.png'} cannot be decoded")


def remove(path: Path) -> None:
    for child in path.iterdir():
        child.unlink()
    path.rmdir()


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_in_only_one_split_is_named(tree: Path, split: str) -> None:
    remove(tree / split / "dog")
    other = "test" if split == "train" else "train"
    start = f"class 'dog' is in {tree / other} but not in {tree / split}"
    assert refusal(tree).startswith(start)


def test_an_empty_class_folder_is_named(tree: Path) -> None:
    for path in (tree / "test/cat").iterdir():
        path.rename(path.with_suffix(".gif"))
    assert refusal(tree).startswith(f"{tree / 'test/cat'} holds no images (.png .jpg")


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_or_empty_split_is_named(tree: Path, split: str) -> None:
    remove(tree / split / "dog")
    remove(tree / split / "cat")
    assert refusal(tree).startswith(f"{tree / split} has no class folders")
    (tree / split).rmdir()
    assert refusal(tree).startswith(f"{tree} has no folder '{split}'")
    (tree / split).write_text("")
    assert refusal(tree).startswith(f"{tree} has no folder '{split}'")


def test_an_empty_tree_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path).startswith(f"{tmp_path} has no folder 'train'")


def test_one_class_is_refused(tree: Path) -> None:
    remove(tree / "train/dog")
    remove(tree / "test/dog")
    assert refusal(tree) == f"{tree} has only the class 'cat': a classifier needs two"


def test_a_folder_that_may_not_be_read_is_named(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def refuse(path: Path) -> object:  # root may read everything, so permissions cannot test it
        if path == tree / "test/cat":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert refusal(tree) == f"{tree / 'test/cat'} cannot be read: Permission denied"


def test_a_tree_too_large_for_memory_is_refused(
    tree: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(beton.Beton, "read", refuse)
    assert "8 images of 8x8 pixels do not fit into memory" in refusal(tree)
    assert not caplog.records  # which would say that the cache is damaged


def other_pixels_of_the_same_size(tree: Path) -> None:
    path = tree / "train/cat/0.png"
    size = path.stat().st_size
    random_image().save(path)
    path.write_bytes(path.read_bytes().ljust(size, b"\0"))


def touch(tree: Path) -> None:
    status = (tree / "test/dog/1.png").stat()
    os.utime(tree / "test/dog/1.png", ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def same_time_other_size(tree: Path) -> None:
    path = tree / "test/dog/1.png"
    status = path.stat()
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def add(tree: Path) -> None:
    random_image().save(tree / "train/cat/2.png")


def take_away(tree: Path) -> None:
    (tree / "train/dog/1.png").unlink()


def rename(tree: Path) -> None:
    (tree / "train/dog/1.png").rename(tree / "train/dog/3.png")


def rename_class(tree: Path) -> None:
    for split in ("train", "test"):
        (tree / split / "cat").rename(tree / split / "ant")


def swap(tree: Path) -> None:
    swap_files(tree / "train/cat/0.png", tree / "train/dog/0.png")


def swap_classes(tree: Path) -> None:
    swap_files(tree / "train/cat", tree / "train/dog")


def swap_files(one: Path, other: Path) -> None:
    kept = one.with_name("kept")
    one.rename(kept)
    other.rename(one)
    kept.rename(other)


def overwrite(tree: Path) -> None:
    path = tree / "train/dog/0.png"
    status, content = path.stat(), (tree / "train/cat/1.png").read_bytes()
    with open(path, "r+b") as file:  # the inode stays
        file.write(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [swap, swap_classes, overwrite])
@pytest.mark.parametrize("converted", [False, True])
def test_a_change_that_leaves_sizes_and_times_of_modification_is_seen(
    tree: Path, change: Callable[[Path], None], converted: bool
) -> None:
    for number, path in enumerate(sorted(tree.rglob("*.png"))):
        Image.new("L", (8, 8), number).save(path.with_suffix(".bmp"))
        path.unlink()
        path.with_suffix(".bmp").rename(path)
    for path in tree.rglob("*"):
        os.utime(path, (1_700_000_000,) * 2)
    load = cached if converted else lambda root: data.load("folder", root)
    before = load(tree)
    change(tree)
    after = load(tree)
    truth = [np.asarray(Image.open(path)) for path in sorted((tree / "train").rglob("*.png"))]
    assert np.array_equal(after.train.images[..., 0].numpy(), np.stack(truth))
    # The contents, and so what a resume compares: not the place or the times.
    assert after.fingerprint() != before.fingerprint()
    moved = tree.with_name("moved")
    shutil.copytree(tree, moved)
    os.utime(moved / "train/cat/0.png")
    assert load(moved).fingerprint() == after.fingerprint()


class Decodings:
    """Counts the trees that were decoded, not read from the cache."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        write = beton_writer.write

        def counting(*arguments: Any, **card: Any) -> beton.Card:
            self.count += 1
            return write(*arguments, **card)

        monkeypatch.setattr(beton_writer, "write", counting)


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> Decodings:
    return Decodings(monkeypatch)


def test_an_unchanged_tree_comes_from_the_cache(tree: Path, decodings: Decodings) -> None:
    listing = sorted(tree.rglob("*"))
    first = data.load("folder", tree)
    second = data.load("folder", tree)
    assert decodings.count == 1
    assert first.fingerprint() == second.fingerprint()
    assert first.classes == second.classes
    assert sorted(tree.rglob("*")) == listing
    second.train.images[0] = 0  # a writable copy, not the cache itself
    assert data.load("folder", tree).fingerprint() == first.fingerprint()


@pytest.mark.parametrize(
    "change",
    [
        *(other_pixels_of_the_same_size, touch, same_time_other_size),
        *(add, take_away, rename, rename_class),
    ],
)
def test_any_change_of_the_tree_decodes_it_again(
    tree: Path,
    decodings: Decodings,
    change: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    read(tree)
    change(tree)
    changed = read(tree)
    assert decodings.count == 2
    paths = sorted(tree.glob("train/*/*"))
    truth = [np.asarray(Image.open(path)) for path in paths]
    assert np.array_equal(changed.train[0], np.stack(truth))
    assert len(changed.train[1]) == len(paths)
    read(tree)
    assert decodings.count == 2
    assert not caplog.records


def test_two_trees_do_not_share_a_cache(
    tree: Path, tmp_path: Path, decodings: Decodings, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "elsewhere" / "tree"
    other.parent.mkdir()
    first = read(tree)
    tree.rename(other)
    read(other)
    assert decodings.count == 2
    other.rename(tree)
    monkeypatch.chdir(tmp_path)
    assert np.array_equal(read("tree").train[0], first.train[0])
    assert decodings.count == 2


def truncate(content: bytes, _: Path) -> bytes:
    return content[: len(content) // 2]


def flip_a_pixel(content: bytes, _: Path) -> bytes:
    return content[: 2**21] + bytes([content[2**21] ^ 1]) + content[2**21 + 1 :]


def empty(_: bytes, __: Path) -> bytes:
    return b""


def code(_: bytes, trap: Path) -> bytes:
    class Code:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(trap),)

    return pickle.dumps(Code())


@pytest.mark.parametrize("damage", [truncate, flip_a_pixel, empty, code])
def test_a_damaged_cache_is_made_again_with_a_warning(
    tree: Path,
    cache: Path,
    decodings: Decodings,
    damage: Callable[[bytes, Path], bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = read(tree)
    (file,) = cache.glob("*.beton")
    good = file.read_bytes()
    file.write_bytes(damage(good, cache / "it-ran"))
    assert np.array_equal(read(tree).train[0], first.train[0])
    assert decodings.count == 2
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"the cache {file} ")
    assert record.getMessage().endswith("it is written again")
    assert "\n" not in record.getMessage()
    assert sorted(cache.iterdir()) == [file, file.with_suffix(".lock")]
    assert file.read_bytes() == good


def test_a_cache_that_cannot_be_written_is_a_warning(
    tree: Path, cache: Path, decodings: Decodings, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_text("a file where the folder should be")
    assert read(tree).train[0].shape == (4, 8, 8, 3)
    assert any("the next run decodes them again" in r.getMessage() for r in caplog.records)
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def test_a_full_disk_leaves_no_half_cache(
    tree: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert read(tree).train[0].shape == (4, 8, 8, 3)
    assert [file.suffix for file in cache.iterdir()] == [".lock"]
    (record,) = caplog.records
    assert "No space left on device" in record.getMessage()


def test_the_cache_is_below_the_users_cache_folder(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FASTIAT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    read(tree)
    assert len(list((tmp_path / "xdg/fastiat/betons").glob("*.beton"))) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    read(tree)
    assert len(list((tmp_path / "home/.cache/fastiat/betons").glob("*.beton"))) == 1


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_module, "PARALLEL_FROM", 1)
    monkeypatch.setattr(tree_module, "CHUNK", 3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})


@pytest.mark.skipif(sys.platform != "linux", reason="decodes in one process elsewhere")
def test_worker_processes_decode_the_same_images_in_order(
    tree: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    for path in list(tree.rglob("0.png")):
        for i in range(2, 7):
            random_image().save(path.with_name(f"{i}.png"))
    alone = read(tree)
    touch(tree)
    request.getfixturevalue("workers")
    decoded_here: list[str] = []
    decode = pixels.pixels_of

    def recording(image: Image.Image, path: str) -> np.ndarray:
        decoded_here.append(path)
        return decode(image, path)

    monkeypatch.setattr(pixels, "pixels_of", recording)
    together = read(tree)
    assert decoded_here == []  # but in the workers
    for one, other in ((alone.train, together.train), (alone.test, together.test)):
        assert np.array_equal(one[0], other[0])
        assert np.array_equal(one[1], other[1])


@pytest.mark.usefixtures("workers")
def test_the_first_damaged_image_is_named_by_worker_processes_too(tree: Path) -> None:
    (tree / "train/dog/1.png").write_bytes(b"torn")
    (tree / "test/dog/1.png").write_bytes(b"torn")
    assert refusal(tree).startswith(str(tree / "train/dog/1.png"))
    (tree / "train/dog/1.png").write_bytes(png_claiming(10_000))
    assert "too large" in refusal(tree)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stderr", "progress", "shown"),
    [(Terminal, True, True), (Terminal, False, False), (io.StringIO, True, False)],
)
def test_progress_is_shown_on_a_terminal_alone(
    tree: Path,
    monkeypatch: pytest.MonkeyPatch,
    stderr: type[io.StringIO],
    progress: bool,
    shown: bool,
) -> None:
    stream = stderr()
    monkeypatch.setattr(sys, "stderr", stream)
    data.load("folder", tree, progress=progress)
    assert ("converting" in stream.getvalue()) == shown
    assert bool(stream.getvalue()) == shown


@pytest.mark.skipif(sys.platform != "linux", reason="decodes in one process elsewhere")
def test_worker_processes_end_with_a_parent_that_is_killed() -> None:
    code = """
import os, time
from fastiat.images import tree

tree.PARALLEL_FROM, os.sched_getaffinity, parent = 1, lambda _: {0, 1}, os.getpid()

def work(paths):
    if os.getpid() != parent:
        os.kill(parent, 9)
    time.sleep(60)

with tree.mapped(work, ["a", "b"]) as results:
    list(results)
"""
    # A worker that went on would keep this pipe open, and the call waiting.
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True,
        timeout=45,
    )  # fmt: skip
    assert ended.returncode == -9


def test_a_damaged_head_that_names_gigabytes_takes_no_memory(tree: Path) -> None:
    file = sorted((tree / "train").rglob("*.png"))[0]
    content = file.read_bytes()
    at = content.index(b"IDAT")
    file.write_bytes(content[: at - 4] + (2**32 - 1).to_bytes(4, "big") + content[at:])
    tracemalloc.start()
    try:
        with contextlib.suppress(InputError):  # Pillow has the pixels by then, or has not
            read(tree)
        assert tracemalloc.get_traced_memory()[1] < 2**28
    finally:
        tracemalloc.stop()
