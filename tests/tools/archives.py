"""Fixtures: small data sets in the file formats of their publishers."""

import gzip
import hashlib
import pickle
import struct
import tarfile
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from torchvision.datasets import CIFAR10, SVHN, FashionMNIST

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five training batches of 4 images and a test batch of 3, as cs.toronto.edu packs them."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, batch in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        n = 3 if batch == "test_batch" else 4
        # A row is an image: 1024 red values row by row, then 1024 green, then 1024 blue.
        rows = rng.integers(0, 256, (n, 3072), np.uint8)
        rows[0, [1 * 32 + 2, 1024 + 1 * 32 + 2, 2048 + 1 * 32 + 2]] = [10 + i, 20, 30]
        rows[0, [2 * 32 + 1, 1024 + 2 * 32 + 1, 2048 + 2 * 32 + 1]] = [40, 50, 60]
        entry = {"data": rows, "labels": [i, 9, 0, 1][:n], "batch_label": batch}
        (folder / batch).write_bytes(pickle.dumps(entry, protocol=2))
    meta = {"label_names": list(NAMES), "num_vis": 3072}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))
    train = [[f"data_batch_{k}", md5(folder / f"data_batch_{k}")] for k in range(1, 6)]
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5(folder / "test_batch")]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5(folder / "batches.meta")})
    return tmp_path


def pack(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace the unpacked CIFAR-10 at `root` by the archive as it is downloaded."""
    archive, folder = root / "cifar-10-python.tar.gz", root / "cifar-10-batches-py"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(archive))
    return archive


@pytest.fixture
def svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    split_list = {}
    for split, n in (("train", 5), ("test", 2)):
        pixels = np.random.default_rng(n).integers(0, 256, (32, 32, 3, n), np.uint8)
        pixels[1, 2, :, 0] = [10, 20, 30]
        pixels[2, 1, :, 0] = [40, 50, 60]
        labels = np.array([[10], [1], [2], [9], [10]], np.uint8)[:n]
        path = tmp_path / f"{split}_32x32.mat"
        scipy.io.savemat(path, {"X": pixels, "y": labels})
        split_list[split] = ["http://localhost/x.mat", path.name, md5(path)]
    monkeypatch.setattr(SVHN, "split_list", split_list)
    return tmp_path


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    resources = []
    for split, n in (("train", 6), ("t10k", 3)):
        pixels = np.random.default_rng(n).integers(0, 256, (n, 28, 28), np.uint8)
        pixels[0, 1, 2], pixels[0, 2, 1] = 77, 88
        images = struct.pack(">IIII", 0x803, n, 28, 28) + pixels.tobytes()
        labels = struct.pack(">II", 0x801, n) + bytes([9, 0, 1, 2, 3, 4][:n])
        for kind, content in (("images-idx3", images), ("labels-idx1", labels)):
            path = raw / f"{split}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(content))
            resources.append((path.name, md5(path)))
    monkeypatch.setattr(FashionMNIST, "resources", resources)
    return tmp_path
