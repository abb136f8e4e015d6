"""The outside files that fastiat reads: valid examples, their damage, and their readers.

A new target is an entry of `TARGETS`: which of the world's folders it needs, a function that makes
an input, and one that puts it in its place and reads it as a user would.
"""

import hashlib
import io
import json
import os
import pickle
import re
import signal
import struct
import xml.etree.ElementTree as ElementTree
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import fuzz_mutations as damage
import numpy as np
import safetensors.torch
import scipy.io
import torch
from PIL import Image, PngImagePlugin
from torchvision.datasets import CIFAR10, SVHN, FashionMNIST

import fastiat
from fastiat import cli, data
from fastiat.images import beton, beton_writer
from fastiat.images.extra import load_extra
from fastiat.images.ffcv import installed
from fastiat.measuring import verdicts
from fastiat.measuring.norms import NORMS, read_norms
from fastiat.measuring.rows import write_rows
from fastiat.paper import compare, published
from fastiat.runs import results
from fastiat.runs.directory import CONFIG, METRICS, MODEL, PREVIOUS, STATE, Run
from fastiat.system.errors import InputError
from fastiat.train import Trainer

OUTSIDE = "outside"
SMALL = (
    *("--dataset", "digits", "--arch", "mlp6", "--width", "8", "--steps", "1"),
    *("--epochs", "2", "--batch-size", "300", "--device", "cpu", "--precision", "fp32"),
    *("--eval-limit", "20", "--pad", "0"),
)
QUICK = ("--limit", "10", "--attacks", "none", "pgd-1", "--device", "cpu")


class World:
    """The valid files, under `folder`: runs, image trees, data sets.

    `decode`: whether FFCV, which takes long to import, decodes the JPEGs in .beton files.
    """

    def __init__(self, folder: Path, decode: bool) -> None:
        self.folder, self.decode = folder, decode and installed()
        finished, stopped = folder / "runs/runs/finished", folder / "runs/runs/stopped"
        command("train", *SMALL, "--out", finished)
        command("norms", finished)
        flags = ("--ema", "0.9", "--holdout", "50", "--patience", "2")
        with _interrupted(at=6):
            cli.main(["train", *SMALL, *flags, "--out", str(stopped)])
        other = folder / "other"
        network = ("--arch", "preact18", "--width", "1", "--adv", "none", "--epochs", "1")
        command("train", *SMALL, *network, "--out", other)
        _diagnosis(finished)
        _table(finished.parent)
        self.seeds = {
            name: [(run / name).read_bytes() for run in (finished, stopped, other)]
            for name in (CONFIG, METRICS, MODEL, STATE)
        }
        for name in (results.EVALUATION, NORMS, verdicts.DIAGNOSIS):
            self.seeds[name] = [(finished / name).read_bytes()]
        self.seeds["table3.json"] = [(finished.parent / "table3.json").read_bytes()]
        for folder_of, name in (("images", "digits.npz"), ("paper", "tables.csv")):
            self.seeds[name] = [(Path(fastiat.__file__).parent / folder_of / name).read_bytes()]
        digits = data.load("digits").test
        content = io.BytesIO()
        np.savez(content, image=digits.images[:6].numpy(), label=digits.labels[:6].numpy())
        self.seeds["extra.npz"] = [content.getvalue()]
        # The first report starts programs and takes long; here, the guard is not active yet.
        command("report", other)
        self.betons = [beton_of(folder / f"{kind}.beton", kind) for kind in ("raw", "jpeg")]
        self._images(folder / "images")
        self._data_sets(folder / "data")

    def _images(self, place: Path) -> None:
        self.images = images()
        tree(place / "tree")

    def _data_sets(self, place: Path) -> None:
        rng = np.random.default_rng(0)
        batches = place / "cifar-10-batches-py"
        batches.mkdir(parents=True)
        for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
            pixels = rng.integers(0, 256, (2, 3072), np.uint8)
            (batches / name).write_bytes(pickle.dumps({"data": pixels, "labels": [0, 1]}, 2))
        names = {"label_names": [f"class {k}" for k in range(10)]}
        (batches / "batches.meta").write_bytes(pickle.dumps(names, 2))
        for split in ("train", "test"):
            values = {"X": rng.integers(0, 256, (32, 32, 3, 3), np.uint8)}
            values["y"] = np.array([[10], [1], [2]], np.uint8)
            scipy.io.savemat(place / f"{split}_32x32.mat", values)
        raw = place / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        for split in ("train", "t10k"):
            pixels = rng.integers(0, 256, (3, 28, 28), np.uint8).tobytes()
            idx = struct.pack(">IIII", 0x803, 3, 28, 28) + pixels
            (raw / f"{split}-images-idx3-ubyte").write_bytes(idx)
            idx = struct.pack(">II", 0x801, 3) + bytes([9, 0, 1])
            (raw / f"{split}-labels-idx1-ubyte").write_bytes(idx)
        self.data_files = {
            str(file.relative_to(place)): file.read_bytes()
            for file in sorted(place.rglob("*"))
            if file.is_file()
        }


@contextmanager
def _interrupted(at: int) -> Any:
    """Let the training get a signal at this update."""
    update = Trainer.update

    def interrupting(self: Trainer, *batch: Any) -> Any:
        if self.step == at - 1:
            signal.raise_signal(signal.SIGINT)
        return update(self, *batch)

    with mock.patch.object(Trainer, "update", interrupting):
        yield


def _diagnosis(run: Path) -> None:
    figures = {"error_percent": 1.5, "steps": [1, 2], "note": None, "n": 20}
    found = [
        verdicts.Finding("FGSM weaker than PGD", "pass", figures, "It is."),
        verdicts.Finding("transfer", "not done", {}, "There is no partner."),
    ]
    write_rows(run / verdicts.DIAGNOSIS, found)


def _table(place: Path) -> None:
    lines = [
        compare.line(cell, [{"errors": 3, "n": 10} if cell.row == "pgd7" else None])
        for cell in published.table("table3").cells
    ]
    table = compare.Comparison("table3", "Table 3", "Scaled.", "fastiat reproduce", tuple(lines))
    table.write(place)


def images() -> dict[str, list[bytes]]:
    """Return small valid images of every format that a tree may hold, by extension."""
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
    grey, deep = colour.convert("L"), Image.fromarray(rng.integers(0, 2**16, (8, 8), np.uint16))
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 100, zip=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    made: dict[str, list[tuple[Image.Image, str, dict[str, Any]]]] = {
        ".png": [
            (grey, "PNG", {"pnginfo": text}),
            (colour.convert("P"), "PNG", {"transparency": 0}),
            (colour.convert("RGBA"), "PNG", {"exif": exif, "icc_profile": b"x" * 50}),
            (deep, "PNG", {}),
            (colour, "PNG", {"save_all": True, "append_images": [colour.rotate(90)]}),
        ],
        ".jpg": [
            (grey, "JPEG", {}),
            (colour, "JPEG", {"progressive": True, "exif": exif}),
            (colour.convert("CMYK"), "JPEG", {"icc_profile": b"x" * 50}),
        ],
        ".bmp": [(grey, "BMP", {}), (colour, "BMP", {}), (colour.convert("P"), "BMP", {})],
        ".webp": [
            (colour, "WEBP", {"lossless": True, "exif": exif}),
            (colour, "WEBP", {"quality": 50}),
            (colour, "WEBP", {"save_all": True, "append_images": [colour.rotate(90)]}),
        ],
        ".tif": [
            (grey, "TIFF", {}),
            (deep, "TIFF", {}),
            *(
                (colour, "TIFF", {"compression": f"tiff_{name}"})
                for name in ("lzw", "adobe_deflate", "jpeg")
            ),
            (grey.convert("1"), "TIFF", {"compression": "group4"}),
        ],
        ".ppm": [(grey, "PPM", {}), (colour, "PPM", {}), (grey.convert("1"), "PPM", {})],
    }
    found: dict[str, list[bytes]] = {}
    for extension, kinds in made.items():
        for image, kind, options in kinds:
            buffer = io.BytesIO()
            image.save(buffer, kind, **options)
            found.setdefault(extension, []).append(buffer.getvalue())
    plain = " ".join(map(str, np.asarray(grey).ravel().tolist()))
    found[".ppm"].append(f"P2\n# comment\n8 8\n255\n{plain}\n".encode())
    return found


def tree(place: Path) -> None:
    """Make an image tree of two classes."""
    for number, name in enumerate(("train/a", "train/b", "test/a", "test/b")):
        (place / name).mkdir(parents=True)
        pixels = np.full((8, 8), number, np.uint8)
        Image.fromarray(pixels).save(place / name / "5.png")


def png_bomb(random: Random) -> bytes:
    """Return a small PNG whose pixels or text unpack to many bytes."""
    side, kind = random.choice((4_096, 9_000, 20_000, 65_535, 2**31 - 1)), random.random()
    # Pillow accepts the two smallest sides, so these get the bytes of all their pixels.
    packed = zlib_of_zeros(4 * 9_001 * 9_000 if side <= 9_000 else 2**20)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, random.choice((0, 2, 6)), 0, 0, 0))]
    if kind < 0.3:
        chunks[0] = (b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0))
        name = random.choice((b"zTXtcomment\0\0", b"iCCPprofile\0\0", b"iTXtcomment\0\1\0\0\0"))
        chunks += [(name[:4], name[4:] + packed)] * random.choice((1, 100))
    chunks += [(b"IDAT", packed), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(_chunk, *zip(*chunks, strict=True)))


def zlib_of_zeros(count: int) -> bytes:
    """Return a zlib stream of about `count` zero bytes."""
    count -= count % 2**20
    checksum = (count % 65_521) << 16 | 1
    return b"\x78\x9c" + damage.zeros(count) + checksum.to_bytes(4, "big")


def _chunk(name: bytes, content: bytes) -> bytes:
    whole = name + content
    return struct.pack(">I", len(content)) + whole + struct.pack(">I", zlib.crc32(whole))


def _sealed(content: bytes) -> bytes:
    """Return a PNG with right checksums in all chunks that can still be read."""
    at, out = 8, content[:8]
    while at + 12 <= len(content):
        size = int.from_bytes(content[at : at + 4], "big")
        if at + 12 + size > len(content):
            break
        out += _chunk(content[at + 4 : at + 8], content[at + 8 : at + 8 + size])
        at += 12 + size
    return out + content[at:]


def make_image(random: Random, world: World) -> bytes:
    """Damage an image; the first byte is the index of its extension."""
    extension = random.choice(list(world.images))
    content = damage.of_bytes(random, world.images[extension])
    if extension == ".png" and random.random() < 0.5:
        content = png_bomb(random) if random.random() < 0.2 else _sealed(content)
    return bytes([list(world.images).index(extension)]) + content


def use_image(place: Path, content: bytes, random: Random) -> None:
    """Read an image tree with this image in it, as the first or the last one."""
    extension = (".png", ".jpg", ".bmp", ".webp", ".tif", ".ppm")[content[0]]
    at = random.choice(("train/a/0", "test/b/9"))
    (place / "tree" / f"{at}{extension}").write_bytes(content[1:])
    data.load("folder", place / "tree", progress=False)


def make_npz(random: Random, seeds: Sequence[bytes], name: str) -> bytes:
    """Damage a .npz, the header of its array `name` among others."""
    if random.random() < 0.6:
        return damage.of_zip(random, seeds)
    shape = random.choice(
        ("(4, 8, 8)", "(4, 9000, 9000)", f"({2**40}, 8, 8)", "(4, -8, 8)", f"({10**30},)", "()",
         "(4, 0, 0)", "(4, 8, 8, 1, 1)", "'x'", "(4, 8, 9)", "(" * 200)
    )  # fmt: skip
    dtype = random.choice(("'|u1'", "'|u1'", "'<f8'", "'|O'", "'|V100000'", "'<U1000000'", "[]"))
    pixels = damage.npy(shape, dtype, bytes(random.choice((0, 256, 300, 4096))))
    with zipfile.ZipFile(io.BytesIO(seeds[0])) as archive:
        others = [(n, archive.read(n)) for n in archive.namelist() if n != f"{name}.npy"]
    return damage.zip_of([(f"{name}.npy", pixels), *others])


def use_extra(place: Path, content: bytes, random: Random) -> None:
    """Read further images for digits from this file."""
    (place / "extra.npz").write_bytes(content)
    load_extra(place / "extra.npz", data.load("digits"), None)


def command(*argv: object) -> None:
    """Run fastiat's command line; raise `InputError` where it refuses."""
    status = cli.main([str(part) for part in argv])
    assert status in (0, 2), f"status {status}"
    if status == 2:
        raise RefusedError


class RefusedError(InputError):
    """The command line refused the input and has printed the reason."""


def in_run(name: str, *uses: Callable[[Path], None]) -> Callable[[Path, bytes, Random], None]:
    """Return a function that puts a file into a run and calls one of `uses` on the run."""

    def use(place: Path, content: bytes, random: Random) -> None:
        use = random.choice(uses)
        run = place / "runs" / "finished"
        if name == STATE:
            run, content = place / "runs" / RUNS[content[0]], content[1:]
            if random.random() < 0.8:
                (run / PREVIOUS).unlink(missing_ok=True)
        file = run.parent / name if name.startswith("table") else run / name
        file.write_bytes(content)
        use(run)

    return use


RUNS = ("finished", "stopped")


def resume(run: Path) -> None:
    """Go on with a run."""
    command("train", "--resume", "--out", run)


def evaluate(run: Path) -> None:
    """Measure a run."""
    command("evaluate", run, *QUICK)


def measure_file(run: Path) -> None:
    """Measure a model file."""
    command("evaluate", run / MODEL, "--dataset", "digits", *QUICK)


def load(run: Path) -> None:
    """Use a trained model."""
    model = fastiat.load(run)
    with torch.no_grad():
        model(torch.rand(1, 1, 8, 8))


def norms(run: Path) -> None:
    """Compare the weights of a run."""
    command("norms", run)


def read_json(run: Path) -> None:
    """Read all files that a report reads, without the second that drawing takes."""
    opened = Run.open(run)
    list(opened.rows())
    results.read_results(run)
    read_norms(run)
    verdicts.read_diagnosis(run)
    for file in run.parent.glob("table*.json"):
        compare.read(file)


def report(run: Path) -> None:
    """Make the page of a folder of runs; what it writes must be harmless."""
    for other in run.parent.iterdir():
        if other.is_dir() and other != run:
            for file in other.iterdir():
                file.unlink()
            other.rmdir()
    command("report", run.parent)
    page = (run.parent / "report.html").read_text()
    assert "<script" not in page.lower(), "a script in the page"
    assert all(c in "\n\t" or c.isprintable() for c in page), "escape sequences in the page"
    assert not re.search(r'<[^>]*\s(src|href|xlink:href)="(?!data:|#)', page), "the page loads"
    for picture in run.parent.rglob("*.svg"):
        ElementTree.parse(picture)


def make_state(random: Random, world: World) -> bytes:
    """Damage a checkpoint: any of its bytes, its header, or values under a right checksum.

    The first byte is the index of its run in `RUNS`.
    """
    at = random.randrange(len(RUNS))
    return bytes([at]) + _damaged_state(random, world.seeds[STATE][at])


def _damaged_state(random: Random, whole: bytes) -> bytes:
    if random.random() < 0.45:
        content = damage.of_safetensors(random, [whole])
        # With a right checksum, more of the damage reaches the code that reads the values.
        return damage.sealed(content) if random.random() < 0.7 else content
    if random.random() < 0.03:
        return pickle.dumps(Call(os.system, "touch canary"))
    size = int.from_bytes(whole[:8], "little")
    metadata = json.loads(whole[8 : 8 + size])["__metadata__"]
    state = safetensors.torch.load(whole)
    for _ in range(random.choice((0, 1, 2))):
        name = random.choice(list(state))
        state[name] = _of_tensor(random, state[name])
        if random.random() < 0.1:
            state[random.choice((damage.ESCAPE, "step/x", "model"))] = state.pop(name)
    values = json.loads(metadata["state"])
    for _ in range(random.choice((0, 1, 2))):
        values = damage.of_value(random, values)
    metadata["state"] = damage.as_json(random, values).encode("ascii", "ignore").decode()
    state = {name: tensor.contiguous().clone() for name, tensor in state.items()}
    return damage.sealed(safetensors.torch.save(state, metadata))


def _of_tensor(random: Random, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of another form, or with other values."""
    wrong: Any = (
        *(tensor.double(), tensor.to(torch.uint8), tensor.flatten()[:-1], tensor[None]),
        *(torch.full_like(tensor, 255), torch.zeros_like(tensor), torch.empty(0)),
    )
    if tensor.is_floating_point():
        wrong += (torch.full_like(tensor, float("nan")), tensor * 1e30, tensor.bool())
    else:
        noise = [random.choice((0, 1, 255, 77)) for _ in range(tensor.numel())]
        wrong += (torch.tensor(noise, dtype=torch.uint8).reshape(tensor.shape),)
    return random.choice(wrong)


class Call:
    """Pickles to a call of `function` with `arguments`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.reduced


DATA_SETS = {"cifar": "cifar10", "mat": "svhn", "idx": "fashion-mnist"}


def make_data(random: Random, world: World) -> bytes:
    """Damage a file of a downloaded data set, named in the first line, or put code into it."""
    name = random.choice([n for n in world.data_files if "idx" in n] + list(world.data_files))
    content = damage.of_bytes(random, [world.data_files[name]])
    if "cifar" in name and random.random() < 0.5:
        content = pickle.dumps({"data": Call(os.system, "touch canary")})
    return name.encode() + b"\n" + content


def use_data(place: Path, content: bytes, random: Random) -> None:
    """Load a data set with this file in it; its other files match their checksums."""
    written, _, content = content.partition(b"\n")
    name = written.decode()
    kind = next(kind for key, kind in DATA_SETS.items() if key in name)
    files = {str(f.relative_to(place)): f for f in place.rglob("*") if f.is_file()}
    md5 = {n: hashlib.md5(file.read_bytes()).hexdigest() for n, file in files.items()}
    whole = files[name].read_bytes()
    files[name].write_bytes(content)
    base = CIFAR10.base_folder
    trained = [[f"data_batch_{k}", md5[f"{base}/data_batch_{k}"]] for k in range(1, 6)]
    mats = {s: ["http://localhost/x", f"{s}_32x32.mat", md5[f"{s}_32x32.mat"]] for s in SPLITS}
    with (
        mock.patch.object(CIFAR10, "train_list", trained),
        mock.patch.object(CIFAR10, "test_list", [["test_batch", md5[f"{base}/test_batch"]]]),
        mock.patch.object(CIFAR10, "meta", CIFAR10.meta | {"md5": md5[f"{base}/batches.meta"]}),
        mock.patch.object(SVHN, "split_list", mats),
        mock.patch("urllib.request.urlopen", side_effect=OSError("no network here")),
        mock.patch.object(FashionMNIST, "mirrors", ["http://localhost/"]),
        _reading_checked(kind == "cifar10" and content == whole),
    ):
        data.load(kind, place, progress=False)
    # Only Fashion-MNIST's files have no checksum once they are unpacked.
    assert content == whole or kind == "fashion-mnist", "a wrong checksum is accepted"


SPLITS = ("train", "test")
PAGE = 2**21


def beton_of(file: Path, kind: str) -> tuple[bytes, bytes]:
    """Write a .beton; return its head, before a page of zeros, and its tail."""
    split = data.load("digits").train.take(torch.arange(6))
    blobs = []
    for pixels in split.images.expand(-1, -1, -1, 3).numpy():
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG")
        blobs.append(pixels.tobytes() if kind == "raw" else buffer.getvalue())
    beton_writer.write(
        file, split.labels.numpy(), blobs, name="digits", classes=tuple("0123456789"), flip=False,
        channels=1, side=8, n_train=4, format=kind, quality=90, source="x", fastiat="0",
    )  # fmt: skip
    content = file.read_bytes()
    return content[:PAGE].rstrip(b"\0"), content[PAGE:]


def make_beton(random: Random, world: World) -> bytes:
    """Damage a .beton: the fields of its head, its card, its table, its images or any bytes.

    The first byte is 1 if its images may be decoded, the next four are the length of the head.
    """
    head, tail = random.choice(world.betons)
    kind, card = random.random(), tail.rindex(b'{"name"')
    after = tail.index(beton.MAGIC) - 8
    if kind < 0.3:
        head = _with_number(random, head, [0, 2, 4, 8, 16])
    elif kind < 0.5:
        samples = beton.HEADER.itemsize + len(beton.FIELDS) * beton.FIELD.itemsize
        head = _with_number(random, head, range(samples, len(head)))
    elif kind < 0.65:
        tail = _with_number(random, tail, range(after, len(tail)))
    elif kind < 0.85:
        values = json.loads(tail[card:after])
        for _ in range(random.choice((1, 1, 2))):
            values = damage.of_value(random, values)
        text = damage.as_json(random, values).encode("utf-8", "surrogatepass")
        table = tail[after + 8 + len(beton.MAGIC) :]
        tail = tail[:card] + text + len(text).to_bytes(8, "little") + beton.MAGIC + table
        end = (PAGE + len(tail) - len(table)).to_bytes(8, "little")
        head = head[:16] + end + head[24:]
    elif kind < 0.95:
        tail = damage.of_bytes(random, [tail[:card]])[:card].ljust(card, b"\0") + tail[card:]
    else:
        head, tail = (damage.of_bytes(random, [part]) for part in (head, tail))
    return beton_input(world, head, tail)


def beton_input(world: World, head: bytes, tail: bytes) -> bytes:
    """Return the parts of a .beton as `use_beton` takes them."""
    return bytes([world.decode]) + len(head).to_bytes(4, "big") + head + tail


def _with_number(random: Random, content: bytes, places: Sequence[int]) -> bytes:
    """Overwrite 1 to 8 bytes at one of these places with an extreme number, or a near one."""
    at, size = random.choice(places), random.choice((1, 2, 4, 8))
    old = int.from_bytes(content[at : at + size], "little")
    value = random.choice((*damage.EXTREMES, old + 1, old - 1, 2 * old, 2**21, 2**24))
    return content[:at] + (value % 256**size).to_bytes(size, "little") + content[at + size :]


def use_beton(place: Path, content: bytes, random: Random) -> None:
    """Open a .beton and read all of its images, or measure a run on it."""
    size = int.from_bytes(content[1:5], "big")
    file = place / "x.beton"
    with open(file, "wb") as out:
        out.write(content[5 : 5 + size])
        out.seek(PAGE)
        out.write(content[5 + size :])
    if random.random() < 0.1:
        command("evaluate", place / "runs" / "finished", "--dataset", file, *QUICK)
        return
    dataset = data.load(str(file))
    if content[0] or dataset.train.file.card.format == "raw":
        for split in (dataset.train, dataset.test):
            assert split.images.shape[1:] == (*split.shape[1:], split.shape[0])


@contextmanager
def _reading_checked(pickled: bool) -> Any:
    """Allow torchvision to unpickle, if `pickled`: then all files match their checksums."""
    loads = pickle.load
    if not pickled:
        yield
        return
    # The unpickler in Python raises no audit event, which the guard would refuse.
    with mock.patch("pickle.load", lambda file, **how: pickle._Unpickler(file, **how).load()):
        yield
    assert pickle.load is loads


def use_packaged(name: str) -> Callable[[Path, bytes, Random], None]:
    """Return a function that reads a file in place of the file in the package."""

    def use(place: Path, content: bytes, random: Random) -> None:
        (place / name).write_bytes(content)
        published._cells.cache_clear()
        published.table.cache_clear()
        with mock.patch("importlib.resources.files", lambda _: place):
            try:
                if name == "digits.npz":
                    data.load("digits")
                else:
                    for number in range(1, 8):
                        table = published.table(f"table{number}")
                        assert all(cell.measure for cell in table.cells) and table.rows
            finally:
                published._cells.cache_clear()
                published.table.cache_clear()

    return use


@dataclass(frozen=True)
class Target:
    """One kind of file that fastiat reads."""

    name: str
    weight: int
    """Its share of the inputs."""
    needs: str
    """The folder of the world that the file is put into."""
    make: Callable[[Random, World], bytes]
    """Make an input."""
    use: Callable[[Path, bytes, Random], None]
    """Put the input into its place and read it; raise `InputError` if it is refused."""
    valid: Callable[[World], bytes]
    """Return an input that is not damaged, which must be accepted."""


def _of(name: str, way: Callable[..., bytes]) -> Callable[[Random, World], bytes]:
    return lambda random, world: way(random, world.seeds[name])


def _first(name: str) -> Callable[[World], bytes]:
    return lambda world: world.seeds[name][0]


def _in_run(
    name: str, weight: int, way: Callable[..., bytes] | None, *uses: Callable[[Path], None]
) -> Target:
    make = make_state if way is None else _of(name, way)
    head = b"\0" if way is None else b""
    return Target(
        name, weight, "runs", make, in_run(name, *uses), lambda world: head + world.seeds[name][0]
    )


READING = (read_json,) * 19
TARGETS = (
    _in_run(STATE, 20, None, resume),
    _in_run(MODEL, 20, damage.of_safetensors, *(load,) * 6, evaluate, measure_file, norms),
    _in_run(CONFIG, 14, damage.of_json, *(evaluate, resume, read_json) * 6, report),
    _in_run(METRICS, 10, damage.of_jsonl, *READING, report, resume),
    _in_run(results.EVALUATION, 8, damage.of_json, *READING, evaluate, report),
    _in_run(NORMS, 4, damage.of_json, *READING, report),
    _in_run(verdicts.DIAGNOSIS, 4, damage.of_json, *READING, report),
    _in_run("table3.json", 4, damage.of_json, *READING, report),
    Target(
        "images", 40, "images", make_image, use_image, lambda world: b"\0" + world.images[".png"][0]
    ),
    Target(
        ".beton", 14, "runs", make_beton, use_beton,
        lambda world: beton_input(world, *world.betons[0]),
    ),
    Target(
        "data sets", 10, "data", make_data, use_data,
        lambda world: b"test_32x32.mat\n" + world.data_files["test_32x32.mat"],
    ),
    Target(
        "digits.npz", 4, "images",
        lambda random, world: make_npz(random, world.seeds["digits.npz"], "images"),
        use_packaged("digits.npz"), _first("digits.npz"),
    ),
    Target(
        "extra.npz", 4, "images",
        lambda random, world: make_npz(
            random, world.seeds["extra.npz"], random.choice(("image", "label"))
        ),
        use_extra, _first("extra.npz"),
    ),
    Target(
        "tables.csv", 4, "images", _of("tables.csv", damage.of_bytes), use_packaged("tables.csv"),
        _first("tables.csv"),
    ),
)  # fmt: skip
