"""Where things lie: a tilde, data that moved, folders that are read-only, wrong or missing."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from archives import pack
from disks import disk
from PIL import Image

import fastiat
from fastiat import cli, data
from fastiat.config import (
    ConvertConfig,
    DiagnoseConfig,
    EvaluateConfig,
    NormsConfig,
    ReportConfig,
    TrainConfig,
    TransferConfig,
)
from fastiat.images import convert, downloads
from fastiat.runs.results import read_results
from fastiat.system.errors import InputError
from fastiat.train import Trainer

TINY = ("--arch", "mlp6", "--width", "8", "--steps", "1", "--epochs", "1", "--batch-size", "4")
CPU = ("--device", "cpu", "--precision", "fp32")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "home"
    place.mkdir()
    monkeypatch.setenv("HOME", str(place))
    for name in ("FASTIAT_CACHE", "FASTIAT_DATA", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return place


@pytest.fixture
def tree(home: Path) -> Path:
    """Four images of each of two classes in both splits."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (home / "tree" / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(home / "tree" / split / name / f"{i}.png")
    return home / "tree"


def test_every_setting_that_is_a_path_expands_a_tilde(home: Path) -> None:
    h = str(home)
    assert TrainConfig(data_dir="~/d", out="~/o").data_dir == f"{h}/d"
    assert TrainConfig(data_dir="~/d", out="~/o").out == f"{h}/o"
    assert TrainConfig(dataset="~/x.beton").dataset == f"{h}/x.beton"
    assert TrainConfig(data_dir=Path("~/d")).data_dir == f"{h}/d"  # type: ignore[arg-type]
    assert EvaluateConfig(runs=("~/a", "b")).runs == (f"{h}/a", "b")
    assert TransferConfig(runs=("~/a", "~/b")).runs == (f"{h}/a", f"{h}/b")
    assert NormsConfig(runs=("~",), out="~/n").out == f"{h}/n"
    assert DiagnoseConfig(run="~/a", partner="~/b") == DiagnoseConfig(
        run=f"{h}/a", partner=f"{h}/b"
    )
    assert ReportConfig(dir="~/runs", out="~/r.html") == ReportConfig(
        dir=f"{h}/runs", out=f"{h}/r.html"
    )
    assert ConvertConfig(dataset="~/t", out="~/t.beton").dataset == f"{h}/t"
    assert TrainConfig(data_dir="a~b", dataset="digits").data_dir == "a~b"


def test_a_tilde_of_no_user_is_refused_and_makes_no_folder_of_that_name(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, complaint: Callable[..., str]
) -> None:
    words = "there is no home folder ~nobody-here"
    assert words in complaint("train", "--dataset", "digits", "--out", "~nobody-here/run", *CPU)
    assert words in complaint("convert", tree, "~nobody-here/x.beton")
    assert words in complaint("evaluate", "~nobody-here/run")
    monkeypatch.setenv("FASTIAT_CACHE", "~nobody-here")
    line = complaint("train", "--dataset", "folder", "--data-dir", tree, *TINY, *CPU)
    assert words in line and sorted(os.listdir(tmp_path)) == ["home"]
    (tmp_path / "~nobody-here").mkdir()  # a file's name may start with a tilde
    assert ReportConfig(dir="~nobody-here").dir == "~nobody-here"


def test_a_tilde_works_from_convert_to_report(
    tree: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTIAT_CACHE", "~/cache")
    for argv in (
        ["convert", "~/tree", "~/t.beton"],
        ["convert", "folder", "~/u.beton", "--data-dir=~/tree"],
        ["train", "--dataset=folder", "--data-dir=~/tree", "--out=~/a", *TINY, *CPU],
        ["train", "--dataset=~/t.beton", "--out=~/b", *TINY, *CPU],
        ["train", "--resume", "--out=~/b"],
        ["evaluate", "~/a", "~/b/model.safetensors", "--attacks", "none", "--dataset=~/t.beton"],
        ["evaluate", "~/a", "--attacks", "none", "--data-dir=~/t.beton"],
        ["norms", "~/a", "--out=~/norms"],
        ["report", "~/a", "--out=~/report.html"],
    ):
        assert cli.main(argv) == 0, argv
    expected = {"tree", "cache", "t.beton", "u.beton", "a", "b", "report.html"}
    expected |= {"norms-frobenius.png", "norms-spectral.png"}
    assert expected <= set(os.listdir(home)) and not (tmp_path / "~").exists()
    assert fastiat.load("~/a") is not None
    assert read_results("~/a")
    assert len(data.load("folder", "~/tree").train) == 8
    assert len(data.load("~/t.beton").train) == len(data.load("folder", "~/t.beton").train) == 8


@pytest.mark.usefixtures("offline")
def test_a_tilde_works_in_the_environment(
    svhn: Path, home: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTIAT_DATA", "~/data")
    (home / "data").symlink_to(svhn)
    assert len(data.load("svhn").train) == 5
    monkeypatch.setenv("XDG_CACHE_HOME", "~/xdg")
    data.load("folder", tree)
    assert (home / "xdg/fastiat/betons").is_dir()


def half_trained(flags: list[str], out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train with `flags`, stopped after the first update."""
    update = Trainer.update

    def stop(self, *batch):  # type: ignore[no-untyped-def]
        result = update(self, *batch)
        os.kill(os.getpid(), 15)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", stop)
        assert cli.main(["train", *flags, "--out", str(out), *TINY, *CPU]) == 143


@pytest.mark.parametrize("how", ["tree", "dataset", "renamed", "data_dir", "file", "ffcv"])
def test_data_that_moved_are_trained_and_measured_on_at_their_new_place(
    how: str, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, new = tmp_path / "run", tmp_path / "new"
    new.mkdir()
    if how in ("tree", "ffcv"):
        if how == "ffcv":
            pytest.importorskip("ffcv")
        loader = ["--loader", "ffcv"] if how == "ffcv" else []
        half_trained(["--dataset", "folder", "--data-dir", str(tree), *loader], run, monkeypatch)
        shutil.copytree(tree, new / "pictures")
        os.utime(new / "pictures/train/cat/0.png")
        shutil.rmtree(tree)
        flags = ["--data-dir", str(new / "pictures")]
        wanted = {"dataset": "folder", "data_dir": str(new / "pictures")}
    else:
        file = tree.parent / "images.beton"
        assert cli.main(["convert", str(tree), str(file)]) == 0
        half_trained(["--dataset", str(file)], run, monkeypatch)
        moved = new / ("other.beton" if how in ("file", "renamed") else file.name)
        file.rename(moved)
        named = new if how == "data_dir" else moved
        by_name = how in ("dataset", "renamed")
        flags = ["--dataset" if by_name else "--data-dir", str(named)]
        wanted = {
            "dataset": str(moved if by_name else file),
            "data_dir": None if by_name else str(named),
        }
    assert cli.main(["train", "--resume", "--out", str(run), *flags]) == 0
    measured = [entry for entry in read_results(run) if entry["attack"] == "none"]
    assert [entry["n"] for entry in measured] == [8]
    kept = json.loads((run / "config.json").read_text())
    assert {name: kept[name] for name in wanted} == wanted
    # As it is known from now on, and at yet another place.
    assert cli.main(["evaluate", str(run), "--attacks", "fgsm"]) == 0
    assert cli.main(["train", "--resume", "--out", str(run)]) == 0
    new.rename(tmp_path / "newer")
    flags[1] = flags[1].replace(str(new), str(tmp_path / "newer"))
    assert cli.main(["evaluate", str(run), "--attacks", "pgd-2", *flags]) == 0
    assert {entry["attack"] for entry in read_results(run)} >= {"none", "fgsm", "pgd-2"}


def test_a_resume_with_other_data_is_refused_and_keeps_the_old_place(
    tree: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    complaint: Callable[..., str],
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    half_trained(["--dataset", "folder", "--data-dir", str(tree)], run, monkeypatch)
    shutil.copytree(tree, other)
    swapped = other / "train/cat/0.png", other / "train/dog/0.png"
    contents = [file.read_bytes() for file in swapped]
    for file, content in zip(swapped, reversed(contents), strict=True):
        file.write_bytes(content)
    before = (run / "config.json").read_bytes()
    line = complaint("train", "--resume", "--out", run, "--data-dir", other)
    assert "is not the one" in line and "with --data-dir" in line
    assert (run / "config.json").read_bytes() == before
    (tree / "x.beton").write_bytes(b"")
    line = complaint("train", "--dataset", "gone/y.beton", "--data-dir", tree, "--out", "r")
    assert f"{tree} holds no y.beton" in line


@pytest.mark.usefixtures("offline")
def test_a_resume_unpacks_in_the_folder_that_it_is_given(
    cifar10: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, new = tmp_path / "run", tmp_path / "new"
    half_trained(["--data-dir", str(cifar10)], run, monkeypatch)
    archive = pack(cifar10, monkeypatch)
    new.mkdir()
    archive.rename(new / archive.name)
    assert cli.main(["train", "--resume", "--out", str(run), "--data-dir", str(new)]) == 0
    assert (new / "cifar-10-batches-py").is_dir()


@pytest.mark.mounts
@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["cifar10", "fashion-mnist"])
def test_a_read_only_folder_with_the_archive_is_enough(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = request.getfixturevalue("cifar10" if name == "cifar10" else "fashion")
    if name == "cifar10":
        before = data.load(name, source).fingerprint()
        pack(source, monkeypatch)
    else:
        packed = list((source / "FashionMNIST/raw").glob("*.gz"))
        before = data.load(name, source).fingerprint()
        for file in (source / "FashionMNIST/raw").iterdir():
            if file not in packed:
                file.unlink()
    place = tmp_path / "disk"
    place.mkdir()
    with disk(place):
        shutil.copytree(source, place, dirs_exist_ok=True, ignore=lambda *_: {"disk"})
        os.system(f"mount -o remount,ro {place}")
        contents = sorted(place.rglob("*"))
        for fetch in (True, False):
            assert data.load(name, place, fetch=fetch).fingerprint() == before
        assert sorted(place.rglob("*")) == contents


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """No home folder, as for a user whom the system does not know."""
    for name in ("HOME", "FASTIAT_CACHE", "FASTIAT_DATA", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(_: int) -> None:
        raise KeyError

    monkeypatch.setattr("pwd.getpwuid", unknown)


def test_without_a_home_folder_a_tree_is_read_and_all_else_says_what_to_set(
    tree: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
    complaint: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    request.getfixturevalue("homeless")
    assert len(data.load("folder", tree).train) == 8
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "with FASTIAT_CACHE" in record.getMessage()
    with pytest.raises(InputError, match=r"no home folder.*with FASTIAT_CACHE"):
        convert.cached(convert.tree_source(tree))
    assert "--data-dir or FASTIAT_DATA" in complaint("train", "--out", tmp_path / "run", *CPU)
    assert cli.main(["doctor"]) == 0
    assert "no home folder" in capsys.readouterr().out
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("dataset", [[], ["--dataset", "cifar10"], ["--dataset", "digits"]])
def test_a_tree_is_not_taken_for_another_data_set(
    dataset: list[str], tree: Path, complaint: Callable[..., str]
) -> None:
    line = complaint("train", *dataset, "--data-dir", tree, *TINY, *CPU, "--out", "run")
    assert f"--data-dir {tree} is an image tree" in line and "add --dataset folder" in line
    assert sorted(os.listdir(tree)) == ["test", "train"]


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("place", ["outer", "outer/most"])
def test_a_tree_that_is_nested_too_deep_is_named(
    place: str, tree: Path, tmp_path: Path, complaint: Callable[..., str]
) -> None:
    outer = tmp_path / "outer"
    inner = Path(shutil.copytree(tree, tmp_path / place / "tree"))
    line = complaint("train", "--data-dir", outer, *TINY, *CPU, "--out", "run")
    assert f"holds the image tree {inner}: give --dataset folder --data-dir {inner}" in line
    folder = ("train", "--dataset", "folder", "--data-dir", outer, *TINY, *CPU)
    for command in (folder, ("convert", outer, "x.beton")):
        assert f"has no folder 'train': name {inner}" in complaint(*command)
    line = complaint("train", "--dataset", tree, *TINY, *CPU)
    assert f"give --dataset folder --data-dir {tree}" in line


@pytest.mark.usefixtures("offline")
def test_reproduce_downloads_nothing_to_a_folder_of_images(
    tree: Path, svhn: Path, complaint: Callable[..., str]
) -> None:
    command = ("reproduce", "table3", "--epochs", 1, "--width", 2, *CPU, "--data-dir")
    assert "is an image tree" in complaint(*command, tree)
    assert "holds images" in complaint(*command, tree / "train/cat")
    # Several tables may share a folder of downloaded data sets.
    assert "put cifar-10-python.tar.gz into" in complaint(*command, svhn)


@pytest.mark.usefixtures("offline")
def test_a_folder_of_other_images_says_what_it_holds(
    tree: Path, svhn: Path, tmp_path: Path, complaint: Callable[..., str]
) -> None:
    def line(place: Path, *flags: str) -> str:
        return complaint("train", *flags, "--data-dir", place, *TINY, *CPU, "--out", "run")

    one_split = line(tree / "train")
    assert f"is one split of an image tree: give --dataset folder --data-dir {tree}" in one_split
    assert "holds images: move them to train/<class>/" in line(tree / "train/cat")
    (tree / "train").rename(tree / "valid")
    assert "holds images: move them to train/<class>/" in line(tree)
    betons = tmp_path / "betons"
    betons.mkdir()
    (betons / "x.beton").write_bytes(b"")
    assert f"holds x.beton: name it with --dataset {betons / 'x.beton'}" in line(betons)
    empty = tmp_path / "sets"
    empty.mkdir()
    for name in SVHN_FILES:
        shutil.copy(svhn / name, empty / name)
    assert "holds svhn: add --dataset svhn" in line(empty)
    assert "holds svhn: add --dataset svhn" in line(empty, "--dataset", "folder")
    # Several data sets may share a folder, so that one that is named is looked for or fetched.
    assert "put cifar-10-python.tar.gz into" in line(empty, "--dataset", "cifar10")
    assert "holds svhn" in line(empty, "--dataset", "cifar10")
    assert downloads.held(empty) == ["svhn"]


SVHN_FILES = ("train_32x32.mat", "test_32x32.mat")


def test_one_image_a_process_and_maps_of_one_pixel_are_refused(
    tmp_path: Path, complaint: Callable[..., str]
) -> None:
    out = tmp_path / "run"
    network = ("--dataset", "digits", "--arch", "preact18", "--width", "2", *CPU)
    line = complaint("train", *network, "--batch-size", "1", "--out", out)
    assert "--batch-size 1 is one image per process" in line and "larger images" in line
    assert not out.exists()
