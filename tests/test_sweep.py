"""Sweeps and transfer: one command's figures against those of separate attacks, and refusals."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from trainings import perturbed

import fastiat
from fastiat import cli, data
from fastiat.attack import pgd
from fastiat.config import SweepConfig, TransferConfig
from fastiat.evaluate import sweep, transfer
from fastiat.runs.directory import CONFIG, METRICS, MODEL, Run
from fastiat.runs.results import Rate, read_results

CPU = ("--device", "cpu", "--precision", "fp32")


@pytest.fixture
def run(good, tmp_path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "run"))


@pytest.fixture
def other(run) -> Path:
    """A run of the same kind with other weights."""
    return perturbed(run, run.parent / "other")


@pytest.fixture(scope="module")
def test_set() -> tuple[torch.Tensor, torch.Tensor]:
    split = data.load("digits").test
    return split.images.permute(0, 3, 1, 2) / 255, split.labels


def attacked(path: Path, test_set, eps: float, steps: int, alpha: float = 0.0075) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    model = fastiat.load(path)
    return pgd(model, *test_set, eps=eps, alpha=alpha, steps=steps, generator=generator)


def test_a_sweep_over_eps_is_that_many_attacks_with_the_runs_own_step(run, test_set):
    settings = json.loads((run / CONFIG).read_text())
    (run / CONFIG).write_text(json.dumps(settings | {"alpha": 0.011}))
    assert cli.main(["sweep", str(run), *CPU, "--eps", "0.01", "8/255", "0.1"]) == 0
    entries = [entry for entry in read_results(run) if entry["kind"] == "sweep"]
    assert [entry["eps"] for entry in entries] == [0.01, 8 / 255, 0.1]
    for entry in entries:
        x_adv = attacked(run, test_set, entry["eps"], 20, alpha=0.011)
        wrong = int((fastiat.load(run)(x_adv).argmax(1) != test_set[1]).sum())
        assert (entry["errors"], entry["n"]) == (wrong, 360)
        assert (entry["attack"], entry["steps"], entry["alpha"]) == ("pgd-20", 20, 0.011)
    assert entries[0]["errors"] < entries[-1]["errors"]


def test_a_sweep_over_steps_is_that_many_attacks_at_the_papers_eps(run, test_set, capsys):
    assert cli.main(["sweep", str(run), *CPU, "--steps", "1", "9", "4"]) == 0
    entries = {e["steps"]: e for e in read_results(run) if e["kind"] == "sweep"}
    for steps, entry in entries.items():
        x_adv = attacked(run, test_set, 0.02, steps)
        assert entry["errors"] == int((fastiat.load(run)(x_adv).argmax(1) != test_set[1]).sum())
        assert (entry["eps"], entry["alpha"], entry["attack"]) == (0.02, 0.0075, f"pgd-{steps}")
    shown = [str(Rate(entries[steps]["errors"], 360)) for steps in (1, 9, 4)]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split() == ["1", "9", "4"] and lines[-1].split() == [str(run), *shown]


def test_a_flag_alone_takes_the_papers_values():
    assert cli.parse(["sweep", "x", "--eps"])[1] == SweepConfig(
        runs=("x",), eps=(0.005, 0.01, 0.04, 0.05, 0.06, 0.08, 0.1, 0.2), steps=(20,)
    )
    assert cli.parse(["sweep", "x", "--steps"])[1] == SweepConfig(
        runs=("x",), eps=None, steps=(5, 10, 20, 50, 100, 1000)
    )
    _, given = cli.parse(["sweep", "x", "y", "--eps", "8/255", "--alpha", "2/255"])
    assert (given.runs, given.eps, given.alpha) == (("x", "y"), (8 / 255,), 2 / 255)


def test_several_runs_radii_and_steps_make_a_grid(run, other, capsys):
    config = SweepConfig(
        runs=(str(run), str(other)), eps=(0.02, 0.1), steps=(2, 5), limit=90, device="cpu",
        splits=("test", "train"), precision="fp32",
    )  # fmt: skip
    rates = sweep(config)
    assert list(rates) == [str(run), str(other)]
    for found in rates.values():
        assert list(found) == [
            (split, eps, steps)
            for split in ("test", "train") for eps in (0.02, 0.1) for steps in (2, 5)
        ]  # fmt: skip
        assert all(rate.n == 90 for rate in found.values())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 16 and "train, 90 images, linf eps 0.1" in lines[12]
    assert lines[15].split()[1:] == [str(rates[str(other)]["train", 0.1, n]) for n in (2, 5)]


def test_a_value_named_twice_is_one_column(run, capsys):
    for flags in (("--eps", "0.01", "0.01"), ("--steps", "1", "2", "1", "--eps", "0.01", "0.01")):
        argv = ["sweep", str(run), "--limit", "20", "--device", "cpu", *flags]
        assert cli.main(argv) == 0
        _heading, columns, row = capsys.readouterr().out.splitlines()
        assert len(columns.split()) == len(row.split()) - 1 == len(set(columns.split()))


def test_every_run_is_judged_on_every_runs_examples(run, other, test_set, capsys):
    y = test_set[1]
    names = (str(run), str(other))
    config = TransferConfig(
        runs=names, eps=(0.05, 0.1), steps=5, alpha=0.02, batch_size=360, device="cpu",
        precision="fp32",
    )  # fmt: skip
    matrices = transfer(config)
    assert list(matrices) == [("test", 0.05), ("test", 0.1)]
    for (_, eps), matrix in matrices.items():
        for source in names:
            x_adv = attacked(Path(source), test_set, eps, 5, alpha=0.02)
            for target in names:
                wrong = int((fastiat.load(target)(x_adv).argmax(1) != y).sum())
                assert matrix[target][source] == Rate(wrong, 360)
        assert matrix[names[0]][names[0]].errors > matrix[names[0]][names[1]].errors
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and lines[2].split() == ["run", "other"]
    assert lines[3].split() == ["run", *map(str, matrices["test", 0.05][names[0]].values())]
    kept = {(e["source"], e["eps"]): e for e in read_results(other) if e["kind"] == "transfer"}
    assert len(kept) == 4
    for (source, eps), entry in kept.items():
        rate = matrices["test", eps][str(other)][str(run.parent / source)]
        assert (entry["errors"], entry["n"], entry["attack"]) == (rate.errors, 360, "pgd-5")
    assert kept["run", 0.1]["source_model"] == read_results(run)[0]["model"]


def test_the_diagonal_is_the_white_box_error(run, other):
    flags = ("--eps", "0.06", "--steps", "4", "--restarts", "2", *CPU)
    assert cli.main(["transfer", str(run), str(other), *flags]) == 0
    assert cli.main(["sweep", str(run), *flags]) == 0
    entries = read_results(run)
    (diagonal,) = (entry for entry in entries if entry.get("source") == "run")
    (white_box,) = (entry for entry in entries if entry["kind"] == "sweep")
    assert diagonal["errors"] == white_box["errors"] > 0


def test_runs_of_one_name_stay_apart(run, tmp_path, capsys):
    other = Path(shutil.copytree(run, tmp_path / "elsewhere" / "run"))
    flags = ("--eps", "0.06", "--steps", "1", *CPU)
    assert cli.main(["transfer", str(run), str(other), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-2:]] == [str(run), str(other)]


def tree(root: Path, classes: str) -> None:
    random = np.random.default_rng(len(classes))
    for split in ("train", "test"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for number in range(4):
                pixels = random.integers(0, 256, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")


def test_runs_that_do_not_fit_each_other_are_named(
    complaint, small, run, other, tmp_path, monkeypatch, contents
):
    monkeypatch.setenv("FASTIAT_CACHE", str(tmp_path / "cache"))
    flags = ("--dataset", "folder", "--batch-size", "4", "--epochs", "1")
    for number, classes in enumerate(("ab", "abc", "ab")):
        tree(tmp_path / f"tree{number}", classes)
        folder = (
            "--data-dir",
            str(tmp_path / f"tree{number}"),
            "--out",
            str(tmp_path / f"r{number}"),
        )
        assert cli.main(["train", *small, *flags, *folder]) == 0
    # The third tree has the first one's classes and other images.
    shutil.copy(tmp_path / "tree0/test/a/0.png", tmp_path / "tree2/test/a/1.png")
    two, three, again = (tmp_path / f"r{number}" for number in range(3))
    before = contents(run)
    line = complaint("transfer", run, two)
    assert f"{two} is a run on folder, but {run} is a run on digits" in line
    line = complaint("transfer", two, three)
    assert f"{three} was trained on 3 classes (a, b, c), but {two} on 2 classes (a, b)" in line
    assert f"{again} is a run on other images" in complaint("transfer", two, again)
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        assert "absent: no such run" in complaint("transfer", run, "absent")
    assert "at least two runs" in complaint("transfer", run, run)
    assert contents(run) == before


@pytest.mark.parametrize("kept", [0, 2])
def test_an_unfinished_run_is_named_with_the_way_on(complaint, run, other, kept):
    rows = [json.loads(line) for line in (other / METRICS).read_text().splitlines()]
    rows = [row for row in rows if row["kind"] != "epoch" or row["epoch"] <= kept]
    (other / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = complaint("transfer", run, other)
    assert f"{other} is unfinished, epoch {kept} of 4" in line and f"--resume --out {other}" in line
    (other / MODEL).unlink()
    assert f"{other}: no trained model in it yet" in complaint("transfer", run, other)


def test_a_run_that_stopped_early_is_finished(run, other):
    opened = Run.open(other)
    settings = vars(replace(opened.config, epochs=9, patience=3, holdout=100))
    (other / CONFIG).write_text(json.dumps(settings))
    errors = iter((5.0, 9.0, 6.0, 5.0))
    rows = [json.loads(line) for line in (other / METRICS).read_text().splitlines()]
    for row in rows:
        if row["kind"] == "epoch":
            row["holdout_error_percent"] = next(errors)
    (other / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--eps", "0.1", "--steps", "1", "--limit", "20", *CPU)
    assert cli.main(["transfer", str(run), str(other), *flags]) == 0


def test_model_files_transfer_where_the_images_are_named(run, other, tmp_path, complaint):
    file = Path(shutil.copy(other / MODEL, tmp_path / "mine.safetensors"))
    flags = ("--eps", "0.1", "--steps", "1", "--limit", "20", *CPU)
    assert "--dataset" in complaint("transfer", run, file, *flags)
    assert cli.main(["transfer", str(run), str(file), *flags, "--dataset", "digits"]) == 0
    sources = [entry["source"] for entry in read_results(run) if entry["kind"] == "transfer"]
    assert sources == ["run", "mine.safetensors"]


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ("sweep", "RUN"),
        ("sweep no-such-run --eps", "no-such-run: no such run"),
        ("sweep x --norm linf --eps 8", "give, say, 8/255"),
        ("sweep x --eps 0.1 nan", "--eps is nan"),
        ("sweep x --eps 0.1 -1", "--eps is -1"),
        ("sweep x --eps 0.1 a", "'a' is not a number such as 0.03 or 8/255"),
        ("sweep x --steps 5 0", "--steps is 0"),
        ("sweep x --steps 5.5", "--steps"),
        ("sweep x --steps 5 9999999", "--steps is 9999999"),
        ("sweep x --splits val", "choose from test, train"),
        ("sweep x --restarts 2 --no-random-start", "--restarts"),
        ("transfer x", "at least two runs"),
        ("transfer x ./x", "x is named twice"),
        ("transfer x y --eps", "--eps"),
        ("transfer x y --steps 0", "--steps is 0"),
        ("transfer x y --steps 9999999", "--steps is 9999999"),
        ("transfer x y --norm linf --eps 2", "give, say, 2/255"),
    ],
)
def test_a_wrong_argument_gets_one_line(complaint, tmp_path, monkeypatch, argv, named):
    monkeypatch.chdir(tmp_path)
    assert named in complaint(*argv.split())
    assert not list(tmp_path.iterdir())
