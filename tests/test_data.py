"""Data sets in their own file formats, absent, damaged and hostile ones."""

import gzip
import http.client
import http.server
import os
import pickle
import socket
import struct
import threading
import urllib.error
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from archives import NAMES, md5, pack
from torchvision.datasets import CIFAR10, CIFAR100, SVHN

from fastiat import data
from fastiat.images import downloads
from fastiat.system.errors import InputError
from fastiat.system.settings import DATASETS


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_digits_are_scikit_learns_scans_scaled_to_255() -> None:
    from sklearn.datasets import load_digits

    truth = load_digits()
    digits = data.load("digits")
    with files("fastiat.images").joinpath("digits.npz").open("rb") as file:
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
    monkeypatch.setattr(downloads, "DOWNLOAD_TIMEOUT", 0.2)
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
        ("cifar100", "put cifar-100-python.tar.gz into {root}"),
        ("svhn", "put train_32x32.mat, test_32x32.mat into {root}"),
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


def test_every_name_of_a_data_set_has_its_facts_or_is_local() -> None:
    assert {*downloads.DOWNLOADS, "digits", "folder"} == set(DATASETS)


def test_unknown_data_set_names_the_known_ones() -> None:
    with pytest.raises(
        InputError, match=r"unknown data set 'mnist'.*cifar10, cifar100, svhn, fashion-mnist"
    ):
        data.load("mnist")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "fashion-mnist", "folder"])
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


def test_a_splits_pixels_are_contiguous_floats_in_0_to_1():
    images = torch.randint(256, (5, 3, 4, 2), dtype=torch.uint8)
    split = data.Split(images, torch.tensor([4, 0, 1, 2, 3]))
    for count, whole in ((None, 5), (5, 5), (2, 2)):
        x, y = split.pixels(count)
        assert x.dtype == torch.float32 and x.is_contiguous() and x.shape == (whole, 2, 3, 4)
        exact = images[:whole].double().numpy().transpose(0, 3, 1, 2) / 255
        np.testing.assert_allclose(x.numpy(), exact, rtol=1e-7)
        assert torch.equal(y, split.labels[:whole])
    x.zero_(), y.zero_()
    assert split.images.any() and split.labels[0] == 4, "what it returns shares the split's memory"
    for count in (0, -1, 6):
        with pytest.raises(InputError, match="give 1 to 5"):
            split.pixels(count)


@pytest.mark.usefixtures("offline")
def test_cifar100_has_fine_classes_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, n in (("train", 6), ("test", 4)):
        rows = rng.integers(0, 256, (n, 3072), np.uint8)
        rows[1, 1024 + 3 * 32 + 5] = 77  # green, row 3, column 5 of image 1
        entry = {"data": rows, "fine_labels": [99, 0, 5, 7, 1, 2][:n], "coarse_labels": [0] * n}
        (folder / split).write_bytes(pickle.dumps(entry, protocol=2))
    names = [f"class {number}" for number in range(100)]
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names}, protocol=2))
    for split in ("train", "test"):
        monkeypatch.setattr(CIFAR100, f"{split}_list", [[split, md5(folder / split)]])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": md5(folder / "meta")})
    dataset = data.load("cifar100", tmp_path)
    assert dataset.classes == tuple(names) and dataset.flip
    assert dataset.train.shape == (3, 32, 32) and len(dataset.test) == 4
    assert dataset.train.labels.tolist() == [99, 0, 5, 7, 1, 2]
    assert int(dataset.train.images[1, 3, 5, 1]) == 77
    (folder / "test").write_bytes(b"torn")
    with pytest.raises(InputError, match="wrong checksum"):
        data.load("cifar100", tmp_path)
