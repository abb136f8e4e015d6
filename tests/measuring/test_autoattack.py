"""AutoAttack: against a closed form, against one call of its library, and what is refused."""

import logging
import shutil
import sys
from pathlib import Path

import pyautoattack
import pytest
import torch
from torch import nn

from fastiat import cli, data
from fastiat.config import EvaluateConfig
from fastiat.measuring.autoattack import autoattack
from fastiat.models import ModelCard
from fastiat.runs.directory import Run
from fastiat.runs.results import read_results

CPU = ("--device", "cpu", "--precision", "fp32")


@pytest.fixture
def short(monkeypatch):
    """Cut the number of queries and steps, which the standard version sets."""

    class Short(pyautoattack.AutoAttack):
        def _set_version(self, version="standard"):
            super()._set_version(version)
            self.square.n_queries = 30
            for attack in (self.apgd, self.apgd_targeted, self.fab):
                attack.n_iter = 4

    monkeypatch.setattr(pyautoattack, "AutoAttack", Short)


def test_a_linear_models_error_is_the_closed_form(capfd):
    train, test = data.load("digits").train, data.load("digits").test
    x, y = train.images.view(-1, 64) / 255, train.labels
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.Linear(64, 10)
    optimizer = torch.optim.Adam(layer.parameters(), 0.01)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(layer(x), y).backward()
        optimizer.step()
    split, eps = data.holdout(test, 14, 0)[1], 0.1
    before = torch.random.get_rng_state()
    config = EvaluateConfig(device="cpu", batch_size=9)
    outcome = autoattack(nn.Sequential(nn.Flatten(), layer), split, eps=eps, config=config)
    assert torch.equal(torch.random.get_rng_state(), before)
    # Every pixel moves as far as ball and range let it, towards the wrong class.
    x, y = split.images.view(-1, 64).double() / 255, split.labels
    weight = layer.weight.detach().double()
    towards = weight[None] - weight[y][:, None]
    best = torch.where(towards > 0, (x + eps).clamp(max=1)[:, None], (x - eps).clamp(0)[:, None])
    bias = layer.bias.detach().double()
    margin = (towards * best).sum(2) + bias[None] - bias[y][:, None]
    truth = margin.scatter(1, y[:, None], -1).amax(1) > 0
    assert torch.equal(outcome.fooled, truth) and 3 < truth.sum() < 12
    assert list(outcome.errors_after) == ["none", "apgd-ce", "apgd-t", "fab-t", "square"]
    assert list(outcome.errors_after.values())[-1] == truth.sum()
    assert capfd.readouterr().err == "" and not outcome.warnings


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_colour_images_on_channels_last_weights_give_the_librarys_own_examples(short, norm):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (24, 8, 8, 3), generator=generator, dtype=torch.uint8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 6)
        )
    x = images.permute(0, 3, 1, 2).contiguous() / 255
    labels = model(x).argmax(1)
    labels[:2] = (labels[:2] + 1) % 6
    split, eps = data.Split(images, labels), 0.012 if norm == "linf" else 0.12
    config = EvaluateConfig(device="cpu", batch_size=7, norm=norm, seed=5)
    last = model.to(memory_format=torch.channels_last).train()
    outcome = autoattack(last, split, eps=eps, config=config)
    assert model.training and all(weight.grad is None for weight in model.parameters())
    model = model.to(memory_format=torch.contiguous_format).eval()
    library = pyautoattack.AutoAttack(
        model, norm="Linf" if norm == "linf" else "L2", eps=eps, seed=5, device="cpu"
    )
    library.apgd_targeted.n_target_classes = library.fab.n_target_classes = 5
    x_adv, _ = library.run_standard_evaluation(x, labels, batch_size=7)
    wrong = model(x_adv).argmax(1) != labels
    assert torch.equal(outcome.fooled, wrong) and 4 < wrong.sum() < 22
    assert outcome.errors_after["none"] == 2
    counts = list(outcome.errors_after.values())
    assert counts == sorted(counts) and counts[-1] == wrong.sum()
    # Images that are to be skipped count, and are not attacked.
    skip = torch.arange(24) >= 7
    skipped = autoattack(model, split, eps=eps, config=config, skip=skip)
    assert torch.equal(skipped.fooled, outcome.fooled | skip)
    assert skipped.errors_after["none"] == 17 + 2


def test_the_librarys_doubts_are_kept_once_and_printed_nowhere(short, capfd):
    class Probabilities(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :5].softmax(1)

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (6, 8, 8, 1), generator=generator, dtype=torch.uint8)
    split = data.Split(images, Probabilities()(images / 255).argmax(1))
    config = EvaluateConfig(device="cpu", batch_size=2)
    outcome = autoattack(Probabilities(), split, eps=0.05, config=config)
    doubts = [text for text in outcome.warnings if "probability distribution" in text]
    assert len(doubts) == 1 and "flags_doc" not in doubts[0]
    assert capfd.readouterr().err == "" and not logging.getLogger("auto-attack").handlers


@pytest.fixture
def run(good, tmp_path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "run"))


def test_evaluate_keeps_its_errors_with_the_librarys_version(short, run, capsys):
    flags = (
        "--attacks",
        "none",
        "pgd-2",
        "--eps",
        "0.08",
        "--alpha",
        "0.06",
        "--limit",
        "40",
        *CPU,
    )
    assert cli.main(["evaluate", str(run), *flags, "--autoattack"]) == 0
    none, pgd, entry = read_results(run)[-3:]
    assert (entry["kind"], entry["attack"], entry["n"]) == ("autoattack", "autoattack", 40)
    assert entry["attacks"] == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert entry["versions"]["autoattack"] == f"pyautoattack {pyautoattack.__version__}"
    assert "autoattack" not in pgd["versions"]
    after = entry["errors_after"]
    assert after["none"] == none["errors"] and after["square"] == entry["errors"]
    assert entry["errors"] >= pgd["errors"] > none["errors"]
    assert (entry["eps"], entry["alpha"], entry["precision"]) == (0.08, None, "fp32")
    header, row = capsys.readouterr().out.splitlines()[-2:]
    assert "AutoAttack" in header and f"{entry['error_percent']:.2f}±" in row.split()[3]

    assert cli.main(["evaluate", str(run), *flags, "--autoattack", "--worst"]) == 0
    worst = read_results(run)[-1]
    assert worst["attacks"] == ["none", "pgd-2", "autoattack"] and worst["attack"] == "worst"
    assert worst["errors"] >= max(pgd["errors"], entry["errors"])
    assert worst["versions"]["autoattack"] == f"pyautoattack {pyautoattack.__version__}"
    header, row = capsys.readouterr().out.splitlines()[-2:]
    assert header.split() == ["No", "attack", "Worst", "images"]
    assert row.split()[0] == "test" and row.split()[-1] == "40"


def test_without_the_library_one_line_says_what_to_install(complaint, run, monkeypatch, contents):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    before = contents(run)
    assert "pip install 'fastiat[autoattack]'" in complaint("evaluate", run, "--autoattack", *CPU)
    assert contents(run) == before


def test_too_few_classes_get_one_line(complaint, tmp_path):
    card = ModelCard("mlp6", 4, 3, 1, 8, ("0", "1", "2"))
    run = Run(tmp_path, None)  # type: ignore[arg-type]
    run.save_model(card.build().state_dict(), card)
    file = tmp_path / "model.safetensors"
    line = complaint("evaluate", file, "--autoattack", *CPU)
    assert "at least 4 classes" in line and str(file) in line


def test_logits_that_are_no_numbers_are_errors(short):
    broken = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    nn.init.constant_(broken[1].bias, torch.nan)
    split = data.holdout(data.load("digits").test, 20, 0)[1]
    outcome = autoattack(broken, split, eps=0.1, config=EvaluateConfig(device="cpu"))
    assert outcome.errors_after["none"] == 20 and bool(outcome.fooled.all())
