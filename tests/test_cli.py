"""The command line: help, versions, settings, and one line for everything that is wrong."""

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastiat import __version__, analyse, cli, data, evaluate
from fastiat.config import PRESETS, TrainConfig
from fastiat.system import settings
from fastiat.system.errors import InputError
from fastiat.system.settings import validated

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("columns", ["80", "120"])
@pytest.mark.parametrize("name", [None, *cli.COMMANDS])
def test_help_documents_every_setting_within_the_terminal(monkeypatch, capsys, name, columns):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"] if name else ["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= int(columns)
    if name is None:
        assert all(command in text for command in cli.COMMANDS)
        return
    kind = cli.COMMANDS[name][0]
    words = " ".join(text.split())
    for field in fields(kind):
        if field.name not in kind.positional:
            assert settings.flag_of(field.name) in text
        # Hyphens may be broken at, so only the start of the text is compared.
        assert " ".join(kind.docs()[field.name].split()[:2]).rstrip(".") in words


def test_help_shows_every_presets_defaults_as_one_would_type_them(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "(default: 0.03; authors: 8/255; modern: 8/255; strong: 8/255)" in words
    assert "(default: 0.0075; authors: 2/255; modern: 2/255; strong: 2/255)" in words
    assert "(default: 200; modern: 40; strong: 100)" in words


def test_help_version_and_wrong_flags_do_not_wait_for_torch(tmp_path):
    script = """
import sys
from fastiat import cli
for argv in (["--version"], ["--help"], ["train", "--eps", "x"], ["train", "--eps", "-1"],
             *([name, "--help"] for name in cli.COMMANDS)):
    try:
        cli.main(argv)
    except SystemExit:
        pass
heavy = {"torch", "torchvision", "numpy", "matplotlib"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True
    )
    assert ended.returncode == 0, ended.stderr.decode()


def test_streams_that_the_shell_has_closed_neither_end_a_command_nor_lend_their_numbers(tmp_path):
    script = """
import os
from fastiat.cli import main
code = main(["report", "--out", "no/run.html", "missing"])
opened = os.open(os.devnull, os.O_RDONLY)
os._exit(code if opened > 2 else 99)
"""
    ended = subprocess.run(
        ["sh", "-c", '"$0" -c "$1" <&- >&- 2>&-', sys.executable, script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert ended.returncode == 2


@pytest.mark.parametrize("target", ["doctor", "train"])
def test_an_interrupt_that_an_import_swallows_ends_the_command_all_the_same(
    monkeypatch, capsys, target
):
    original, done = cli.resolve, []

    def swallow(kind: Any, given: Any) -> Any:
        with suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        return original(kind, given)

    monkeypatch.setattr("fastiat.cli.resolve", swallow)
    monkeypatch.setattr("fastiat.train.train", done.append)
    monkeypatch.setattr("fastiat.cli.doctor", done.append)
    assert cli.main([target]) == 130
    assert capsys.readouterr().err == "fastiat: interrupted\n"
    assert not done
    # As a library does that was imported by half.
    monkeypatch.setattr("fastiat.cli.check_interrupts", lambda: {}["multiply"])
    assert cli.main([target]) == 130
    assert capsys.readouterr().err == "fastiat: interrupted\n"
    monkeypatch.undo()
    monkeypatch.setattr("fastiat.cli.doctor", done.append)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert cli.main(["doctor"]) == 0
    assert len(done) == 1


def test_an_empty_out_is_refused_by_a_resume_too(complaint):
    assert "--out is empty" in complaint("train", "--resume", "--out", "")


def test_python_m_fastiat_works_outside_the_checkout(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-m", "fastiat", "--version"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stdout) == (0, f"fastiat {__version__}\n")


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ("", "COMMAND"),
        ("trian", "'train', 'evaluate'"),
        ("train --foo", "--foo"),
        ("train --epoch 3", "did you mean --epochs?"),
        ("train stray", "stray"),
        (
            "train --arch resnet50",
            "choose from preact18, wrn28_10, wrn34_10, mlp6, torch",
        ),
        ("train --arch resnet50", "did you mean torchvision:resnet50 or timm:resnet50?"),
        ("train --arch shufflenet_v2_x1_0", "did you mean torchvision:shufflenet_v2_x1_0?"),
        ("train --arch convnextv2_tiny", "did you mean timm:convnextv2_tiny?"),
        ("train --arch preact17", "FILE.py:FUNCTION, did you mean preact18?"),
        ("train --dataset imagenet", "'cifar10', 'cifar100', 'svhn'"),
        ("evaluate x --dataset imagenet", "'cifar10', 'cifar100', 'svhn'"),
        ("convert digits", "the following arguments are required: PATH"),
        ("convert digits x.bin", "'x.bin' is not the name of a .beton file: end it with .beton"),
        ("convert digits x.beton --max-side 7", "--max-side is 7: give at least 8"),
        ("convert digits x.beton --quality 101", "--quality is 101: give at most 100"),
        ("train --mix cutmux", "'mixup', 'manifold'"),
        ("train --width", "--width"),
        ("train --width 1.5", "--width"),
        ("train --eps abc", "--eps: 'abc' is not a number such as 0.03 or 8/255"),
        ("train --eps 8/0", "--eps: '8/0' is not a number"),
        ("train --eps -1/255", "--eps is -0.0039"),
        ("train --eps nan", "--eps is nan"),
        ("train --eps -inf", "--eps is -inf"),
        ("train --eps 8", "give, say, 8/255"),
        ("train --alpha inf", "--alpha is inf"),
        ("train --alpha -0.1", "--alpha is -0.1"),
        ("train --lr -0.1", "--lr is -0.1"),
        ("train --lr nan", "--lr is nan"),
        ("train --lr 1e999", "--lr is inf"),
        ("train --epochs 0", "--epochs is 0"),
        ("train --batch-size 0", "--batch-size is 0"),
        ("train --batch-size 99999999999", "--batch-size is 99999999999"),
        (f"train --seed 1{'0' * 400}", "--seed is 1000"),
        ("train --seed -1", "--seed is -1"),
        ("train --ema 1", "--ema is 1"),
        ("train --clean-weight 1.5", "--clean-weight is 1.5"),
        ("train --patience 3", "--holdout"),
        ("train --dataset digits --mix-at 0 3", "--mix-at 3: this network has the mix points 0 ("),
        (
            "train --dataset digits --mix-at groups.9",
            "--mix-at groups.9: the network has",
        ),
        (
            "train --dataset digits --normalise imagnet",
            "--normalise imagnet: choose image",
        ),
        ("train --dataset digits --normalise imagenet", "is for 3 channels, but the images have 1"),
        ("train --dataset digits --normalise 0.5 0", "standard deviations above 0"),
        ("train --momentum 0", "--no-nesterov"),
        ("train --out=", "--out is empty"),
        ("evaluate", "RUN"),
        ("evaluate no-such-run", "no-such-run: no such run"),
        ("evaluate x --attacks pgd-0", "pgd-K such as pgd-20"),
        ("evaluate x --attacks pgd-x", "pgd-K such as pgd-20"),
        (f"evaluate x --attacks pgd-{'9' * 5000}", "pgd-K such as pgd-20"),
        ("evaluate x --attacks cw", "unknown attack 'cw'"),
        ("evaluate x --splits val", "choose from test, train"),
        ("evaluate x --limit 0", "--limit is 0"),
        ("evaluate x --eps -1", "--eps is -1"),
        ("evaluate x --restarts 2 --no-random-start", "--restarts"),
        ("report no-such-folder", "no-such-folder holds no run"),
        ("doctor --device tpu", "choose from auto, cpu, cuda, cuda:N"),
    ],
)
def test_a_wrong_argument_gets_one_line(complaint, tmp_path, monkeypatch, argv, named):
    monkeypatch.chdir(tmp_path)
    assert named in complaint(*argv.split())
    assert not list(tmp_path.iterdir())


def test_fractions_are_numbers():
    _, given = cli.parse(["train", "--eps", "8/255", "--alpha", "2/255"])
    assert (given.eps, given.alpha) == (8 / 255, 2 / 255)


@pytest.mark.parametrize("preset", PRESETS)
def test_flags_override_the_preset_and_config_json_gives_the_same_back(preset):
    _, given = cli.parse(["train", "--preset", preset, "--lr", "0.5", "--normalise", "none"])
    assert given == replace(PRESETS[preset](), lr=0.5, normalise=("none",))
    assert validated(json.loads(json.dumps(asdict(given))), TrainConfig) == given


def test_help_of_reproduce_lists_what_it_reproduces(capsys):
    with pytest.raises(SystemExit):
        cli.parse(["reproduce", "--help"])
    targets = ",".join([*(f"table{n}" for n in range(1, 8)), "figure1"])
    printed = capsys.readouterr().out
    assert f"{{{targets}}}" in printed and "usage: fastiat reproduce TARGET [" in printed


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_setting_is_documented(command):
    kind = cli.COMMANDS[command][0]
    assert set(kind.docs()) >= {field.name for field in fields(kind)}
    assert all(len(text) > 5 for text in kind.docs().values())


@pytest.mark.parametrize(
    "tree", ["absent", "empty", "file", "one-sided", "sizes", "corrupt", "cut"]
)
def test_a_wrong_data_folder_gets_one_line_and_no_run(
    complaint, small, tmp_path, monkeypatch, tree
):
    monkeypatch.setenv("FASTIAT_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "images"
    if tree == "file":
        root.write_text("")
    elif tree != "absent":
        root.mkdir()
    if tree not in ("absent", "empty", "file"):
        make_tree(root)
    picture = root / "test" / "b" / "0.png"
    if tree == "one-sided":
        (root / "train" / "c").mkdir()
        Image.new("L", (8, 8)).save(root / "train" / "c" / "0.png")
    elif tree == "sizes":
        Image.new("L", (9, 9)).save(picture)
    elif tree == "corrupt":
        picture.write_bytes(b"no image")
    elif tree == "cut":
        picture.write_bytes(picture.read_bytes()[:60])
    out = tmp_path / "run"
    line = complaint("train", *small, "--dataset", "folder", "--data-dir", root, "--out", out)
    assert str(root) in line
    if tree in ("sizes", "corrupt", "cut"):
        assert str(picture) in line
    assert not out.exists()


def make_tree(root: Path, mode: str = "L", count: int = 1) -> None:
    """Write `count` noise images of 8x8 for each of two classes and both splits."""
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                picture = Image.fromarray(pixels).convert(mode)
                picture.save(root / split / name / f"{number}.png")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--batch-size 5000", "--batch-size 5000 takes 5000 training images, more than the 1437"),
        ("--holdout 5000", "--holdout 5000 leaves none of the 1437 training images"),
        ("--device tpu", "choose from auto, cpu, cuda, cuda:N"),
        ("--device cuda:7", "use --device cpu or auto"),
        ("--resume", "holds no run"),
    ],
)
def test_what_does_not_fit_gets_one_line_and_no_run(complaint, small, tmp_path, flags, named):
    out = tmp_path / "run"
    assert named in complaint("train", *small, "--out", out, *flags.split())
    assert not out.exists()


def test_a_data_set_that_is_absent_offline_says_what_to_put_where(
    complaint, small, tmp_path, monkeypatch
):
    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    out = tmp_path / "run"
    line = complaint("train", *small, "--dataset", "svhn", "--data-dir", tmp_path, "--out", out)
    assert "train_32x32.mat, test_32x32.mat" in line and str(tmp_path) in line
    assert not out.exists()


def test_an_out_that_cannot_be_used_gets_one_line(complaint, small, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    assert f"{file} is a file" in complaint("train", *small, "--out", file)
    assert f"{file} is a file" in complaint("train", *small, "--out", file / "below")
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    assert "other files in it" in complaint("train", *small, "--out", other)
    assert (file.read_text(), (other / "notes.txt").read_text()) == ("mine", "mine")
    # A folder that nobody, not even root, can write to.
    assert "/proc" in complaint("train", *small, "--out", "/proc/sys/fastiat")


def test_an_out_that_holds_a_run_is_left_alone(complaint, small, run, contents):
    before = contents(run)
    assert "--resume" in complaint("train", *small, "--out", run)
    assert "started with --lr 0.02, not 0.5" in complaint(
        "train", "--resume", "--out", run, "--lr", "0.5"
    )
    assert "started with --preset paper, not modern" in complaint(
        "train", "--resume", "--out", run, "--preset", "modern"
    )
    assert contents(run) == before


def test_memory_that_is_not_there_gets_one_line(complaint, small, tmp_path):
    assert "lower --batch-size or --width" in complaint(
        "train", *small, "--width", 2**31, "--out", tmp_path / "run"
    )
    assert not (tmp_path / "run").exists()


def test_a_missing_parent_is_made_and_limits_beyond_the_data_take_all(small, tmp_path, capsys):
    out = tmp_path / "not" / "there" / "run"
    assert (
        cli.main(["train", *small, "--epochs", "1", "--eval-limit", "99999", "--out", str(out)])
        == 0
    )
    assert capsys.readouterr().out.splitlines()[-1].split()[-1] == str(
        len(data.load("digits").test)
    )


def test_a_bug_still_shows_its_traceback(monkeypatch):
    def fail(_):
        raise RuntimeError("a bug")

    monkeypatch.setattr("fastiat.cli.doctor", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["doctor"])


def test_doctor_names_what_a_run_would_take(capsys):
    assert cli.main(["doctor", "--device", "cpu"]) == 0
    rows = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone"
    assert rows["fastiat"] == __version__
    assert rows["torch"] == f"{torch.__version__}, built for {built}"
    assert rows["cpu"].endswith(f"instructions {torch.backends.cpu.get_cpu_capability()}")
    for package in ("pyautoattack", "timm"):
        assert rows[package] == importlib.metadata.version(package)
    assert "cpu" in rows["device"] and "resident" in rows["loader"]


def test_doctor_imports_neither_ffcv_nor_the_compiler():
    # These imports take ten seconds.
    code = (
        "import sys; from fastiat.cli import main; main(['doctor', '--device', 'cpu']); "
        "print(*({'ffcv', 'numba', 'torchvision', 'timm', 'torch._dynamo', 'torch._inductor'} "
        "& sys.modules.keys()))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0 and ended.stdout.endswith("\n\n")


def test_doctor_calls_a_folder_of_a_packages_name_no_package(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("fastiat.cli.PACKAGES", ("torch", "absent"))
    (tmp_path / "absent").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert cli.main(["doctor", "--device", "cpu"]) == 0
    rows = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert rows["absent"] == "not installed"


def test_a_preset_in_python_fills_what_was_left_out_as_on_the_command_line():
    flags = ["train", "--preset", "modern", "--eps", "4/255", "--epochs", "200"]
    given = TrainConfig(preset="modern", eps="4/255", epochs=200)
    assert given == cli.parse(flags)[1]
    # Both name the paper's own values, which stay.
    assert (given.eps, given.epochs, given.schedule) == (4 / 255, 200, "cosine")
    assert replace(given, lr=0.2).schedule == "cosine" and TrainConfig() == PRESETS["paper"]()
    with pytest.raises(TypeError, match="schedul, did you mean schedule"):
        TrainConfig(schedul="cosine")


@pytest.mark.parametrize(
    ("kind", "given", "named"),
    [
        (TrainConfig, {"schedule": "linear"}, "--schedule is 'linear': choose from 'step'"),
        (TrainConfig, {"preset": "modrn"}, "did you mean modern"),
        (TrainConfig, {"arch": "preact"}, "did you mean preact18"),
        (TrainConfig, {"dataset": "cifar-10"}, "did you mean cifar10"),
        (TrainConfig, {"epochs": True}, "--epochs is True: give a whole number"),
        (TrainConfig, {"epochs": 3.5}, "--epochs is 3.5: give a whole number"),
        (TrainConfig, {"epochs": "3"}, "--epochs is '3': give a whole number"),
        (TrainConfig, {"random_start": 1}, "--random-start is 1: give True or False"),
        (TrainConfig, {"lr": None}, "--lr is None: give a number"),
        (TrainConfig, {"lr": "fast"}, "--lr is 'fast': give a number"),
        (TrainConfig, {"eps": "8/0"}, "--eps is '8/0': give a number"),
        (TrainConfig, {"eps": "8"}, "give, say, 8/255"),
        (TrainConfig, {"eps": np.float32("nan")}, "--eps is nan"),
        (TrainConfig, {"mix_at": {"input"}}, "--mix-at is {'input'}: give a tuple"),
        (TrainConfig, {"schedule": np.array([1, 2])}, "--schedule is array([1, 2]): choose from"),
        (TrainConfig, {"preset": np.array(["paper", "modern"])}, "--preset is array"),
        (cli.EvaluateConfig, {"norm": "l1"}, "--norm is 'l1': choose from 'linf', 'l2'"),
        (cli.EvaluateConfig, {"runs": 3}, "RUNS is 3: give a tuple of strings"),
        (cli.EvaluateConfig, {"attacks": "fgms"}, "did you mean fgsm"),
        (cli.EvaluateConfig, {"runs": "a", "splits": []}, "--splits is empty"),
        (cli.SweepConfig, {"runs": "a", "eps": ()}, "--eps is empty"),
        (cli.SweepConfig, {"runs": "a", "steps": ()}, "--steps is empty"),
        (cli.SweepConfig, {"steps": (1, 2.5)}, "--steps is (1, 2.5)"),
        (cli.TransferConfig, {"precision": "fp16"}, "--precision is 'fp16'"),
        (cli.DiagnoseConfig, {"limit": "all"}, "--limit is 'all'"),
        (cli.ReproduceConfig, {"target": "table9"}, "TARGET is 'table9'"),
        (cli.ConvertConfig, {"format": "png", "out": "x.beton"}, "--format is 'png'"),
        (cli.NormsConfig, {"out": 3}, "--out is 3: give a string"),
        (cli.ReportConfig, {"dir": None}, "DIR is None: give a string"),
        (cli.DoctorConfig, {"device": 0}, "--device is 0: give a string"),
    ],
)
def test_python_settings_are_checked_like_flags(kind, given, named):
    with pytest.raises(InputError) as raised:
        kind(**given).check()
    assert named in str(raised.value)


def test_a_command_without_runs_says_so_in_python_too():
    for command, config in (
        (evaluate.evaluate, cli.EvaluateConfig()),
        (evaluate.sweep, cli.SweepConfig()),
        (analyse.norms, cli.NormsConfig()),
    ):
        with pytest.raises(InputError, match="RUNS is empty"):
            command(config)


def test_python_settings_take_the_numbers_that_python_has(tmp_path):
    config = TrainConfig(
        eps="8/255", alpha=Fraction(2, 255), lr=np.float64(0.3), epochs=np.int64(3),
        nesterov=np.bool_(False), steps=torch.tensor(4), mix_at=[0, np.int64(2)],
        weight_decay=0, out=tmp_path,
    )  # fmt: skip
    config.check()
    assert (config.eps, config.alpha, config.lr) == (8 / 255, 2 / 255, 0.3)
    assert (config.nesterov, config.mix_at, config.out) == (False, ("0", "2"), str(tmp_path))
    assert [type(n) for n in (config.epochs, config.steps)] == [int] * 2
    assert json.loads(json.dumps(asdict(config)))["epochs"] == 3
    measured = cli.EvaluateConfig(runs=tmp_path, attacks="none", eps="4/255")
    measured.check()
    assert (measured.runs, measured.attacks, measured.eps) == ((str(tmp_path),), ("none",), 4 / 255)
