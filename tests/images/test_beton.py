"""Converting to .beton, and opening files that are damaged, foreign or hostile."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastiat import cli, data
from fastiat.images import beton, beton_writer, convert
from fastiat.images import ffcv as ffcv_package
from fastiat.system import files
from fastiat.system.errors import InputError

ROOT = Path(__file__).parents[2]
DIGITS = data.load("digits")


def call(*argv: object) -> None:
    assert cli.main([str(part) for part in argv]) == 0


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("betons") / "digits.beton"
    call("convert", "digits", file)
    return file


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("betons") / "jpegs.beton"
    call("convert", "digits", file, "--format", "jpeg")
    return file


def make_tree(root: Path, sizes: list[tuple[int, int]], mode: str = "RGB") -> Path:
    """A tree of noise, images of `sizes` in each of its four folders."""
    rng = np.random.default_rng(0)
    for folder in ("train/a", "train/b", "test/a", "test/b"):
        (root / folder).mkdir(parents=True)
        for i, (width, height) in enumerate(sizes):
            pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
            Image.fromarray(pixels).convert(mode).save(root / folder / f"{i}.png")
    return root


def images_of(path: Path) -> torch.Tensor:
    dataset = data.load(str(path))
    return torch.cat([dataset.train.images, dataset.test.images])


def test_our_types_are_ffcvs() -> None:
    ffcv_package.import_ffcv()
    from ffcv import types
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import IMAGE_MODES

    assert types.HeaderType == beton.HEADER and beton.VERSION == types.CURRENT_VERSION
    assert types.FieldDescType == beton.FIELD and beton.ALLOCATION == types.ALLOC_TABLE_TYPE
    theirs = types.get_metadata_type([RGBImageField(), IntField()])
    offsets = [theirs.fields[name][1] for name in theirs.names]
    assert offsets == [beton.SAMPLE.fields[name][1] for name in ("image", "label")]
    assert theirs["f0"] == beton.IMAGE and theirs.itemsize == beton.SAMPLE.itemsize
    handlers = {name: types.TYPE_ID_HANDLER[kind] for name, kind in beton.FIELDS.items()}
    assert handlers == {"image": RGBImageField, "label": IntField}
    assert {"jpeg": IMAGE_MODES["jpg"], "raw": IMAGE_MODES["raw"]} == beton.MODES


def test_raw_file_holds_the_data_set_bit_for_bit(digits: Path) -> None:
    dataset = data.load(str(digits))
    assert (dataset.name, dataset.classes, dataset.flip) == ("digits", DIGITS.classes, False)
    for name in ("train", "test"):
        got, wanted = getattr(dataset, name), getattr(DIGITS, name)
        assert torch.equal(got.images, wanted.images) and torch.equal(got.labels, wanted.labels)
        assert (len(got), got.shape, got.nbytes) == (len(wanted), wanted.shape, wanted.nbytes)
        index = torch.tensor([5, 0, 7])
        assert torch.equal(got.take(index).images, wanted.images[index])
    assert dataset.fingerprint() == DIGITS.fingerprint()


def test_holdout_of_a_file_is_that_of_the_data_set(digits: Path) -> None:
    for got, wanted in zip(
        data.holdout(data.load(str(digits)).train, 100, 3),
        data.holdout(DIGITS.train, 100, 3),
        strict=True,
    ):
        assert torch.equal(got.images, wanted.images) and torch.equal(got.labels, wanted.labels)


def test_jpegs_are_near_the_pixels_grey_and_named_otherwise(jpegs: Path) -> None:
    dataset = data.load(str(jpegs))
    assert dataset.name == "digits-jpeg" and dataset.train.shape == (1, 8, 8)
    distance = (dataset.train.images.float() - DIGITS.train.images.float()).abs().mean()
    assert 0 < distance < 4
    assert dataset.fingerprint() != DIGITS.fingerprint()


def test_jpegs_are_what_pillow_decodes_but_for_rounding(jpegs: Path) -> None:
    opened = beton.open_beton(jpegs)
    with Image.open(io.BytesIO(next(opened.blobs([3])))) as image:
        theirs = np.asarray(image).astype(int)
    difference = abs(theirs[..., :1] - opened.read(np.array([3]))[0])
    assert difference.mean() < 3 and difference.max() < 16  # FFCV's is the fast transform


def test_no_image_lies_on_two_pages(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", [(500, 500)] * 3)
    call("convert", tree, tmp_path / "x.beton")
    opened = beton.open_beton(tmp_path / "x.beton")
    page = int(np.fromfile(opened.path, beton.HEADER, 1)["page_size"][0])
    assert (opened.ptrs // page == (opened.ptrs + opened.sizes - 1) // page).all()
    assert len(set((opened.ptrs // page).tolist())) > 1


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)])
def test_tree_of_one_size_keeps_every_pixel(tmp_path: Path, mode: str, channels: int) -> None:
    tree = make_tree(tmp_path / "tree", [(9, 9)] * 3, mode)
    call("convert", "folder", tmp_path / "x.beton", "--data-dir", tree)
    got = images_of(tmp_path / "x.beton")
    paths = [
        tree / folder / f"{i}.png"
        for folder in ("train/a", "train/b", "test/a", "test/b")
        for i in range(3)
    ]
    for image, path in zip(got, paths, strict=True):
        assert np.array_equal(image.numpy(), np.asarray(Image.open(path)).reshape(9, 9, channels))
    whole = data.load("folder", tree)
    assert data.load(str(tmp_path / "x.beton")).fingerprint() == whole.fingerprint()


@pytest.mark.parametrize(
    ("sizes", "flags", "side"),
    [
        ([(300, 260), (40, 30)], (), 224),
        ([(60, 50), (40, 30)], (), 50),
        ([(60, 50), (40, 30)], ("--max-side", 32), 32),
        ([(240, 240)], (), 240),
        ([(240, 240)], ("--max-side", 16), 16),
    ],
)
def test_side_of_the_images(tmp_path: Path, sizes, flags, side) -> None:
    call("convert", make_tree(tmp_path / "tree", sizes), tmp_path / "x.beton", *flags)
    assert data.load(str(tmp_path / "x.beton")).train.shape == (3, side, side)


def test_resizing_takes_the_middle_and_averages_what_it_shrinks(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", [(32, 32)] * 2)
    wide = np.full((64, 192, 3), 255, np.uint8)
    wide[:, 64:128] = 0, 200, 0  # the square in the middle
    fine = np.indices((64, 64)).sum(0) % 2 * 255  # aliases to black or white if not averaged
    Image.fromarray(wide).save(tree / "train/a/0.png")
    Image.fromarray(fine.astype(np.uint8)).save(tree / "train/a/1.png")
    call("convert", tree, tmp_path / "x.beton", "--max-side", 16)
    green, grey = images_of(tmp_path / "x.beton")[:2].float()
    assert (green[:, 3:-3] == torch.tensor([0.0, 200.0, 0.0])).all()  # Lanczos's window is 3
    assert (grey - 127.5).abs().max() < 3


def test_large_images_are_in_memory_one_at_a_time(tmp_path: Path, monkeypatch) -> None:
    assert [convert._images_per_task(side) for side in (8, 224, 512, 4096)] == [64, 55, 10, 1]
    asked = []
    take = data.Split.take
    monkeypatch.setattr(data.Split, "take", lambda s, i: asked.append(len(i)) or take(s, i))
    monkeypatch.setattr(beton, "CHUNK", 2 * 3 * 8 * 8)
    convert.write_beton(tmp_path / "x.beton", convert.dataset_source(DIGITS), "raw", 0, None)
    assert max(asked) == 2 and sum(asked) == 1797
    call("convert", make_tree(tmp_path / "tree", [(9, 9)] * 3), tmp_path / "tree.beton")
    assert len(images_of(tmp_path / "tree.beton")) == 12


def test_name_tells_a_resized_data_set_from_the_original(tmp_path: Path, digits: Path) -> None:
    tree = make_tree(tmp_path / "tree", [(16, 16)])
    dataset = data.load("folder", tree)
    named = data.Dataset("svhn", dataset.classes, dataset.train, dataset.test, False)
    out = tmp_path / "x.beton"
    convert.write_beton(out, convert.dataset_source(named), "raw", 0, 8)
    assert data.load(str(out)).name == "svhn-8"
    assert data.load("svhn", out).name == "svhn-8" and data.load("folder", out).name == "svhn-8"
    with pytest.raises(InputError, match="holds digits, not cifar10"):
        data.load("cifar10", digits)


def test_convert_refuses_in_one_line(tmp_path: Path, digits: Path, complaint) -> None:
    before = digits.read_bytes()
    assert "exists already" in complaint("convert", "digits", digits)
    assert "create it" in complaint("convert", "digits", tmp_path / "no/x.beton")
    assert "does not exist" in complaint("convert", tmp_path / "no", tmp_path / "x.beton")
    assert "needs a data folder" in complaint("convert", "folder", tmp_path / "x.beton")
    tree = make_tree(tmp_path / "tree", [(20, 30), (7, 30)])
    out = tmp_path / "x.beton"
    assert "leave it out with" in complaint("convert", tree, out, "--data-dir", tmp_path)
    out.symlink_to(tmp_path / "nowhere")
    assert "exists already" in complaint("convert", "digits", out)
    out.unlink()
    assert "1.png is 7x30 pixels: 8" in complaint("convert", tree, tmp_path / "x.beton")
    (tree / "train/b/1.png").write_bytes((tree / "train/b/0.png").read_bytes()[:300])
    for folder in ("train/a", "test/a", "test/b"):
        shutil.copy(tree / folder / "0.png", tree / folder / "1.png")
    assert "train/b/1.png cannot be decoded" in complaint("convert", tree, tmp_path / "x.beton")
    assert [file.name for file in tmp_path.iterdir()] == ["tree"]  # nothing half-written
    assert digits.read_bytes() == before


def test_force_replaces_and_a_failure_keeps_what_was_there(tmp_path: Path, complaint) -> None:
    out, tree = tmp_path / "x.beton", make_tree(tmp_path / "tree", [(12, 12)])
    out.write_bytes(b"old")
    (tree / "test/b/0.png").write_bytes(b"no image")
    complaint("convert", tree, out, "--force")
    assert out.read_bytes() == b"old"
    shutil.copy(tree / "test/a/0.png", tree / "test/b/0.png")
    call("convert", tree, out, "--force")
    assert data.load(str(out)).train.shape == (3, 12, 12)


def test_a_disk_that_keeps_other_bytes_is_noticed(tmp_path: Path, monkeypatch) -> None:
    read = beton.Beton.blobs

    def flipped(self, index):
        for number, blob in enumerate(read(self, index)):
            yield blob if number != 3 else bytes([blob[0] ^ 1]) + blob[1:]

    monkeypatch.setattr(beton.Beton, "blobs", flipped)
    with pytest.raises(InputError, match="differs from the data written to it"):
        convert.write_beton(tmp_path / "x.beton", convert.dataset_source(DIGITS), "raw", 0, None)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_told_by_the_files_own_name(
    tmp_path: Path, monkeypatch, complaint
) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(files, "open", refuse, raising=False)
    monkeypatch.setattr(Path, "unlink", refuse)  # such a system refuses that, too
    told = complaint("convert", "digits", tmp_path / "x.beton")
    assert f"Read-only file system: {tmp_path / 'x.beton'}: choose a place" in told


def test_what_a_killed_conversion_left_is_removed_and_a_running_ones_is_not(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    with files.replacing(tmp_path / "x.beton") as opened:
        own = Path(opened.name)

    def left(name: str, pid: int) -> Path:
        file = own.with_name(own.name.replace(f".{os.getpid()}.", f".{pid}.").replace("x.", name))
        file.write_bytes(b"half")
        return file

    killed, running, other = left("x.", gone.pid), left("x.", os.getppid()), left("y.", gone.pid)
    beton_writer.remove_unfinished(tmp_path / "x.beton")
    assert not killed.exists() and running.exists() and other.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_conversion_and_leaves_nothing(tmp_path: Path, number: int) -> None:
    tree = make_tree(tmp_path / "tree", [])
    Image.new("RGB", (4000, 3000)).save(tmp_path / "large.png")
    for i in range(40):  # seconds of work
        for folder in ("train/a", "train/b", "test/a", "test/b"):
            (tree / folder / f"{i}.png").symlink_to(tmp_path / "large.png")
    (tmp_path / "out").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "fastiat", "convert", str(tree), str(tmp_path / "out/x.beton")],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while process.poll() is None and not list((tmp_path / "out").iterdir()):
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert err.startswith("fastiat: ") and err.count("\n") == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_every_shorter_file_is_refused_by_name(tmp_path: Path, digits: Path) -> None:
    whole = digits.read_bytes()
    file = tmp_path / "cut.beton"
    for length in (0, 1, 23, 24, 2000, 2106, 40_000, 1 << 21, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"cut\.beton cannot be used.*fastiat convert"):
            data.load(str(file))


def test_a_longer_file_is_refused_by_name(tmp_path: Path, digits: Path) -> None:
    whole = digits.read_bytes()
    for more in (b"\0", bytes(24), whole):
        (tmp_path / "long.beton").write_bytes(whole + more)
        with pytest.raises(InputError, match=r"long\.beton .* it has bytes after its end"):
            data.load(str(tmp_path / "long.beton"))


def test_foreign_files_are_refused_by_name(tmp_path: Path, complaint) -> None:
    file = tmp_path / "x.beton"
    rng = np.random.default_rng(0)
    for content in (b"PK\3\4" * 9000, rng.bytes(5000), b"\0" * 5000, b"\xff" * 5000):
        file.write_bytes(content)
        assert f"{file} cannot be used" in complaint("train", "--dataset", file)
    assert f"{tmp_path / 'no.beton'} does not exist" in complaint(
        "train", "--dataset", tmp_path / "no.beton"
    )
    (tmp_path / "folder.beton").mkdir()
    assert "folder.beton" in complaint("train", "--dataset", tmp_path / "folder.beton")
    os.mkfifo(tmp_path / "pipe.beton")
    assert "is not a file" in complaint("train", "--dataset", tmp_path / "pipe.beton")


def test_a_file_of_ffcvs_own_writer_is_refused_by_name(tmp_path: Path, capfd) -> None:
    ffcv_package.import_ffcv()
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    file = tmp_path / "theirs.beton"
    fields = {"image": RGBImageField(), "label": IntField()}
    writer = DatasetWriter(str(file), fields, num_workers=1)
    writer.from_indexed_dataset([(np.zeros((8, 8, 3), np.uint8), i % 2) for i in range(4)])
    with pytest.raises(InputError, match=r"theirs\.beton .* metadata are missing"):
        data.load(str(file))


def edited(digits: Path, file: Path, change: Callable[..., object]) -> Path:
    """Write a copy whose header, samples, allocations and card `change` has edited in place."""
    content = bytearray(digits.read_bytes())
    header = np.frombuffer(content, beton.HEADER, 1)
    n, table = int(header["num_samples"][0]), int(header["alloc_table_ptr"][0])
    start = beton.HEADER.itemsize + 2 * beton.FIELD.itemsize
    samples = np.frombuffer(content, beton.SAMPLE, n, start)
    allocations = np.frombuffer(content, beton.ALLOCATION, n, table)
    card = asdict(beton.open_beton(digits).card)
    change(header[0], samples, allocations, card)
    text = json.dumps(card).encode()
    tail = text + len(text).to_bytes(8, "little") + beton.MAGIC
    content[table - len(tail) : table] = tail  # before it is a page's rest
    file.write_bytes(content)
    return file


def swap(header, samples, allocations, card):
    allocations["ptr"][[0, 1]] = allocations["ptr"][[1, 0]]


HOSTILE: dict[str, tuple[Callable[..., object], str]] = {
    "size": (lambda h, s, a, c: a["size"].__setitem__(5, 193), "not at the positions"),
    "huge size": (lambda h, s, a, c: a["size"].__setitem__(5, 2**64 - 1), "not at the positions"),
    "pointer": (lambda h, s, a, c: a["ptr"].__setitem__(5, 2**64 - 100), "not at the positions"),
    "pointer into header": (lambda h, s, a, c: a["ptr"].__setitem__(0, 0), "not at the positions"),
    "sample's pointer": (
        lambda h, s, a, c: s["image"]["data_ptr"].__setitem__(7, 2**40), "not at the positions"
    ),
    "sample's number": (lambda h, s, a, c: a["sample_id"].__setitem__(1, 0), "not at the"),
    "swapped": (swap, "not at the positions"),
    "width": (lambda h, s, a, c: s["image"]["width"].__setitem__(9, 65535), "are 8x8"),
    "mode": (lambda h, s, a, c: s["image"]["mode"].__setitem__(9, 0), "are raw"),
    "unknown mode": (lambda h, s, a, c: s["image"]["mode"].__setitem__(9, 7), "are raw"),
    "label": (lambda h, s, a, c: s["label"].__setitem__(9, 10), "outside its 10 classes"),
    "negative label": (lambda h, s, a, c: s["label"].__setitem__(9, -1), "outside its 10 classes"),
    "samples": (lambda h, s, a, c: h.__setitem__("num_samples", 2**63), "truncated"),
    "table": (lambda h, s, a, c: h.__setitem__("alloc_table_ptr", 2**64 - 1), "truncated"),
    "version": (lambda h, s, a, c: h.__setitem__("version", 3), "not a .beton of fastiat"),
    "fields": (lambda h, s, a, c: h.__setitem__("num_fields", 9), "not a .beton of fastiat"),
    "page": (lambda h, s, a, c: h.__setitem__("page_size", 0), "page size is 0"),
    "side": (lambda h, s, a, c: c.update(side=9), "are 9x9"),
    "no side": (lambda h, s, a, c: c.update(side=0), "metadata do not match"),
    "all to train on": (lambda h, s, a, c: c.update(n_train=1797), "metadata do not match"),
    "channels": (lambda h, s, a, c: c.update(channels=2), "metadata do not match"),
    "classes": (lambda h, s, a, c: c.update(classes=["0", "1"]), "outside its 2 classes"),
    "type": (lambda h, s, a, c: c.update(classes="0123456789"), "metadata are damaged"),
    "unknown": (lambda h, s, a, c: c.update(more=1), "metadata are damaged"),
    "format": (lambda h, s, a, c: c.update(format="png"), "metadata are damaged"),
    "jpeg": (lambda h, s, a, c: c.update(format="jpeg"), "are jpeg"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_ffcv_would_trust_is_checked_first(digits: Path, tmp_path: Path, name: str) -> None:
    change, reason = HOSTILE[name]
    file = edited(digits, tmp_path / "x.beton", change)
    with pytest.raises(InputError, match=reason) as refused:
        data.load(str(file))
    assert str(file) in str(refused.value) and "\n" not in str(refused.value)


def test_an_edit_that_changes_nothing_is_accepted(digits: Path, tmp_path: Path) -> None:
    file = edited(digits, tmp_path / "x.beton", lambda *_: None)
    assert torch.equal(images_of(file), images_of(digits))


@settings(max_examples=150)
@given(st.lists(st.tuples(st.integers(0, 90_000), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_changed_byte_is_refused_or_harmless(digits: Path, places) -> None:
    content = bytearray(digits.read_bytes())
    for place, value in places:
        # The header and the samples, or the card and the table, which are at the end.
        content[place if place < 45_000 else place - 90_001] = value
    file = digits.with_name("changed.beton")
    file.write_bytes(content)
    try:
        dataset = data.load(str(file))
    except InputError as refused:
        assert str(file) in str(refused) and "\n" not in str(refused)
        return
    assert dataset.train.shape == (1, 8, 8) and len(dataset.train) + len(dataset.test) == 1797
    assert dataset.test.take(torch.arange(3)).images.shape == (3, 8, 8, 1)


def test_jpeg_of_another_size_is_refused(jpegs: Path, tmp_path: Path) -> None:
    opened = beton.open_beton(jpegs)
    content = bytearray(jpegs.read_bytes())
    at = content.index(b"\xff\xc0", int(opened.ptrs[0]))
    content[at + 5 : at + 7] = (4096).to_bytes(2, "big")
    (tmp_path / "x.beton").write_bytes(content)
    with pytest.raises(InputError, match="image 0 is not a JPEG of 8x8"):
        data.load(str(tmp_path / "x.beton"))


def test_damaged_jpeg_is_named_when_it_is_read(jpegs: Path, tmp_path: Path) -> None:
    opened = beton.open_beton(jpegs)
    content = bytearray(jpegs.read_bytes())
    middle = int(opened.ptrs[2] + opened.sizes[2]) - 20
    content[middle : middle + 20] = bytes(20)
    (tmp_path / "x.beton").write_bytes(content)
    dataset = data.load(str(tmp_path / "x.beton"))
    with pytest.raises(InputError, match=r"x\.beton cannot be used, its image 2 is damaged"):
        _ = dataset.train.images


def test_without_ffcv_raw_files_are_written_and_read(tmp_path: Path, monkeypatch, jpegs) -> None:
    monkeypatch.setitem(sys.modules, "ffcv", None)
    monkeypatch.setattr(ffcv_package, "_import", ffcv_package._import.__wrapped__)
    beton.jpeg_decoder.cache_clear()
    call("convert", "digits", tmp_path / "x.beton")
    assert torch.equal(data.load(str(tmp_path / "x.beton")).test.images, DIGITS.test.images)
    call("convert", "digits", tmp_path / "jpeg.beton", "--format", "jpeg")
    with pytest.raises(InputError, match=r"FFCV is not installed.*pip install"):
        _ = data.load(str(jpegs)).test.images
