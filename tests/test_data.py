"""Data sets in their own file formats, the hold-out, and the resident loader."""

import gzip
import hashlib
import http.client
import http.server
import os
import pickle
import socket
import struct
import tarfile
import threading
import urllib.error
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.datasets import CIFAR10, SVHN, FashionMNIST

from fastiat import data
from fastiat.data import Dataset, ResidentLoader, Split
from fastiat.errors import InputError

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


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_digits_are_scikit_learns_scans_scaled_to_255() -> None:
    from sklearn.datasets import load_digits

    truth = load_digits()
    digits = data.load("digits")
    with files("fastiat").joinpath("digits.npz").open("rb") as file:
        test = np.load(file, allow_pickle=False)["test"]
    train = np.setdiff1d(np.arange(1797), test)
    for split, index in ((digits.train, train), (digits.test, test)):
        expected = np.floor(truth.images[index] * 255 / 16 + 0.5)
        assert np.array_equal(split.images.numpy()[..., 0], expected)
        assert np.array_equal(split.labels.numpy(), truth.target[index])
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    assert digits.train.shape == (1, 8, 8)
    assert digits.classes == tuple("0123456789")
    assert not digits.flip


def test_digits_split_gives_every_class_its_share() -> None:
    digits = data.load("digits")
    test = torch.bincount(digits.test.labels)
    share = torch.bincount(digits.train.labels) + test
    assert ((test - share * 360 / 1797).abs() < 1).all()


@pytest.mark.usefixtures("offline")
def test_cifar10_batches_keep_rows_columns_and_colours_in_place(cifar10: Path) -> None:
    dataset = data.load("cifar10", cifar10)
    assert dataset.train.images.shape == (20, 32, 32, 3)
    assert dataset.test.images.shape == (3, 32, 32, 3)
    for i in range(5):  # the first image of every batch, in the batches' order
        assert dataset.train.images[4 * i, 1, 2].tolist() == [10 + i, 20, 30]
        assert dataset.train.images[4 * i, 2, 1].tolist() == [40, 50, 60]
    assert dataset.test.images[0, 1, 2].tolist() == [15, 20, 30]
    assert dataset.train.labels.tolist() == [x for i in range(5) for x in (i, 9, 0, 1)]
    assert dataset.test.labels.tolist() == [5, 9, 0]
    assert dataset.classes == NAMES
    assert dataset.flip


@pytest.mark.usefixtures("offline")
def test_svhn_mat_keeps_pixels_in_place_and_calls_ten_zero(svhn: Path) -> None:
    dataset = data.load("svhn", svhn)
    assert dataset.train.images.shape == (5, 32, 32, 3)
    assert dataset.test.images.shape == (2, 32, 32, 3)
    for split in (dataset.train, dataset.test):
        assert split.images[0, 1, 2].tolist() == [10, 20, 30]
        assert split.images[0, 2, 1].tolist() == [40, 50, 60]
    pixels = scipy.io.loadmat(svhn / "train_32x32.mat")["X"]
    assert np.array_equal(dataset.train.images[3].numpy(), pixels[..., 3])
    assert dataset.train.labels.tolist() == [0, 1, 2, 9, 0]
    assert dataset.classes == tuple("0123456789")
    assert not dataset.flip


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("unpacked", [False, True])
def test_fashion_mnist_idx_keeps_rows_and_columns_in_place(fashion: Path, unpacked: bool) -> None:
    if unpacked:
        for path in (fashion / "FashionMNIST/raw").glob("*.gz"):
            path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
            path.unlink()
    dataset = data.load("fashion-mnist", fashion)
    assert dataset.train.images.shape == (6, 28, 28, 1)
    assert dataset.test.images.shape == (3, 28, 28, 1)
    for split in (dataset.train, dataset.test):
        assert [split.images[0, 1, 2].item(), split.images[0, 2, 1].item()] == [77, 88]
    assert dataset.train.labels.tolist() == [9, 0, 1, 2, 3, 4]
    assert dataset.classes[0] == "T-shirt/top"
    assert not dataset.flip


@pytest.mark.usefixtures("offline")
def test_archive_put_there_by_hand_is_enough(
    cifar10: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pack(cifar10, monkeypatch)
    assert len(data.load("cifar10", cifar10).train) == 20
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("offline")
def test_archive_beside_a_damaged_batch_mends_it(
    cifar10: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(cifar10, monkeypatch)
    before = data.load("cifar10", cifar10).fingerprint()
    for file in ("data_batch_3", "batches.meta"):
        (cifar10 / "cifar-10-batches-py" / file).write_bytes(b"torn")
        assert data.load("cifar10", cifar10).fingerprint() == before


@pytest.mark.usefixtures("offline")
def test_data_folder_comes_from_the_environment(
    svhn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTIAT_DATA", str(svhn))
    assert len(data.load("svhn").train) == 5
    monkeypatch.delenv("FASTIAT_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(svhn / "cache"))
    (svhn / "cache" / "fastiat").mkdir(parents=True)
    with pytest.raises(InputError) as error:
        data.load("svhn")
    assert f"into {svhn / 'cache/fastiat/data'}" in one_line(error)
    (svhn / "cache" / "fastiat" / "data").rmdir()
    (svhn / "cache" / "fastiat" / "data").symlink_to(svhn)
    assert len(data.load("svhn").train) == 5


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A web server on this machine: (its address, the folder it serves)."""
    folder = tmp_path_factory.mktemp("server")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(folder))

        def log_message(self, *_: object) -> None:
            return

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", folder
        running.shutdown()
        thread.join()


def test_absent_files_are_downloaded_quietly(
    cifar10: Path,
    server: tuple[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    address, folder = server
    before = data.load("cifar10", cifar10).fingerprint()
    pack(cifar10, monkeypatch).rename(folder / "cifar.tgz")
    monkeypatch.setattr(CIFAR10, "url", f"{address}/cifar.tgz")
    assert data.load("cifar10", cifar10).fingerprint() == before
    assert capfd.readouterr() == ("", "")
    assert socket.getdefaulttimeout() is None


def test_download_with_a_wrong_checksum_is_refused(
    svhn: Path, server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, folder = server
    (folder / "other.mat").write_bytes(b"something else")
    (svhn / "train_32x32.mat").unlink()
    listed = [f"{address}/other.mat", *SVHN.split_list["train"][1:]]
    monkeypatch.setitem(SVHN.split_list, "train", listed)
    with pytest.raises(InputError) as error:
        data.load("svhn", svhn)
    assert f"{svhn / 'train_32x32.mat'} is damaged (wrong checksum)" in one_line(error)


def test_server_that_never_answers_is_given_up(svhn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (svhn / "test_32x32.mat").unlink()
    monkeypatch.setattr(data, "DOWNLOAD_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        listed = [f"http://127.0.0.1:{silent.getsockname()[1]}/x", *SVHN.split_list["test"][1:]]
        monkeypatch.setitem(SVHN.split_list, "test", listed)
        with pytest.raises(InputError) as error:
            data.load("svhn", svhn)
    assert "could not be downloaded" in one_line(error)
    assert "timed out" in one_line(error)
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize(
    "failure",
    [
        urllib.error.URLError("unreachable"),
        urllib.error.HTTPError("http://x", 404, "Not Found", {}, None),
        TimeoutError(),
        RuntimeError("File not found\nor corrupted."),
        ConnectionResetError(104, "reset"),
        http.client.IncompleteRead(b""),
        OSError(28, "No space left on device"),
    ],
    ids=lambda failure: type(failure).__name__,
)
@pytest.mark.parametrize(
    ("name", "put"),
    [
        ("cifar10", "put cifar-10-python.tar.gz into {root}"),
        ("svhn", "put train_32x32.mat and test_32x32.mat into {root}"),
        (
            "fashion-mnist",
            "put train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz,"
            " t10k-labels-idx1-ubyte.gz into {root}/FashionMNIST/raw",
        ),
    ],
)
def test_failed_download_says_which_files_to_put_where(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    failure: Exception,
    name: str,
    put: str,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr("urllib.request.urlopen", fail)
    with pytest.raises(InputError) as error:
        data.load(name, tmp_path)
    assert one_line(error).startswith(f"{name} is not in {tmp_path} and could not be downloaded")
    assert one_line(error).endswith(put.format(root=tmp_path))
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("file", ["data_batch_2", "test_batch", "batches.meta"])
def test_damaged_cifar10_file_is_named(cifar10: Path, file: str) -> None:
    path = cifar10 / "cifar-10-batches-py" / file
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError) as error:
        data.load("cifar10", cifar10)
    assert one_line(error).startswith(f"{path} is damaged (wrong checksum)")


@pytest.mark.usefixtures("offline")
def test_truncated_archive_is_named(cifar10: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = pack(cifar10, monkeypatch)
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(InputError) as error:
        data.load("cifar10", cifar10)
    assert one_line(error).startswith(f"{archive} is damaged (wrong checksum)")


@pytest.mark.usefixtures("offline")
def test_truncated_mat_is_named(svhn: Path) -> None:
    path = svhn / "test_32x32.mat"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError) as error:
        data.load("svhn", svhn)
    assert one_line(error).startswith(f"{path} is damaged (wrong checksum)")


@pytest.mark.usefixtures("offline")
def test_truncated_gz_is_named(fashion: Path) -> None:
    path = fashion / "FashionMNIST/raw/t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError) as error:
        data.load("fashion-mnist", fashion)
    assert one_line(error).startswith(f"{path} is damaged (wrong checksum)")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("kept", [0, 3, 10, 500])
@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_truncated_idx_is_named(fashion: Path, file: str, kept: int) -> None:
    data.load("fashion-mnist", fashion)  # unpacks
    path = fashion / "FashionMNIST/raw" / file
    if kept >= path.stat().st_size:
        kept = path.stat().st_size - 1
    path.write_bytes(path.read_bytes()[:kept])
    for unpacked in path.parent.glob("*.gz"):
        unpacked.write_bytes(b"no longer needed, so not to blame")
    with pytest.raises(InputError) as error:
        data.load("fashion-mnist", fashion)
    assert one_line(error) == f"{path} is damaged: delete it and run again"


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("labels", [b"\x00\x01\x0a", b"\x00\x01"])
def test_labels_that_do_not_fit_the_images_are_refused(fashion: Path, labels: bytes) -> None:
    data.load("fashion-mnist", fashion)
    path = fashion / "FashionMNIST/raw/t10k-labels-idx1-ubyte"
    path.write_bytes(struct.pack(">II", 0x801, len(labels)) + labels)
    with pytest.raises(InputError) as error:
        data.load("fashion-mnist", fashion)
    assert "labels" in one_line(error)
    assert str(fashion) in one_line(error)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("file", ["data_batch_1", "test_batch", "batches.meta"])
def test_pickle_with_code_in_it_is_refused_and_never_run(cifar10: Path, file: str) -> None:
    class Code:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(cifar10 / "it-ran"),)

    path = cifar10 / "cifar-10-batches-py" / file
    path.write_bytes(pickle.dumps({"data": Code(), "labels": [0]}))
    with pytest.raises(InputError) as error:
        data.load("cifar10", cifar10)
    assert str(path) in one_line(error)
    assert not (cifar10 / "it-ran").exists()


def test_unknown_data_set_names_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"unknown data set 'mnist'.*cifar10, svhn, fashion-mnist"):
        data.load("mnist")


@pytest.mark.parametrize("name", ["cifar10", "svhn", "fashion-mnist", "folder"])
def test_wrong_data_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with pytest.raises(InputError, match="gone does not exist"):
        data.load(name, tmp_path / "gone")
    assert not (tmp_path / "gone").exists()
    with pytest.raises(InputError, match="does not exist"):
        data.load(name, tmp_path / ("long" * 100))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is a file"):
        data.load(name, tmp_path / "file")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may read everything
    with pytest.raises(InputError, match="cannot be read"):
        data.load(name, tmp_path)


def test_folder_without_a_data_folder_is_refused() -> None:
    with pytest.raises(InputError, match="needs a data folder"):
        data.load("folder")


def make_split(n: int, shape: tuple[int, int, int] = (8, 8, 3), classes: int = 3) -> Split:
    generator = torch.Generator().manual_seed(n)
    images = torch.randint(256, (n, *shape), dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(n) % classes)


def test_split_and_dataset_refuse_tensors_that_do_not_belong_together() -> None:
    good = make_split(6)
    with pytest.raises(InputError, match="uint8"):
        Split(good.images.float(), good.labels)
    with pytest.raises(InputError, match="contiguous"):
        Split(good.images.permute(0, 3, 1, 2), good.labels)
    with pytest.raises(InputError, match="6 images"):
        Split(good.images, good.labels[:5])
    with pytest.raises(InputError, match="labels from 0 to 2 for 2 classes"):
        Dataset("x", ("a", "b"), good, good, False)
    with pytest.raises(InputError, match=r"\(3, 8, 8\).*\(3, 9, 9\)"):
        Dataset("x", ("a", "b", "c"), good, make_split(3, (9, 9, 3)), False)
    with pytest.raises(InputError, match="without images"):
        Dataset("x", ("a", "b", "c"), good, good.take(torch.arange(0)), False)


def test_fingerprint_sees_one_pixel_one_label_and_the_shape() -> None:
    names = ("a", "b", "c")
    split = make_split(4, (8, 16, 3))
    seen = {Dataset("x", names, split, split, False).fingerprint()}
    assert seen == {Dataset("y", names, split, split, True).fingerprint()}
    pixel, label = split.images.clone(), split.labels.clone()
    pixel[3, 7, 15, 2] ^= 1
    label[0] = 2
    shape = split.images.reshape(4, 16, 8, 3)
    for images, labels in ((pixel, split.labels), (split.images, label)):
        seen.add(Dataset("x", names, Split(images, labels), split, False).fingerprint())
        seen.add(Dataset("x", names, split, Split(images, labels), False).fingerprint())
    reshaped = Split(shape, split.labels)
    seen.add(Dataset("x", names, reshaped, reshaped, False).fingerprint())
    assert len(seen) == 6
    assert all(len(each) == 16 and int(each, 16) >= 0 for each in seen)


def test_take_picks_in_the_order_of_the_index() -> None:
    split = make_split(5)
    taken = split.take(torch.tensor([3, 0]))
    assert torch.equal(taken.images, torch.stack([split.images[3], split.images[0]]))
    assert taken.labels.tolist() == [0, 0]
    assert (len(taken), taken.shape) == (2, (3, 8, 8))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=60), st.data())
def test_holdout_takes_each_class_by_largest_remainder(
    labels: list[int], more: st.DataObject
) -> None:
    size = len(labels)
    n = more.draw(st.integers(1, size - 1))
    seed = more.draw(st.integers(0, 2**32))
    numbers = torch.arange(size, dtype=torch.uint8)  # an image is its own number
    split = Split(numbers.view(size, 1, 1, 1), torch.tensor(labels))
    rest, held = data.holdout(split, n, seed)
    rest_ids, held_ids = rest.images.flatten().tolist(), held.images.flatten().tolist()
    assert len(held_ids) == n
    assert sorted(rest_ids + held_ids) == list(range(size))
    assert rest_ids == sorted(rest_ids)
    assert held_ids == sorted(held_ids)
    assert held.labels.tolist() == [labels[i] for i in held_ids]
    assert rest.labels.tolist() == [labels[i] for i in rest_ids]
    counts = Counter(labels)
    shares = {label: Fraction(n * counts[label], size) for label in counts}
    expected = {label: int(share) for label, share in shares.items()}
    by_remainder = sorted(counts, key=lambda label: (expected[label] - shares[label], label))
    for label in by_remainder[: n - sum(expected.values())]:
        expected[label] += 1
    assert {label: held.labels.tolist().count(label) for label in counts} == expected


def test_holdout_repeats_by_seed_and_differs_between_seeds() -> None:
    split = data.load("digits").train
    first, again, other = (data.holdout(split, 100, seed)[1] for seed in (0, 0, 1))
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)


@pytest.mark.parametrize("n", [-1, 0, 6, 7])
def test_holdout_of_nothing_or_everything_is_refused(n: int) -> None:
    with pytest.raises(InputError, match=f"cannot hold out {n} of 6 images"):
        data.holdout(make_split(6), n, 0)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_evaluation_batches_come_in_order_untouched_and_keep_the_last() -> None:
    split = make_split(11)
    loader = ResidentLoader(split, 4, train=False, pad=2, flip=True)
    batches = list(loader)
    assert [len(y) for _, y in batches] == [4, 4, 3]
    assert len(loader) == 3
    assert torch.equal(torch.cat([x for x, _ in batches]), split.images.permute(0, 3, 1, 2))
    assert torch.equal(torch.cat([y for _, y in batches]), split.labels)
    for x, _ in batches:
        assert x.dtype == torch.uint8
        assert x.is_contiguous(memory_format=torch.channels_last)
    assert [y.tolist() for _, y in loader.epoch(skip=2)] == [split.labels[8:].tolist()]


def test_training_pass_shuffles_sees_each_image_once_and_drops_the_rest() -> None:
    numbers = torch.arange(50, dtype=torch.uint8)
    split = Split(numbers.view(50, 1, 1, 1).expand(50, 8, 8, 3).contiguous(), numbers.long())
    loader = ResidentLoader(split, 8, train=True, pad=0, order=generator(0))
    passes = []
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == len(loader) == 6
        for x, y in batches:
            assert x.shape == (8, 3, 8, 8)
            assert x.is_contiguous(memory_format=torch.channels_last)
            assert y.dtype == torch.int64
            # With no padding and no flip every image is itself, under its own label.
            assert torch.equal(x, y.view(8, 1, 1, 1).expand(8, 3, 8, 8))
        passes.append(torch.cat([y for _, y in batches]).tolist())
        assert len(set(passes[-1])) == 48
    assert passes[0] != passes[1]
    assert passes[0] != sorted(passes[0])


@pytest.mark.parametrize(("pad", "flip"), [(0, False), (0, True), (1, False), (1, True), (2, True)])
def test_crops_and_flips_are_each_of_the_allowed_ones_equally_often(pad: int, flip: bool) -> None:
    image = np.random.default_rng(0).integers(1, 256, (8, 8, 3), np.uint8)
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    allowed = {}
    for row in range(2 * pad + 1):
        for column in range(2 * pad + 1):
            crop = padded[row : row + 8, column : column + 8]
            allowed[crop.tobytes()] = 0
            if flip:
                allowed[crop[:, ::-1].tobytes()] = 0
    n = 200 * len(allowed)
    split = Split(torch.from_numpy(image).expand(n, 8, 8, 3).contiguous(), torch.zeros(n).long())
    loader = ResidentLoader(split, 50, train=True, pad=pad, flip=flip, augment=generator(1))
    for x, _ in loader:
        for sample in x.permute(0, 2, 3, 1).contiguous().numpy():
            allowed[sample.tobytes()] += 1  # a KeyError is a crop that does not exist
    assert len(allowed) == (2 * pad + 1) ** 2 * (1 + flip)
    # Counts are binomial with mean 200 and a standard deviation of at most 14.2.
    assert all(abs(count - 200) < 71 for count in allowed.values())


def rest_of_pass(loader: ResidentLoader, skip: int = 0) -> list[tuple[Tensor, Tensor]]:
    return [(x.clone(), y.clone()) for x, y in loader.epoch(skip)]


@pytest.mark.parametrize("skip", [0, 1, 5, 7])
def test_restored_generators_repeat_the_rest_of_a_pass_and_the_next(skip: int) -> None:
    split = make_split(30)
    order, augment = generator(3), generator(4)
    loader = ResidentLoader(split, 4, train=True, flip=True, order=order, augment=augment)
    rest_of_pass(loader)  # the state to restore is not that of a fresh start
    order_state = order.get_state()
    batches = loader.epoch()
    for _ in range(skip):
        next(batches)
    augment_state = augment.get_state()
    expected = [(x.clone(), y.clone()) for x, y in batches] + rest_of_pass(loader)
    assert len(expected) == 14 - skip

    order, augment = generator(0), generator(0)
    order.set_state(order_state)
    augment.set_state(augment_state)
    resumed = ResidentLoader(split, 4, train=True, flip=True, order=order, augment=augment)
    got = rest_of_pass(resumed, skip) + rest_of_pass(resumed)
    assert len(got) == len(expected)
    for (x, y), (x_expected, y_expected) in zip(got, expected, strict=True):
        assert torch.equal(x, x_expected)
        assert torch.equal(y, y_expected)


def test_order_is_drawn_when_the_pass_starts_and_augmentation_batch_by_batch() -> None:
    order, augment = generator(0), generator(1)
    loader = ResidentLoader(make_split(12), 4, train=True, order=order, augment=augment)
    states = [order.get_state()], [augment.get_state()]

    def record() -> list[bool]:
        states[0].append(order.get_state())
        states[1].append(augment.get_state())
        return [not torch.equal(of[-1], of[-2]) for of in states]

    batches = loader.epoch()
    assert record() == [True, False]
    next(batches)
    assert record() == [False, True]
    next(batches)
    assert record() == [False, True]


def test_without_generators_torchs_own_seed_repeats_a_pass() -> None:
    loader = ResidentLoader(make_split(12), 4, train=True, flip=True)
    passes = []
    for _ in range(2):
        torch.manual_seed(5)
        passes.append(torch.cat([x for x, _ in loader]))
    assert torch.equal(*passes)


def test_batch_larger_than_the_data_is_refused_in_training_alone() -> None:
    with pytest.raises(InputError, match="a batch of 13 is larger than the 12 training images"):
        ResidentLoader(make_split(12), 13, train=True)
    assert len(ResidentLoader(make_split(12), 12, train=True)) == 1
    assert [len(y) for _, y in ResidentLoader(make_split(12), 13, train=False)] == [12]


@pytest.mark.parametrize(("batch_size", "pad"), [(0, 2), (-1, 2), (4, -1)])
def test_batch_size_below_one_and_negative_padding_are_refused(batch_size: int, pad: int) -> None:
    with pytest.raises(InputError, match=f"batch size {batch_size} with padding {pad}"):
        ResidentLoader(make_split(12), batch_size, train=True, pad=pad)


@pytest.mark.gpu
def test_batches_on_cuda_never_wait_for_the_device() -> None:
    split = make_split(64)
    augment = torch.Generator("cuda").manual_seed(0)
    loader = ResidentLoader(
        split, 8, device="cuda", train=True, pad=0, order=generator(2), augment=augment
    )
    on_cpu = ResidentLoader(split, 8, train=True, pad=0, order=generator(2))
    moving = ResidentLoader(split, 8, device="cuda", train=True, flip=True, augment=augment)
    assert next(iter(moving))[0].is_cuda
    batches, moved = loader.epoch(), moving.epoch()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = list(batches)
        assert len(list(moved)) == 8
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for (x, y), (x_expected, y_expected) in zip(got, on_cpu, strict=True):
        assert torch.equal(x.cpu(), x_expected)
        assert torch.equal(y.cpu(), y_expected)
