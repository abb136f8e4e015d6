"""Comparing runs: figures against `evaluate`, SciPy and attacks by hand; what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest
from trainings import perturbed

import fastiat
from fastiat import cli, data
from fastiat.attack import pgd
from fastiat.config import CompareConfig, EvaluateConfig
from fastiat.evaluate import compare, evaluate
from fastiat.measuring.autoattack import Outcome
from fastiat.runs.directory import CONFIG, METRICS, MODEL, Run
from fastiat.runs.results import Rate, read_results

CPU = ("--device", "cpu", "--precision", "fp32")
SETTINGS = {"device": "cpu", "precision": "fp32"}


@pytest.fixture
def run(good, tmp_path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "run"))


@pytest.fixture
def other(run) -> Path:
    """A run of the same kind with noise on its weights, so with more errors."""
    return perturbed(run, run.parent / "other", noise=0.8)


def changed(run: Path, **settings) -> None:
    """Change settings in a run's config.json."""
    kept = json.loads((run / CONFIG).read_text())
    (run / CONFIG).write_text(json.dumps(kept | settings))


def test_figures_are_those_of_evaluate_and_of_attacks_by_hand(run, other, capsys):
    names = (str(other), str(run))
    found = compare(CompareConfig(runs=names, limit=120, **SETTINGS))["test"]
    lines = capsys.readouterr().out.splitlines()
    config = EvaluateConfig(runs=names, attacks=("none", "pgd-20"), limit=120, **SETTINGS)
    truth = evaluate(config)
    assert list(found.rates) == [str(run), str(other)]  # the more robust one is first
    for name, rates in found.rates.items():
        assert rates == {attack: truth[name][f"test/{attack}"] for attack in ("none", "pgd-20")}
    split = data.draw(data.load("digits").test, 120, seed=0)
    x, y = split.images.permute(0, 3, 1, 2) / 255, split.labels
    wrong = []
    for name in (run, other):
        model, generator = fastiat.load(name), torch.Generator().manual_seed(0)
        x_adv = pgd(model, x, y, eps=0.03, alpha=0.0075, steps=20, generator=generator)
        wrong.append(model(x_adv).argmax(1) != y)
        assert found.rates[str(name)]["pgd-20"] == Rate.of(wrong[-1])
    only = [int((wrong[0] & ~wrong[1]).sum()), int((wrong[1] & ~wrong[0]).sum())]
    (pair,) = found.pairs
    assert pair.p == pytest.approx(binomtest(only[0], sum(only)).pvalue) and pair.p < 0.001
    assert lines[0].startswith("test, 120 images, linf eps 0.03, alpha 0.0075: error in %")
    assert lines[1].split() == ["No", "attack", "PGD-20", "training", "(s)"]
    for line, name in zip(lines[2:4], (run, other), strict=True):
        shown, *cells, _seconds = line.split()
        assert shown == name.name
        for cell, rate in zip(cells, found.rates[str(name)].values(), strict=True):
            of = binomtest(rate.errors, 120).proportion_ci(0.95, "wilson")
            share = rate.errors / 120
            half = max(of.high - share, share - of.low)
            assert cell == f"{100 * share:.2f}±{100 * half:.2f}"
    assert lines[4:] == [
        f"run is more robust than other under PGD-20: error {100 * wrong[0].sum() / 120:.2f} % "
        f"against {100 * wrong[1].sum() / 120:.2f} % of 120 images, McNemar p < 0.001"
    ]


def test_measurements_are_recorded_like_those_of_evaluate(run, other):
    flags = ("--limit", "50", "--batch-size", "20", "--eps", "0.05", "--restarts", "2", *CPU)
    attacks = ("--attacks", "none", "pgd-3")
    before = len(read_results(run))
    assert cli.main(["compare", str(run), str(other), *attacks, *flags]) == 0
    entries = read_results(run)
    assert [entry["attack"] for entry in entries[before:]] == ["none", "pgd-3"]
    assert cli.main(["evaluate", str(run), *attacks, *flags]) == 0
    strip = {"seconds", "time"}
    again = read_results(run)
    assert [{k: v for k, v in e.items() if k not in strip} for e in again] == [
        {k: v for k, v in e.items() if k not in strip} for e in entries
    ]


def test_seconds_are_those_of_the_epochs_and_blank_for_a_file(run, other, tmp_path, capsys):
    rows = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    epochs = [row["seconds"] for row in rows if row["kind"] == "epoch"]
    assert len(epochs) == 4
    file = Path(shutil.copy(other / MODEL, tmp_path / "alone.safetensors"))
    Run.open(other).log("epoch", epoch=5, seconds="long")
    Run.open(other).log("epoch", epoch=6, seconds=float("nan"))
    config = CompareConfig(
        runs=(str(run), str(file), str(other)), attacks="none", limit=20, dataset="digits",
        **SETTINGS,
    )  # fmt: skip
    found = compare(config)["test"].seconds
    assert found == {str(run): sum(epochs), str(file): None, str(other): sum(epochs)}
    shown = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[2:5]}
    assert shown["run"].split()[-1] == f"{sum(epochs):.1f}"
    assert len(shown["alone.safetensors"].split()) == 2


def test_every_pair_of_three_runs_gets_a_sentence_and_an_adjusted_p_value(
    run, other, tmp_path, capsys
):
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    argv = ["compare", str(other), str(run), str(copy), "--attacks", "pgd-2", *CPU]
    assert cli.main([*argv, "--splits", "test", "train", "--limit", "200"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 9 and lines[9].startswith("train, 200 images")
    assert [line.split()[0] for line in lines[2:5]] == ["run", "copy", "other"]
    assert lines[5] == "p-values of 3 pairs, adjusted by Holm's method:"
    assert lines[6].startswith("run is more robust than other under PGD-2")
    assert lines[7].startswith("copy is more robust than other under PGD-2")
    assert lines[8].startswith("No difference between run and copy can be told")
    assert lines[8].endswith("McNemar p = 1")


def test_autoattack_decides_the_order_and_the_test_and_is_kept_for_later(
    run, other, monkeypatch, capsys
):
    """AutoAttack finds more errors of the run that PGD finds more robust."""
    fooled = iter((300, 100))

    def outcome(*_, **__):
        return Outcome(torch.arange(360) < next(fooled), {"none": 0}, [])

    monkeypatch.setattr("fastiat.evaluate.autoattack", outcome)
    names = [str(run), str(other)]
    assert cli.main(["compare", *names, "--autoattack", "--attacks", "pgd-1", *CPU]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[1].split()[:2] == ["PGD-1", "AutoAttack"]
    assert [line.split()[0] for line in lines[2:4]] == ["other", "run"]
    assert lines[4].startswith("other is more robust than run under AutoAttack: error 27.78 %")
    # Recorded errors give the column and the order, but the test needs outcomes of each image.
    assert cli.main(["compare", *names, "--attacks", "pgd-1", *CPU]) == 0
    again = capsys.readouterr().out.splitlines()
    assert again[:4] == lines[:4] and "under PGD-1" in again[4]
    # Other images and another radius have none.
    for flags in (("--limit", "40"), ("--eps", "0.02"), ("--splits", "train")):
        assert cli.main(["compare", *names, "--attacks", "none", *flags, *CPU]) == 0
        assert "AutoAttack" not in capsys.readouterr().out
    # One run without them: the order is that of the attack that all have.
    (other / "evaluation.json").unlink()
    assert cli.main(["compare", *names, "--attacks", "pgd-1", *CPU]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [len(line.split()) for line in lines[2:4]] == [4, 3]
    assert [line.split()[0] for line in lines[2:4]] == ["run", "other"]


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ("compare", "RUN"),
        ("compare x", "at least two runs"),
        ("compare x y ./x", "x is named twice"),
        ("compare x y", "x: no such run"),
        ("compare x y --attacks pgd", "unknown attack 'pgd'"),
        ("compare x y --attacks", "--attacks"),
        ("compare x y --norm linf --eps 8", "give, say, 8/255"),
        ("compare x y --worst", "unknown argument --worst"),
    ],
)
def test_a_wrong_argument_gets_one_line(complaint, tmp_path, monkeypatch, argv, named):
    monkeypatch.chdir(tmp_path)
    assert named in complaint(*argv.split())
    assert not list(tmp_path.iterdir())


def test_runs_that_would_be_attacked_differently_are_named(run, other, complaint, contents):
    flags = ("--limit", "20", *CPU)
    quick = ("--attacks", "pgd-2", *flags)
    changed(other, eps=8 / 255, alpha=2 / 255)
    before = contents(run)
    line = complaint("compare", run, other, *quick)
    assert f"{other} would be attacked with eps 0.0313725, but {run} with eps 0.03" in line
    assert "--eps" in line
    line = complaint("compare", run, other, "--eps", "0.02", *quick)
    assert f"{other} would be attacked with alpha 0.00784314, but {run}" in line
    assert "--alpha" in line
    changed(other, norm="l2", eps=0.5, alpha=0.1)
    line = complaint("compare", run, other, *quick)
    assert str(other) in line and str(run) in line and "--norm" in line
    assert contents(run) == before
    assert cli.main(["compare", str(run), str(other), "--norm", "l2", "--eps", "0.5", *flags,
                     "--alpha", "0.1", "--attacks", "pgd-2"]) == 0  # fmt: skip
    changed(other, norm="linf", eps=0.03, alpha=0.001)
    # An attack without steps has no step size.
    assert cli.main(["compare", str(run), str(other), "--attacks", "fgsm", *flags]) == 0


def tree(root: Path, classes: str) -> None:
    random = np.random.default_rng(len(classes))
    for split in ("train", "test"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for number in range(4):
                pixels = random.integers(0, 256, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")


def test_runs_on_other_data_are_named(complaint, small, trained, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTIAT_CACHE", str(tmp_path / "cache"))
    flags = ("--dataset", "folder", "--batch-size", "4", "--epochs", "1")
    for name, classes, more in (
        ("two", "ab", ()), ("large", "ab", ("--image-size", "16")), ("three", "abc", ()),
        ("moved", "ab", ()),
    ):  # fmt: skip
        tree(tmp_path / f"images-{name}", classes)
        if name == "moved":
            root = tmp_path / "images-moved" / "test" / "a"
            shutil.copy(root / "0.png", root / "1.png")
        out = ("--data-dir", str(tmp_path / f"images-{name}"), "--out", str(tmp_path / name))
        assert cli.main(["train", *small, *flags, *more, *out]) == 0
    two, large, three, moved = (tmp_path / name for name in ("two", "large", "three", "moved"))
    line = complaint("compare", trained, two)
    assert f"{two} is a run on folder, but {trained} is a run on digits: compare needs" in line
    line = complaint("compare", two, large)
    assert f"{large} takes images of side 16, but {two} images of side 8" in line
    line = complaint("compare", two, three)
    assert f"{three} was trained on 3 classes (a, b, c), but {two} on 2 classes (a, b)" in line
    assert f"{moved} is a run on other images" in complaint("compare", two, moved)
