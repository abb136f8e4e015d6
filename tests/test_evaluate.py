"""Measuring trained runs: figures, images, refusals, and other libraries' attacks."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchattacks
from PIL import Image
from scipy.stats import binomtest

import fastiat
from fastiat import cli, data
from fastiat.attack import pgd
from fastiat.config import EvaluateConfig
from fastiat.evaluate import evaluate
from fastiat.runs.directory import MODEL, Run
from fastiat.runs.results import Rate, read_results

CPU = ("--device", "cpu", "--precision", "fp32")


@pytest.fixture(scope="module")
def test_set() -> tuple[torch.Tensor, torch.Tensor]:
    split = data.load("digits").test
    return split.images.permute(0, 3, 1, 2) / 255, split.labels


def test_the_clean_error_is_that_of_the_loaded_network(good, test_set):
    x, y = test_set
    wrong = int((fastiat.load(good)(x).argmax(1) != y).sum())
    assert 0 < wrong < 120
    config = EvaluateConfig(runs=(str(good),), attacks=("none",), batch_size=77, device="cpu")
    assert evaluate(config) == {str(good): {"test/none": Rate(wrong, 360)}}


def test_attacked_errors_are_those_of_examples_made_by_hand(good, test_set):
    x, y = test_set
    model = fastiat.load(good)
    config = EvaluateConfig(
        runs=(str(good),), attacks=("fgsm", "pgd-3"), device="cpu", precision="fp32"
    )
    rates = evaluate(config)[str(good)]
    start = x.clone().requires_grad_()
    torch.nn.functional.cross_entropy(model(start), y, reduction="sum").backward()
    fgsm = (x + 0.03 * start.grad.sign()).clamp(0, 1)
    assert rates["test/fgsm"].errors == int((model(fgsm).argmax(1) != y).sum())
    x_adv = pgd(model, x, y, steps=3, generator=torch.Generator().manual_seed(0))
    assert rates["test/pgd-3"].errors == int((model(x_adv).argmax(1) != y).sum())


def test_torchattacks_takes_a_loaded_run_as_it_is(good, test_set):
    x, y = (part[:100] for part in test_set)
    model = fastiat.load(good)
    clean = model(x)
    attack = torchattacks.PGD(model, eps=0.1, alpha=0.02, steps=10)
    x_adv = attack(x, y)
    assert not model.training
    assert (x_adv - x).abs().max() <= 0.1 + 1e-6 and x_adv.min() >= 0 and x_adv.max() <= 1
    assert torch.equal(model(x), clean)
    loss = torch.nn.functional.cross_entropy
    assert loss(model(x_adv), y) > 2 * loss(clean, y)


def test_several_runs_splits_and_a_limit_make_a_table_and_rows_with_units(
    good, run, tmp_path, capsys
):
    other = Path(shutil.copytree(good, tmp_path / "good"))
    before = {path: list(Run.open(path).rows()) for path in (run, other)}
    argv = ["evaluate", run, other, "--splits", "test", "train", "--limit", "50", *CPU]
    assert cli.main([*map(str, argv), "--attacks", "none", "pgd-2", "--eps", "8/255"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        *(f"{run}:", "No", "test", "train"),
        *(f"{other}:", "No", "test", "train"),
    ]
    for index, path in ((2, run), (6, other)):
        rows = list(Run.open(path).rows())
        assert rows[: len(before[path])] == before[path]
        new = rows[len(before[path]) :]
        assert [(row["split"], row["attack"]) for row in new] == [
            *(("test", "none"), ("test", "pgd-2")),
            *(("train", "none"), ("train", "pgd-2")),
        ]
        for row in new:
            assert (row["kind"], row["n"], row["eps"]) == ("evaluation", 50, 8 / 255)
            assert row["error_percent"] == 100 * row["errors"] / 50
            assert (row["alpha"], row["norm"], row["restarts"]) == (0.0075, "linf", 1)
        shown = [str(Rate(row["errors"], 50)) for row in new[:2]]
        assert lines[index].split()[1:] == [*shown, "50"]


def test_a_limit_beyond_the_images_takes_all(run, capsys):
    assert cli.main(["evaluate", str(run), "--attacks", "none", "--limit", "99999", *CPU]) == 0
    assert capsys.readouterr().out.split()[-1] == "360"


def test_a_model_file_is_measured_alone(good, tmp_path, complaint, capsys):
    file = Path(shutil.copy(good / MODEL, tmp_path / "mine.safetensors"))
    assert "--dataset" in complaint("evaluate", file)
    assert cli.main(["evaluate", str(file), "--dataset", "digits", "--attacks", "none", *CPU]) == 0
    assert str(file) in capsys.readouterr().out


@pytest.mark.parametrize("second", ["absent", "other classes"])
def test_no_run_is_measured_when_another_cannot_be(run, tmp_path, complaint, contents, second):
    before = contents(run)
    if second == "absent":
        assert "absent: no such run" in complaint("evaluate", run, "absent")
    else:
        tree(tmp_path / "tree", "L")
        line = complaint("evaluate", run, "--dataset", "folder", "--data-dir", tmp_path / "tree")
        assert "10 classes (0, 1, 2, ...)" in line and "2 classes (a, b)" in line
    assert contents(run) == before


def test_a_network_is_not_measured_on_images_of_other_channels(
    small, tmp_path, complaint, monkeypatch
):
    monkeypatch.setenv("FASTIAT_CACHE", str(tmp_path / "cache"))
    for mode, other in (("L", "RGB"), ("RGB", "L")):
        for name in (mode, other):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
            tree(tmp_path / name, name)
        out = tmp_path / f"run-{mode}"
        flags = ("--dataset", "folder", "--data-dir", str(tmp_path / mode), "--batch-size", "4")
        assert cli.main(["train", *small, *flags, "--out", str(out)]) == 0
        line = complaint("evaluate", out, "--data-dir", tmp_path / other)
        assert "(3, 8, 8)" in line and "(1, 8, 8)" in line and "--data-dir" in line


def tree(root: Path, mode: str) -> None:
    random = np.random.default_rng(0)
    for folder in ("train/a", "train/b", "test/a", "test/b"):
        (root / folder).mkdir(parents=True)
        for number in range(4):
            pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(root / folder / f"{number}.png")


def test_evaluating_twice_with_one_seed_gives_the_same(good):
    config = EvaluateConfig(
        runs=(str(good),), attacks=("pgd-2",), eps=0.1, alpha=0.05, restarts=2, device="cpu"
    )
    assert evaluate(config) == evaluate(config)


@pytest.mark.parametrize(("errors", "n"), [(0, 10), (10, 10), (3, 40), (1437, 10_000)])
def test_the_interval_is_wilsons(errors, n):
    low, high = Rate(errors, n).interval()
    truth = binomtest(errors, n).proportion_ci(0.95, "wilson")
    assert math.isclose(low, 100 * truth.low, abs_tol=1e-4)
    assert math.isclose(high, 100 * truth.high, abs_tol=1e-4)


@pytest.mark.parametrize(
    "command",
    [
        *("evaluate RUN", "compare RUN OTHER", "sweep RUN --steps 1"),
        *("transfer RUN OTHER --eps 0.1", "diagnose RUN"),
    ],
)
def test_memory_that_runs_out_while_measuring_names_the_batch_size_to_give(
    run, tmp_path, complaint, monkeypatch, command
):
    other = shutil.copytree(run, tmp_path / "other")
    argv = command.replace("RUN", str(run)).replace("OTHER", str(other)).split()

    def refuse(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr("fastiat.measuring.one_pass.input_gradient", refuse)
    monkeypatch.setattr("fastiat.attack.input_gradient", refuse)
    monkeypatch.setattr("fastiat.attacks.loop.input_gradient", refuse)
    line = complaint(*argv, *CPU[:2])
    assert "measuring 64 images at a time takes more memory than there is" in line
    assert f"fastiat {argv[0]} {run}" in line and "--batch-size 32" in line
    assert "measuring 10 images" in complaint(*argv, *CPU[:2], "--batch-size", "10")


def test_a_run_is_measured_with_as_many_images_as_an_update_has(run, monkeypatch):
    sizes = []
    original = data.make_loader

    def make(split, batch_size, **options):
        sizes.append(batch_size)
        return original(split, batch_size, **options)

    monkeypatch.setattr("fastiat.data.make_loader", make)
    for flags in ([], ["--batch-size", "7"]):
        assert cli.main(["evaluate", str(run), "--attacks", "none", *flags, *CPU]) == 0
    assert sizes == [64, 7]


def test_a_targeted_error_is_that_of_the_best_wrong_class(good, test_set):
    x, y = (part[:120] for part in test_set)
    model = fastiat.load(good)
    config = EvaluateConfig(
        runs=(str(good),), attacks=("pgd-3-targeted", "pgd-5", "pgd-3"), device="cpu",
        precision="fp32",
    )  # fmt: skip
    rates = evaluate(config)[str(good)]
    alone = evaluate(
        EvaluateConfig(runs=(str(good),), attacks="pgd-3-targeted", device="cpu", precision="fp32")
    )[str(good)]
    assert rates["test/pgd-3-targeted"] == alone["test/pgd-3-targeted"]
    x, y = test_set
    logits = model(x).detach().clone()
    logits[torch.arange(len(y)), y] = -math.inf
    generator = torch.Generator().manual_seed(0)
    x_adv = pgd(model, x, y, steps=3, generator=generator, target=logits.argmax(1))
    wrong = int((model(x_adv).argmax(1) != y).sum())
    assert rates["test/pgd-3-targeted"] == Rate(wrong, 360)
    (entry,) = [entry for entry in read_results(good) if entry["attack"] == "pgd-3-targeted"]
    assert (entry["steps"], entry["errors"]) == (3, wrong)


def test_a_run_in_the_l2_ball_is_measured_in_it(tmp_path, capsys):
    arguments = ["train", "--dataset", "digits", "--arch", "mlp6", "--width", "16", "--norm", "l2"]
    arguments += ["--epochs", "1", "--eval-limit", "40", "--out", str(tmp_path / "run"), *CPU]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "L2 PGD-7, eps 0.5, alpha 0.1786" in out and "l2 eps 0.5, alpha 0.1786" in out
    entry = read_results(tmp_path / "run")[-1]
    assert (entry["norm"], entry["eps"]) == ("l2", 0.5)
    assert entry["alpha"] == pytest.approx(2.5 * 0.5 / 7)
    for command, words in {
        "evaluate --norm linf": "linf eps 0.03, alpha 0.0075",
        "evaluate --eps 1.5": "l2 eps 1.5, alpha 0.5357",
        "sweep --steps 2": "40 images, l2 PGD-2, eps across",
        "sweep --steps 2 --eps": "0.75",
        "sweep --norm linf --steps 2": "linf PGD-2",
    }.items():
        name, *flags = command.split()
        more = ["--limit", "40", *CPU]
        assert cli.main([name, str(tmp_path / "run"), *flags, *more]) == 0
        assert words in capsys.readouterr().out, command
    assert cli.main(["evaluate", str(tmp_path / "run"), "--norm", "linf", "--eps", "2"]) == 2
    assert "give, say, 2/255" in capsys.readouterr().err


def test_runs_of_two_norms_are_not_mixed_in_one_table(good, tmp_path, capsys):
    other = Path(shutil.copytree(good, tmp_path / "other"))
    text = (other / "config.json").read_text()
    (other / "config.json").write_text(text.replace('"norm": "linf"', '"norm": "l2"'))
    assert cli.main(["sweep", str(good), str(other), "--steps", "1", "--limit", "20", *CPU]) == 2
    assert "give the norm to measure in with --norm" in capsys.readouterr().err
