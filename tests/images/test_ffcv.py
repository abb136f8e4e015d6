"""The FFCV loader: the resident loader's batches, trainings and resumes, without and with FFCV."""

import os
import shutil
import sys
import threading
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from fastiat import cli, data
from fastiat.config import EvaluateConfig, TrainConfig
from fastiat.data import Shard, choose_loader, make_loader
from fastiat.engine import device
from fastiat.images import beton, convert, ffcv_batches
from fastiat.images import ffcv as ffcv_package
from fastiat.measuring.jobs import open_jobs
from fastiat.system.errors import InputError
from fastiat.train import Trainer

DIGITS = data.load("digits")
CPU = torch.device("cpu")


def call(*argv: object) -> None:
    assert cli.main([str(part) for part in argv]) == 0


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("betons") / "numbers.beton"
    call("convert", "digits", file)
    return file


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTIAT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def without_ffcv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ffcv", None)
    monkeypatch.setattr(ffcv_package, "_import", ffcv_package._import.__wrapped__)


def mixed_tree(root: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 2)):
        for name in "ab":
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                width, height = rng.integers(70, 90, 2)
                pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def both(split: data.Split, memory: data.Split, size: int, **options: object):
    """The loader of each kind, with generators of the same seeds."""
    return [
        make_loader(
            images, size, kind=kind,
            order=torch.Generator().manual_seed(1), augment=torch.Generator().manual_seed(2),
            **options,
        )
        for kind, images in (("ffcv", split), ("resident", memory))
    ]  # fmt: skip


def same(mine, theirs) -> int:
    """Check that two passes are equal, after both are over, and return their batches."""
    pairs = list(zip(list(mine), list(theirs), strict=True))
    for (x, y), (u, v) in pairs:
        assert torch.equal(x, u) and torch.equal(y, v)
        assert x.is_contiguous(memory_format=torch.channels_last)
    return len(pairs)


@pytest.mark.parametrize("shard", [Shard(0, 1), Shard(1, 2)])
@pytest.mark.parametrize("flip", [False, True])
def test_training_batches_are_the_resident_ones_bit_for_bit(digits: Path, flip, shard) -> None:
    stored = data.load(str(digits))
    mine, theirs = both(stored.train, DIGITS.train, 64, train=True, flip=flip, shard=shard)
    for _ in range(3):
        # Batches are compared when all are there: none may have been written over.
        assert same(mine, theirs) == 1437 // 64
    assert same(mine.epoch(20), theirs.epoch(20)) == 2
    assert same(mine.epoch(22), theirs.epoch(22)) == 0


@pytest.mark.parametrize("shard", [Shard(0, 1), Shard(1, 3)])
def test_evaluation_batches_are_the_resident_ones(digits: Path, shard) -> None:
    stored = data.load(str(digits))
    mine, theirs = both(stored.test, DIGITS.test, 100, train=False, shard=shard)
    assert same(mine, theirs) == len(mine) == len(theirs)
    assert same(mine.epoch(1), theirs.epoch(1)) == len(mine) - 1
    assert same(mine.epoch(9), theirs.epoch(9)) == 0


def test_colour_batches_that_are_held_on_to_stay_as_they_were(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (300, 8, 8, 3), dtype=torch.uint8, generator=generator)
    memory = data.Split(pixels, torch.arange(300) % 3)
    source = convert.dataset_source(data.Dataset("colours", tuple("abc"), memory, memory, True))
    convert.write_beton(tmp_path / "x.beton", source, "raw", 0, None)
    stored = data.load(str(tmp_path / "x.beton"))
    for train in (False, True):
        mine, theirs = both(stored.train, memory, 8, train=train, flip=True)
        assert same(mine, theirs) >= 37  # many more than the ring buffer has room for


def test_a_hold_out_is_read_from_its_places_in_the_file(digits: Path) -> None:
    parts = data.holdout(data.load(str(digits)).train, 100, 0)
    for got, wanted in zip(parts, data.holdout(DIGITS.train, 100, 0), strict=True):
        assert same(*both(got, wanted, 32, train=True))


def test_several_threads_decode_what_one_does(digits: Path, monkeypatch) -> None:
    monkeypatch.setattr(ffcv_batches, "_threads", lambda _: 2)  # as with a CUDA device
    mine, theirs = both(data.load(str(digits)).train, DIGITS.train, 64, train=True)
    for _ in range(2):
        assert same(mine, theirs) == 1437 // 64
    for (x, _), (u, _) in zip(mine.epoch(), mine.epoch(), strict=True):  # two at a time
        assert x.shape == u.shape


def test_two_passes_at_a_time_do_not_disturb_each_other(digits: Path) -> None:
    split = data.load(str(digits)).test
    mine, theirs = both(split, DIGITS.test, 50, train=False)
    for (x, _), (u, _), (v, _) in zip(mine, mine, theirs, strict=True):
        assert torch.equal(x, v) and torch.equal(u, v)


def test_an_abandoned_pass_ends_its_thread(digits: Path) -> None:
    before = threading.active_count()
    (loader, _) = both(data.load(str(digits)).train, DIGITS.train, 8, train=True)
    batches = iter(loader)
    next(batches)
    assert threading.active_count() == before + 1
    batches.close()
    assert threading.active_count() == before


def test_an_error_in_the_thread_that_decodes_is_raised(digits: Path, monkeypatch) -> None:
    (loader, _) = both(data.load(str(digits)).test, DIGITS.test, 8, train=False)

    def fail(*_: object) -> None:
        raise MemoryError("no room")

    first = loader.source.engine(np.arange(8, dtype=np.uint64), 8)
    first.close()
    monkeypatch.setattr(type(first), "run_pipeline", fail)
    with pytest.raises(MemoryError, match="no room"):
        list(loader)


def test_torch_keeps_its_threads(digits: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        (loader, _) = both(data.load(str(digits)).test, DIGITS.test, 100, train=False)
        for _ in loader:
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_ffcvs_own_loader_reads_the_file(digits: Path) -> None:
    ffcv_package.import_ffcv()
    from ffcv.loader import Loader

    images, labels = zip(
        *((x.numpy(), y.numpy()) for x, y in map(_copied, Loader(str(digits), 599, num_workers=1))),
        strict=True,
    )
    everything = torch.cat([DIGITS.train.images, DIGITS.test.images]).expand(-1, -1, -1, 3)
    assert np.array_equal(np.concatenate(images), everything.numpy())
    wanted = torch.cat([DIGITS.train.labels, DIGITS.test.labels])
    assert np.concatenate(labels)[:, 0].tolist() == wanted.tolist()


def _copied(batch):
    return [torch.as_tensor(part).clone() for part in batch]


def test_jpegs_are_read_as_the_resident_loader_reads_them_and_damage_is_named(tmp_path) -> None:
    file = tmp_path / "x.beton"
    call("convert", mixed_tree(tmp_path / "tree"), file, "--max-side", 64, "--format", "jpeg")
    stored = data.load(str(file))
    memory = data.Split(stored.train.images, stored.train.labels)
    assert same(*both(stored.train, memory, 4, train=True, flip=True)) == 3
    opened = beton.open_beton(file)
    content = bytearray(file.read_bytes())
    end = int(opened.ptrs[5] + opened.sizes[5])
    content[end - 400 : end] = bytes(400)
    file.unlink()
    file.write_bytes(content)
    (loader, _) = both(data.load(str(file)).train, memory, 4, train=False)
    with pytest.raises(InputError, match=r"x\.beton cannot be used, its image 5 is damaged"):
        list(loader)


def test_the_choice_and_its_reason(digits: Path, monkeypatch, without_ffcv) -> None:
    stored = data.load(str(digits))
    cuda = torch.device("cuda")
    assert choose_loader("auto", stored, CPU) == "resident"
    with pytest.raises(InputError, match=r"--loader ffcv: FFCV is not installed: .*pip install"):
        choose_loader("ffcv", DIGITS, CPU)
    monkeypatch.setattr(data, "installed", lambda: True)
    monkeypatch.setattr("fastiat.images.load.free_memory", lambda _: 2 * DIGITS.nbytes)
    assert choose_loader("auto", DIGITS, cuda) == "resident"
    assert choose_loader("auto", stored, cuda) == "ffcv"
    assert choose_loader("resident", stored, cuda) == "resident"
    monkeypatch.setattr("fastiat.images.load.free_memory", lambda _: 2 * DIGITS.nbytes - 1)
    assert choose_loader("auto", DIGITS, cuda) == "ffcv"
    assert choose_loader("auto", DIGITS, CPU) == "resident"  # it is there already


def test_free_memory_is_some_of_what_there_is() -> None:
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < device.free_memory(CPU) < there


def test_commands_that_measure_read_small_files_into_memory(digits: Path, monkeypatch) -> None:
    split = data.load(str(digits)).test
    assert make_loader(split, 9, train=False).kind == "resident"
    monkeypatch.setattr("fastiat.images.load.free_memory", lambda _: 100)
    assert same(make_loader(split, 90, train=False), make_loader(DIGITS.test, 90, train=False)) == 4
    assert make_loader(split, 9, train=False).kind == "ffcv"


CONFIG = TrainConfig(
    dataset="digits", arch="preact18", width=4, epochs=1, batch_size=64, steps=1, lr=0.02,
    holdout=64, device="cpu", precision="fp32",
)  # fmt: skip


def test_training_is_the_resident_one_and_resumes_with_the_other_loader(digits: Path) -> None:
    whole = Trainer(replace(CONFIG, loader="resident"), DIGITS)
    list(islice(whole.epoch_updates(), 6))
    first = Trainer(replace(CONFIG, loader="ffcv"), data.load(str(digits)))
    list(islice(first.epoch_updates(), 3))
    second = Trainer(replace(CONFIG, loader="resident"), DIGITS)
    second.load_state_dict(first.state_dict())
    list(islice(second.epoch_updates(), 2))
    third = Trainer(replace(CONFIG, loader="auto"), data.load(str(digits)))
    third.load_state_dict(second.state_dict())
    list(islice(third.epoch_updates(), 1))
    assert whole.step == third.step == 6
    for mine, theirs in zip(
        third.model.state_dict().values(), whole.model.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs)
    rows: list[dict] = [{}, {}]
    for trainer, row in zip((whole, third), rows, strict=True):
        trainer.validate(row)
    assert rows[0] == rows[1]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run / "model.safetensors")


def test_the_command_trains_evaluates_and_resumes(digits, tmp_path, small, trained) -> None:
    flags = [*small[2:], "--dataset", digits, "--loader", "ffcv"]
    call("train", *flags, "--out", tmp_path / "run", "--epochs", 2)
    mine, theirs = weights(tmp_path / "run"), weights(trained)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    moved = tmp_path / "elsewhere" / digits.name
    moved.parent.mkdir()
    shutil.copy(digits, moved)
    call("train", "--resume", "--out", tmp_path / "run", "--dataset", moved, "--loader", "resident")
    call("evaluate", tmp_path / "run", "--attacks", "none", "--limit", 40)
    call("evaluate", tmp_path / "run", "--attacks", "none", "--limit", 40, "--data-dir", digits,
         "--dataset", "digits")  # fmt: skip


def test_the_loader_converts_a_data_set_into_the_cache_once(cache, tmp_path, small, trained):
    flags = [*small, "--loader", "ffcv"]
    call("train", *flags, "--out", tmp_path / "a")
    (file,) = cache.glob("*.beton")
    before = file.stat().st_mtime_ns
    call("train", *flags, "--out", tmp_path / "b")
    assert file.stat().st_mtime_ns == before and len(list(cache.glob("*.beton"))) == 1
    for run in ("a", "b"):
        mine, theirs = weights(tmp_path / run), weights(trained)
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("side", "network"), [(64, ("preact18", 4)), (224, ("mlp6", 8)), (64, ("wrn28_10", 1))]
)
def test_trees_of_mixed_sizes_train_at_any_side(tmp_path, side, network) -> None:
    file = tmp_path / "x.beton"
    tree = mixed_tree(tmp_path / "tree")
    for name in ("train/a", "train/b", "test/a", "test/b"):
        Image.new("RGB", (300, 240), (9, 200, 30)).save(tree / name / "large.png")
    call("convert", tree, file, "--max-side", side)
    assert data.load(str(file)).train.shape == (3, side, side)
    arch, width = network
    call(
        "train", "--dataset", file, "--arch", arch, "--width", width, "--steps", 1, "--epochs", 1,
        "--batch-size", 7, "--lr", 0.01, "--device", "cpu", "--precision", "fp32",
        "--eval-limit", 2, "--out", tmp_path / "run",
    )  # fmt: skip
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())


def test_a_mixed_tree_trains_and_is_found_by_what_measures_it(cache, tmp_path, complaint) -> None:
    tree = mixed_tree(tmp_path / "tree")
    flags = ("--dataset", "folder", "--data-dir", tree, "--arch", "mlp6", "--width", 8)
    flags += ("--steps", 1, "--epochs", 1, "--batch-size", 4, "--device", "cpu")
    for loader in ("auto", "resident"):
        told = complaint("train", *flags, "--out", tmp_path / "no", "--loader", loader)
        assert "fastiat convert" in told and ".png is" in told
    call("train", *flags, "--out", tmp_path / "run", "--loader", "ffcv")
    (file,) = cache.glob("*.beton")
    before = file.stat().st_mtime_ns
    call("evaluate", tmp_path / "run", "--attacks", "none")
    call("diagnose", tmp_path / "run", "--limit", 2)
    assert file.stat().st_mtime_ns == before
    Image.new("RGB", (80, 80)).save(tree / "test/a/0.png")
    dataset = data.load("folder", tree, loader="ffcv")
    assert (dataset.test.images[0] == 0).all() and list(cache.glob("*.beton")) == [file]
    file.write_bytes(file.read_bytes()[:-9])  # a damaged cache is written again
    assert (data.load("folder", tree, loader="ffcv").test.images[0] == 0).all()


def test_what_does_not_fit_is_converted_by_itself(tmp_path, monkeypatch, trained) -> None:
    tree = tmp_path / "tree"
    for name in ("train/a", "train/b", "test/a", "test/b"):
        (tree / name).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tree / name / "0.png")
    assert not data.load("folder", tree, loader="auto").stored
    monkeypatch.setattr("fastiat.images.load.free_memory", lambda _: 2 * 4 * 9 * 9 * 3 - 1)
    assert data.load("folder", tree, loader="auto").stored
    assert not data.load("folder", tree, loader="resident").stored
    # As if digits were too large for the device.
    monkeypatch.setattr(data, "fits", lambda *_, **__: False)
    config = EvaluateConfig(runs=(str(trained),), device="cpu")
    (job,) = open_jobs(config)
    assert job.dataset.stored and job.dataset.fingerprint() == DIGITS.fingerprint()
    assert Trainer(CONFIG, DIGITS).loader.kind == "ffcv"


def test_without_ffcv_one_line_says_what_to_install(
    digits, tmp_path, small, complaint, capsys, without_ffcv
) -> None:
    told = complaint("train", *small, "--loader", "ffcv", "--out", tmp_path / "run")
    assert "FFCV is not installed" in told and "pip install 'fastiat[ffcv]'" in told
    assert not (tmp_path / "run").exists()
    call("train", *small[2:], "--dataset", digits, "--out", tmp_path / "run")
    assert cli.main(["doctor", "--device", "cpu"]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("loader")]
    assert "resident" in row
    assert "apt-get install pkg-config libturbojpeg0-dev libopencv-dev" in row


@pytest.mark.parametrize(
    "error", [ImportError("libturbojpeg.so.0: cannot open"), AttributeError("numpy has no x")]
)
def test_an_ffcv_that_cannot_be_imported_is_not_called_missing(
    tmp_path, small, complaint, monkeypatch, error
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(ffcv_package, "_import", fail)
    told = complaint("train", *small, "--loader", "ffcv", "--out", tmp_path / "run")
    assert str(error) in told and "force-reinstall" in told and "not installed" not in told
    assert choose_loader("auto", DIGITS, CPU) == "resident"


def test_doctor_finds_a_library_of_ffcv_that_cannot_be_loaded_without_importing_it(
    tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.delitem(sys.modules, "ffcv", raising=False)
    (tmp_path / "ffcv").mkdir()
    (tmp_path / "ffcv" / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "ffcv" / "_libffcv.so").write_text("no library")
    monkeypatch.syspath_prepend(tmp_path)
    assert cli.main(["doctor", "--device", "cpu"]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("loader")]
    assert "a run uses resident; FFCV is installed but cannot be imported" in row
    assert "_libffcv.so" in row and "force-reinstall" in row


def test_a_cache_that_cannot_be_written_is_named_and_used_for_what_it_has(
    cache, tmp_path, monkeypatch
) -> None:
    tree = mixed_tree(tmp_path / "tree")
    monkeypatch.setenv("FASTIAT_CACHE", str(tree / "test/a/0.png"))
    with pytest.raises(InputError, match=r"0\.png cannot be written to.*FASTIAT_CACHE"):
        data.load("folder", tree, loader="ffcv")
    monkeypatch.setenv("FASTIAT_CACHE", str(cache))
    before = data.load("folder", tree, loader="ffcv").fingerprint()
    (lock,) = cache.glob("*.lock")
    lock.unlink()
    lock.mkdir()  # root may write wherever it likes, but not open this
    assert data.load("folder", tree, loader="ffcv").fingerprint() == before
    Image.new("RGB", (80, 80)).save(tree / "test/a/0.png")
    with pytest.raises(InputError, match="cannot be written to"):
        data.load("folder", tree, loader="ffcv")


def test_doctor_says_which_loader_and_why(capsys) -> None:
    assert cli.main(["doctor", "--device", "cpu"]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("loader")]
    assert "resident" in row and "ffcv for .beton files" in row and "GiB" in row
