"""The run directory: what is written whole, read with suspicion and refused by name."""

import json
import os
import pickle
import shutil
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torture import equal

import fastiat
from fastiat import cli
from fastiat.config import TrainConfig
from fastiat.runs.directory import (
    CONFIG,
    LOCK,
    METRICS,
    MODEL,
    PREVIOUS,
    STATE,
    Run,
    default_out,
    load_with_card,
)
from fastiat.runs.weights import alike, pack_state, read_state
from fastiat.system.errors import DamagedError, InputError
from fastiat.system.files import write


class Bomb:
    """Pickles to code that makes a folder when loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory, small) -> Path:
    """A run of another arch."""
    out = tmp_path_factory.mktemp("runs") / "stranger"
    flags = ("--arch", "preact18", "--width", "2", "--adv", "none", "--epochs", "1")
    assert cli.main(["train", *small, *flags, "--out", str(out)]) == 0
    return out


def test_a_network_saved_again_is_the_same_file(trained, tmp_path):
    weights, card = safetensors.torch.load_file(trained / MODEL), load_with_card(trained)[1]
    wanted = (trained / MODEL).read_bytes()
    assert int.from_bytes(wanted[:8], "little") % 8 == 0  # tensors lie aligned, as the library's
    again = Run.create(tmp_path / "again", Run.open(trained).config)
    for _ in range(20):  # unsorted, one order in six comes each time
        again.save_model(weights, card)
        assert (tmp_path / "again" / MODEL).read_bytes() == wanted
    again.unlock()


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "cifar10-preact18-pgd-manifold-s0"),
        ({"dataset": "folder", "data_dir": "../cats"}, "folder-cats-preact18-pgd-manifold-s0"),
        ({"dataset": "folder", "data_dir": "/data/dogs/"}, "folder-dogs-preact18-pgd-manifold-s0"),
        # A folder of images may have the name of a data set.
        ({"dataset": "folder", "data_dir": "svhn"}, "folder-svhn-preact18-pgd-manifold-s0"),
        # The folder of downloads says nothing about the images.
        ({"dataset": "svhn", "data_dir": "/data"}, "svhn-preact18-pgd-manifold-s0"),
        ({"dataset": "/data/dogs.beton"}, "dogs-preact18-pgd-manifold-s0"),
        ({"arch": "torchvision:resnet18"}, "cifar10-resnet18-pgd-manifold-s0"),
        ({"arch": "timm:resnet18"}, "cifar10-timm-resnet18-pgd-manifold-s0"),
        ({"arch": "nets/mine.py:make"}, "cifar10-mine-make-pgd-manifold-s0"),
        ({"arch": "nets:make", "seed": 3}, "cifar10-nets-make-pgd-manifold-s3"),
        ({"objective": "trades", "awp": 0.01}, "cifar10-preact18-trades-awp-manifold-s0"),
    ],
)
def test_the_default_name_of_a_run_has_what_distinguishes_it(settings, name):
    assert default_out(TrainConfig(**settings)) == Path("runs") / name


def test_config_json_rebuilds_the_settings(run):
    opened = Run.open(run)
    assert opened.config.arch == "mlp6" and opened.config.lr == 0.02
    assert json.loads((run / CONFIG).read_text()) == asdict(opened.config)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"colour": 1}', "unknown field 'colour'"),
        (b'{"width": 1e9}', "'width' cannot be 1000000000.0"),
        (b'{"width": -4}', "--width is -4"),
        (b'{"eps": "x"}', "'eps' cannot be 'x'"),
        (b'{"eps": NaN}', "not JSON with finite numbers"),
        (b'{"lr": 1e999}', "not JSON with finite numbers"),
        (b'{"nesterov": 1}', "'nesterov' cannot be 1"),
        (b'{"arch": "vgg"}', "--arch 'vgg': choose from preact18"),
        (b'{"arch": 18}', "'arch' cannot be 18"),
        (b'{"mix_at": [0, "1"]}', "'mix_at' cannot be"),
        (b'{"epochs": 1' + b"0" * 4000 + b"}", "not JSON with finite numbers"),
    ],
)
def test_a_damaged_config_is_named_and_nothing_written(complaint, run, contents, content, named):
    if content.startswith(b"{"):  # a change of one setting
        content = json.dumps(json.loads((run / CONFIG).read_text()) | json.loads(content)).encode()
    (run / CONFIG).write_bytes(content)
    before = contents(run)
    for argv in (["evaluate", run], ["train", "--resume", "--out", run], ["report", run]):
        line = complaint(*argv)
        assert str(run / CONFIG) in line and named in line
    assert contents(run) == before


@pytest.mark.parametrize("name", [STATE, MODEL])
@pytest.mark.parametrize("damage", ["cut", "empty", "zeros", "pickle", "torch pickle", "stranger"])
def test_a_damaged_or_foreign_checkpoint_is_refused_without_running_it(
    complaint, run, stranger, contents, tmp_path, name, damage
):
    file, mark = run / name, tmp_path / "executed"
    whole = file.read_bytes()
    if damage == "cut":
        file.write_bytes(whole[: len(whole) // 2])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "zeros":
        file.write_bytes(bytes(len(whole)))
    elif damage == "pickle":
        file.write_bytes(pickle.dumps(Bomb(mark)))
    elif damage == "torch pickle":
        torch.save({"config": {}, "step": Bomb(mark)}, file)
    else:
        shutil.copy(stranger / name, file)
    if name == STATE:
        shutil.copy(file, run / PREVIOUS)
    # A resume takes the lock of the run, and so writes its process id.
    before = contents(run) | {LOCK: None}
    argv = ["train", "--resume", "--out", run] if name == STATE else ["evaluate", run]
    line = complaint(*argv)
    assert str(run) in line
    if damage == "stranger":
        assert "another run" in line
    assert not mark.exists()
    assert contents(run) | {LOCK: None} == before
    if name == MODEL and damage != "stranger":
        with pytest.raises(InputError, match=MODEL):
            fastiat.load(run)


def test_the_bomb_of_these_tests_goes_off(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


def test_a_checkpoint_of_the_same_network_but_other_settings_is_refused(complaint, run, small):
    other = run.with_name("other")
    assert cli.main(["train", *small, "--seed", "1", "--out", str(other)]) == 0
    shutil.copy(other / STATE, run / STATE)
    assert "of another run, with --seed 1 instead of 0" in complaint(
        "train", "--resume", "--out", run
    )


@pytest.mark.parametrize(
    "change",
    [
        {"width": 2**40},
        {"width": 10**400},
        {"arch": "wrn28_10", "width": 10**9},
        {"num_classes": 10**12},
        {"image_size": 2**31},
        {"width": -1},
        {"arch": "vgg"},
        {"classes": ["only one"]},
        {"classes": None},
        {"weights": "pickle"},
    ],
)
def test_a_card_that_lies_is_refused_without_making_its_network(run, monkeypatch, change):
    file = run / MODEL
    _, card = load_with_card(run)
    metadata = {"card": json.dumps(asdict(card) | change)}
    safetensors.torch.save_file(safetensors.torch.load_file(file), file, metadata)
    with pytest.raises(InputError, match=MODEL):
        fastiat.load(file)


def test_a_model_without_a_card_is_refused(complaint, tmp_path):
    file = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(3)}, file)
    assert "not a model of fastiat" in complaint("evaluate", file, "--dataset", "digits")


def test_a_state_without_a_config_is_refused(complaint, run):
    for name in (STATE, PREVIOUS):
        (run / name).write_bytes(pack_state({"step": 3}))
    assert "not a checkpoint of fastiat" in complaint("train", "--resume", "--out", run)


@pytest.mark.parametrize(
    "change",
    [
        *({"step": "x"}, {"step": -1}, {"step": 10**9}, {"validated_epochs": None}),
        *({"best": [1]}, {"best": {"epoch": 9, "errors": 1}}, {"skipped": 10**6}, {"seconds": -1}),
        *({"model": {}}, {"random": 3}, {"average": {}}, {"totals": torch.zeros(3)}),
        {"order_before_epoch": torch.zeros(5056, dtype=torch.uint8)},
    ],
)
def test_a_state_with_wrong_values_is_refused(complaint, run, change):
    state = read_state(run / STATE)
    for name in (STATE, PREVIOUS):
        (run / name).write_bytes(pack_state(state | change))
    assert str(run) in complaint("train", "--resume", "--out", run)


def test_a_state_comes_back_as_it_was_packed(tmp_path):
    state = {
        "x": torch.arange(6).reshape(2, 3).t(),
        "group": {"a.b": torch.ones(2, dtype=torch.bfloat16), "c": torch.tensor(3)},
        "empty": {},
        "best": {"epoch": 1},
        "none": None,
        "seconds": 0.1,
    }
    file = tmp_path / "state"
    file.write_bytes(pack_state(state))
    again = read_state(file)
    assert equal(again, state) and again.keys() == state.keys()
    assert pack_state(again) == pack_state(state)


def test_every_single_wrong_bit_of_a_state_is_noticed(tmp_path):
    state = {"model": {"weight": torch.rand(3, 4), "bias": torch.rand(4)}, "step": 3, "best": None}
    file, whole = tmp_path / "state", pack_state(state)
    for at in range(len(whole)):
        for bit in range(8):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
            try:
                found = read_state(file)
            except DamagedError:
                continue
            # A name is compared by whoever takes the state over.
            assert not alike(found.get("model"), state["model"]), (at, bit)


def test_a_run_that_lost_its_checkpoints_says_so(complaint, run):
    for name in (STATE, PREVIOUS):
        (run / name).unlink()
    assert f"has lost {STATE} and {PREVIOUS}" in complaint("train", "--resume", "--out", run)
    (run / MODEL).unlink()
    assert f"{run}: no trained model in it yet" in complaint("evaluate", run)


def test_a_row_cut_short_by_a_crash_is_dropped_and_hides_no_other(run):
    whole = (run / METRICS).read_text()
    (run / METRICS).write_text(whole + '{"kind": "ep')
    opened = Run.open(run)
    assert list(opened.rows()) == [json.loads(line) for line in whole.splitlines()]
    opened.log("evaluation", error_percent=1.5)
    rows = (run / METRICS).read_text()
    assert rows == whole + '{"kind": "evaluation", "error_percent": 1.5}\n'


@pytest.mark.parametrize("line", ["3", "[]", "no JSON", "[" * 100_000, "\x85"])
def test_a_damaged_row_in_the_middle_is_named(complaint, run, line):
    lines = (run / METRICS).read_text().split("\n")
    (run / METRICS).write_text("\n".join([lines[0], line, *lines[1:]]))
    assert f"{run / METRICS}, line 2 is damaged" in complaint("report", run)


def test_rewinding_drops_later_steps_and_keeps_evaluations(run):
    rows = [
        {"kind": "step", "step": 20},
        {"kind": "step", "step": "x"},
        {"kind": "evaluation", "n": 3},
        {"kind": "epoch", "step": 22, "epoch": 1},
        {"kind": "step", "step": 40},
        {"kind": "epoch", "step": 44, "epoch": 2},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run / METRICS).write_text(text + "3\n" + '{"kind')
    opened = Run.open(run)
    opened.rewind(44, 1)
    assert list(opened.rows()) == [rows[0], *rows[2:5]]
    opened.rewind(22, 1)
    assert list(opened.rows()) == [rows[0], rows[2], rows[3]]
    opened.rewind(22, 0)
    assert list(opened.rows()) == [rows[0], rows[2]]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    file = tmp_path / "file"
    write(file, b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match=f"No space left on device: '{file}'"):
        write(file, b"new")
    assert [(f.name, f.read_bytes()) for f in tmp_path.iterdir()] == [("file", b"old")]


def test_a_run_that_cannot_be_made_leaves_no_folder(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError):
        Run.create(tmp_path / "a" / "b", TrainConfig())
    assert not list(tmp_path.iterdir())


def test_a_network_that_is_given_for_a_run_of_a_built_in_one_is_refused(run):
    with pytest.raises(InputError, match="which fastiat builds itself: leave out model"):
        fastiat.load(run, model=torch.nn.Linear(1, 1))


def test_a_loaded_network_gives_gradients_and_is_in_eval_mode(run):
    model = fastiat.load(run)
    assert not model.training and all(p.requires_grad for p in model.parameters())
    x = torch.rand(2, 1, 8, 8, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_message_about_a_damaged_model_has_no_escape_sequence_of_the_file(run):
    head = json.dumps({"\x1b]0;owned\x07": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}})
    (run / MODEL).write_bytes(len(head).to_bytes(8, "little") + head.encode())
    with pytest.raises(InputError, match="owned") as raised:
        fastiat.load(run)
    assert str(raised.value).isprintable()


def write_strangers(folder: Path) -> dict[str, Path]:
    """Write files and folders that are no models, by a word that must name each."""
    weights = {"w": torch.ones(2)}
    files = {
        "PyTorch checkpoint": folder / "model.pt",
        "old PyTorch": folder / "old.pth",
        "TorchScript": folder / "script.ckpt",
        "zip archive": folder / "a.zip",
        "text file": folder / "notes.txt",
        "another kind": folder / "a.png",
        "NumPy array": folder / "a.npy",
        "empty file": folder / "empty",
        "does not say which network": folder / "foreign.safetensors",
        "folder without a run": folder / "nothing",
        "training state": folder / "state.safetensors",
    }
    torch.save(weights, files["PyTorch checkpoint"])
    files["training state"].write_bytes(pack_state(weights | {"step": 3}))
    torch.save(weights, files["old PyTorch"], _use_new_zipfile_serialization=False)
    torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(str(files["TorchScript"]))
    with zipfile.ZipFile(files["zip archive"], "w") as archive:
        archive.writestr("a.txt", "a")
    files["text file"].write_text("caf\u00e9\n" * 400, encoding="utf-8")
    Image.new("L", (8, 8)).save(files["another kind"])
    np.save(files["NumPy array"], np.ones(2))
    files["empty file"].touch()
    safetensors.torch.save_file(weights, files["does not say which network"])
    files["folder without a run"].mkdir()
    return files


def test_what_is_no_model_is_named_with_what_is_expected(tmp_path, complaint):
    for named, file in write_strangers(tmp_path).items():
        line = complaint("evaluate", file, "--device", "cpu")
        assert named in line and str(file) in line and "name a run directory" in line
        assert "damaged" not in line


def test_a_link_to_nothing_is_no_missing_run(tmp_path, complaint):
    (tmp_path / "run").symlink_to(tmp_path / "moved")
    assert "it is a link to nothing" in complaint("evaluate", tmp_path / "run")


def test_a_folder_of_runs_names_one_of_them(run, complaint):
    assert f"name one of them, such as {run}" in complaint("evaluate", run.parent)
