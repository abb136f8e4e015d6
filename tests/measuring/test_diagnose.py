"""Signs of masked gradients: seen in networks made to mask them, not in a plainly trained one."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torchattacks
from scipy.stats import binomtest
from torch import nn
from torch.nn import functional as F

import fastiat
from fastiat import cli, data
from fastiat.measuring import verdicts
from fastiat.measuring.autoattack import Outcome
from fastiat.measuring.one_pass import fooled
from fastiat.measuring.probe import examine, precise_loss
from fastiat.measuring.verdicts import DIAGNOSIS, Finding, read_diagnosis
from fastiat.runs.directory import MODEL, Run

EPS, ALPHA = 0.1, 0.025
FGSM, STEPS, LARGER, TRANSFER, NOISE, GRADIENTS, SURFACE, MARGIN, AUTO = CHECKS = (
    "FGSM weaker than PGD",
    "more steps never weaker",
    "larger eps reaches 100 %",
    "white-box beats transfer",
    "noise far weaker than gradients",
    "gradients are there",
    "loss rises along its gradient",
    "cross-entropy against margin",
    "AutoAttack gap",
)


@pytest.fixture(scope="module")
def good(tmp_path_factory, small) -> Path:
    """A run that tells digits apart, trained plainly."""
    out = tmp_path_factory.mktemp("runs") / "good"
    network = ("--arch", "preact18", "--width", "6", "--adv", "none", "--mix", "none")
    flags = (*network, "--lr", "0.1", "--schedule", "cosine", "--pad", "0", "--epochs", "4")
    assert cli.main(["train", *small, *flags, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def images() -> data.Split:
    return data.holdout(data.load("digits").test, 100, 0)[1]


class Masked(nn.Module):
    """A network between something done to the pixels and something done to the logits."""

    def __init__(self, model, before=lambda x: x, after=lambda logits: logits):
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, x):
        return self.after(self.model(self.before(x)))


def wavy(x):
    """Leave images as they are, but off the grid of 256 levels let slopes point anywhere."""
    level = 255 * x
    return (level + 20 * torch.sin(2 * torch.pi * level) / (2 * torch.pi)) / 255


def found(model, images, **settings) -> dict[str, Finding]:
    findings = examine(model, images, eps=EPS, alpha=ALPHA, **settings)
    assert [finding.check for finding in findings] == list(CHECKS)
    return {finding.check: finding for finding in findings}


def failed(findings: dict[str, Finding]) -> set[str]:
    return {check for check, finding in findings.items() if finding.verdict == "fail"}


def test_a_plainly_trained_network_passes_and_its_figures_are_those_of_others(good, images):
    model = fastiat.load(good)
    findings = found(model, images)
    assert {check: finding.verdict for check, finding in findings.items()} == dict.fromkeys(
        CHECKS, "pass"
    ) | {TRANSFER: "not done", AUTO: "not done"}
    assert "--partner" in findings[TRANSFER].sentence
    assert "--autoattack" in findings[AUTO].sentence

    x, y = images.images.permute(0, 3, 1, 2) / 255, images.labels

    def error(x):
        return float((model(x).argmax(1) != y).sum())

    with torch.no_grad():
        clean = error(x)
    fgsm = error(torchattacks.FGSM(model, eps=EPS)(x, y))
    torch.manual_seed(0)  # torchattacks takes its random starts from there
    attack = torchattacks.PGD(model, eps=EPS, alpha=ALPHA, steps=100)
    # One random start moves the error by up to 4 points either way.
    pgd = sum(error(attack(x, y)) for _ in range(4)) / 4
    assert findings[NOISE].figures["clean_error_percent"] == clean
    assert findings[FGSM].figures["fgsm_error_percent"] == fgsm
    assert findings[STEPS].figures["steps"][-1] == 100
    assert findings[STEPS].figures["error_percent"][-1] == pytest.approx(pgd, abs=5)
    assert findings[LARGER].figures["eps"] == [EPS, 2 * EPS, 4 * EPS, 8 * EPS, 1.0]
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)
    median = gradient.flatten(1).norm(dim=1).median()
    assert findings[GRADIENTS].figures["median_norm"] == pytest.approx(float(median), rel=1e-3)


def test_a_softmax_too_certain_to_have_a_gradient_fails(good, images):
    model = fastiat.load(good)
    masked = Masked(model, after=lambda logits: 1e4 * logits)
    findings = found(masked, images, partner=model)
    assert failed(findings) == {LARGER, TRANSFER, NOISE, GRADIENTS, SURFACE, MARGIN}
    assert findings[GRADIENTS].figures["zero_percent"] > 50


def test_rounding_before_the_network_fails(good, images):
    model = fastiat.load(good)
    findings = found(Masked(model, before=lambda x: (15 * x).round() / 15), images, partner=model)
    # Both losses are blind alike.
    assert failed(findings) == {LARGER, TRANSFER, NOISE, GRADIENTS, SURFACE}
    assert findings[GRADIENTS].figures["zero_percent"] == 100
    assert findings[SURFACE].figures["first_step_rises_percent"] == 0


def test_gradients_that_are_right_at_the_images_alone_fail(good, images):
    model = fastiat.load(good)
    findings = found(Masked(model, before=wavy), images, partner=model)
    assert failed(findings) == {FGSM, TRANSFER, NOISE}


def test_gradients_that_are_not_finite_fail(good, images):
    # Digits have black pixels, where the root has no slope.
    findings = found(Masked(fastiat.load(good), before=lambda x: x.sqrt() ** 2), images)
    assert findings[GRADIENTS].verdict == "fail"
    assert findings[GRADIENTS].figures["not_finite_percent"] == 100
    assert findings[GRADIENTS].figures["median_norm"] is None


class Linear(nn.Module):
    """Logits (0, -500, slope * sum of pixels + 100): far beyond the softmax's bend for label 0."""

    def __init__(self, slope):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))

    def forward(self, x):
        up = self.slope * x.flatten(1).sum(1) + 100
        return torch.stack([torch.zeros_like(up), torch.full_like(up, -500), up], 1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_norms_and_losses_are_those_of_a_linear_network(norm):
    grey = data.Split(torch.full((7, 4, 4, 1), 128, dtype=torch.uint8), torch.zeros(7).long())
    findings = {
        finding.check: finding.figures
        for finding in examine(Linear(2.0), grey, eps=EPS, alpha=ALPHA, norm=norm, batch_size=3)
    }
    assert findings[GRADIENTS]["median_norm"] == pytest.approx(2 * math.sqrt(16))
    surface = findings[SURFACE]
    at_image = 100 + 2 * 16 * 128 / 255
    # All 16 pixels move by eps, or the image by eps in all.
    slope = 2 * 16 * EPS if norm == "linf" else 2 * 4 * EPS
    assert surface["median_loss_along_gradient"] == pytest.approx(
        [at_image + part * slope for part in surface["fractions_of_eps"]], rel=1e-6
    )
    assert surface["median_linearity_error"] == pytest.approx(0, abs=1e-4)
    assert surface["first_step_rises_percent"] == surface["monotone_percent"] == 100
    assert findings[LARGER]["eps"][-1] == (1 if norm == "linf" else 4)


def test_the_step_is_the_one_asked_for_and_longer_only_in_larger_balls(good, images, monkeypatch):
    taken = {}

    def spy(*args, eps, alpha, **more):
        taken[eps] = alpha
        return fooled(*args, eps=eps, alpha=alpha, **more)

    monkeypatch.setattr("fastiat.measuring.probe.fooled", spy)
    examine(fastiat.load(good), images.take(torch.arange(8)), eps=0.04, alpha=0.003)
    assert taken == pytest.approx({0.04: 0.003, 0.08: 0.01, 0.16: 0.02, 0.32: 0.04, 1: 0.125})


def test_autoattacks_error_is_compared_and_its_version_kept(run, monkeypatch):
    asked = []

    def stand_in(model, split, *, eps, config):
        """Fool the first 19 of 20 images; what the library does is test_autoattack.py's."""
        asked.append((len(split), eps, config.norm, config.seed, config.precision))
        return Outcome(of(19, 20))

    monkeypatch.setattr("fastiat.measuring.probe.run_autoattack", stand_in)
    flags = ("--limit", "20", "--seed", "5", "--norm", "l2", "--device", "cpu", "--autoattack")
    assert cli.main(["diagnose", str(run), *flags]) == 0
    assert asked == [(20, 0.5, "l2", 5, "fp32")]
    finding = read_diagnosis(run)[-1]
    assert (finding.check, finding.figures["autoattack_error_percent"]) == (AUTO, 95)
    *_, row = Run.open(run).rows()
    assert row["versions"]["autoattack"].startswith("pyautoattack ")


def test_autoattack_that_is_not_installed_says_what_to_install(
    complaint, run, contents, monkeypatch
):
    before = contents(run)
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    assert "pip install 'fastiat[autoattack]'" in complaint("diagnose", run, "--autoattack")
    assert contents(run) == before


def test_the_loss_is_exact_where_float32_has_none():
    logits = torch.tensor([[0.0, 1.0, 2.0], [200.0, 0.0, -1000.0], [-300.0, 0.0, 0.0]])
    y = torch.zeros(3, dtype=torch.int64)
    exact = [math.log(1 + math.e + math.e**2), math.exp(-200), 300 + math.log(2)]
    assert precise_loss(logits, y).tolist() == pytest.approx(exact, rel=1e-12)
    assert F.cross_entropy(logits[1:2], y[1:2]) == 0


def of(n: int, total: int = 1000) -> torch.Tensor:
    """Return which images an attack fooled: the first n."""
    return torch.arange(total) < n


def test_a_weaker_attack_in_front_fails_unless_chance_explains_it():
    assert verdicts.outranks(of(500), of(400)) == "pass"
    assert verdicts.outranks(of(500), of(510)) == "pass"
    assert verdicts.outranks(of(500), of(511)) == "fail"
    # The same lead, but out of 491 + 480 images on which the two differ.
    shifted = torch.arange(1000) >= 489
    assert binomtest(511, 1000, alternative="greater").pvalue > verdicts.CHANCE
    assert verdicts.outranks(of(489), shifted) == "warn"
    assert verdicts.outranks(of(5, 100), of(8, 100)) == "warn"


@pytest.mark.parametrize(
    ("finding", "verdict", "word"),
    [
        (verdicts.fgsm_weaker(of(300), of(500)), "pass", "at least as many"),
        (verdicts.fgsm_weaker(of(100), of(500)), "warn", "quote the error under PGD"),
        (verdicts.fgsm_weaker(of(500), of(300)), "fail", "cannot be trusted"),
        (verdicts.fgsm_weaker(of(8, 100), of(5, 100)), "warn", "--limit"),
        (verdicts.more_steps({1: of(9), 20: of(600), 100: of(610)}), "pass", "converged"),
        (verdicts.more_steps({1: of(9), 20: of(600), 100: of(650)}), "warn", "longer"),
        (verdicts.more_steps({1: of(9), 20: of(650), 100: of(600)}), "fail", "fewer"),
        (verdicts.larger_eps({0.1: of(300), 1: of(995)}), "pass", "every image"),
        (verdicts.larger_eps({0.1: of(300), 1: of(970)}), "warn", "misses a few"),
        (verdicts.larger_eps({0.1: of(300), 1: of(900)}), "fail", "useless gradients"),
        (verdicts.larger_eps({0.1: of(600), 0.2: of(500), 1: of(1000)}), "fail", "underestimate"),
        (verdicts.white_box(None, of(300)), "not done", "--partner"),
        (verdicts.white_box(of(200), of(300)), "pass", "no more images"),
        (verdicts.white_box(of(300), of(200)), "fail", "hide"),
        (
            verdicts.noise_weaker(of(100), of(150), of(300), eps=1, points=9),
            "pass",
            "help the attack",
        ),
        (verdicts.noise_weaker(of(100), of(250), of(300), eps=1, points=9), "warn", "little"),
        (verdicts.noise_weaker(of(100), of(300), of(300), eps=1, points=9), "fail", "do not"),
        (verdicts.noise_weaker(of(100), of(100), of(100), eps=1, points=9), "fail", "do not"),
        (verdicts.gradients(torch.tensor([0.0] + 99 * [1.0])), "pass", "can follow"),
        (verdicts.gradients(torch.tensor([0.0] + 19 * [1.0])), "warn", "some images"),
        (verdicts.gradients(torch.tensor([0.0] + 5 * [1.0])), "fail", "cannot follow"),
        (verdicts.gradients(torch.tensor([math.nan] + 99 * [1.0])), "fail", "cannot follow"),
        (verdicts.cross_entropy(of(600), of(620)), "pass", "few images"),
        (verdicts.cross_entropy(of(600), of(650)), "warn", "larger error"),
        (verdicts.cross_entropy(of(600), of(750)), "fail", "softmax"),
        (verdicts.cross_entropy(of(6, 10), of(8, 10)), "warn", "larger error"),
        (verdicts.autoattack_gap(of(640), of(600)), "pass", "few images more"),
        (verdicts.autoattack_gap(of(680), of(600)), "warn", "quote its error"),
        (verdicts.autoattack_gap(of(900), of(600)), "fail", "not real"),
        (verdicts.autoattack_gap(None, of(600)), "not done", "--autoattack"),
    ],
)
def test_every_threshold_divides_as_it_says(finding, verdict, word):
    assert finding.verdict == verdict
    assert word in finding.sentence


def test_a_surface_that_misleads_fails_and_a_half_misleading_one_warns():
    fractions = [0.0, 0.5, 1.0]
    still = torch.zeros(3, 100)
    for rising, verdict in ((95, "pass"), (80, "warn"), (60, "fail")):
        slopes = torch.where(of(rising, 100), 1.0, -1.0)
        rise = torch.tensor(fractions)[:, None] * slopes
        finding = verdicts.surface(rise, still, torch.ones(100), fractions)
        assert finding.verdict == verdict
        assert finding.figures["first_step_rises_percent"] == rising
        assert finding.figures["beats_random_percent"] == rising
        assert finding.figures["monotone_percent"] == rising


def test_the_run_keeps_the_findings_and_the_terminal_shows_them(good, run, tmp_path, capsys):
    rows = len(list(Run.open(run).rows()))
    flags = ("--limit", "40", "--seed", "3", "--device", "cpu", "--partner", str(good))
    assert cli.main(["diagnose", str(run), *flags]) == 0
    out = capsys.readouterr().out
    findings = read_diagnosis(run)
    assert [finding.check for finding in findings] == list(CHECKS)
    assert findings[3].verdict != "not done"
    for finding in findings:
        assert f"\n{finding.verdict:<10}{finding.check}\n" in out
        assert " ".join(finding.sentence.split()) in " ".join(out.split())
    assert "40 test images of digits, linf eps 0.03, alpha 0.0075" in out
    assert max(map(len, out.splitlines())) <= 100 + len(str(run))
    *_, row = Run.open(run).rows()
    assert len(list(Run.open(run).rows())) == rows + 1
    assert row["kind"] == "diagnosis"
    assert row["verdicts"] == {finding.check: finding.verdict for finding in findings}
    assert (row["n"], row["seed"], row["eps"]) == (40, 3, 0.03)
    assert row["device"].startswith("cpu")
    before = (run / DIAGNOSIS).read_bytes()
    assert cli.main(["diagnose", str(run), *flags]) == 0
    assert (run / DIAGNOSIS).read_bytes() == before  # the same seed, the same figures
    json.loads(before, parse_constant=pytest.fail)


def test_a_run_can_be_the_folder_one_is_in(run, monkeypatch):
    monkeypatch.chdir(run)
    assert cli.main(["diagnose", ".", "--limit", "5", "--device", "cpu"]) == 0
    assert read_diagnosis(".") == read_diagnosis(run) != []


def test_a_lone_model_can_be_diagnosed_and_nothing_is_written(run, tmp_path, capsys, contents):
    lone = tmp_path / "lone"
    lone.mkdir()
    shutil.copy(run / MODEL, lone / "net.safetensors")
    before = contents(lone)
    flags = ("--limit", "10", "--dataset", "digits", "--device", "cpu")
    assert cli.main(["diagnose", str(lone / "net.safetensors"), *flags]) == 0
    assert "10 test images" in capsys.readouterr().out
    assert contents(lone) == before


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--partner", "absent"], "absent: no such run"),
        (["--partner", "{run}"], "named twice"),
        (["--partner", "{run}/"], "named twice"),
        (["--alpha", "0.0001"], "--alpha is 0.0001: 20 such steps do not reach eps 0.03"),
        (["--eps", "8"], "give, say, 8/255"),
        (["--eps", "0"], "--eps is 0"),
        (["--eps", "1"], "eps 1 allows every image there is"),
        (["--eps", "9", "--norm", "l2"], "give less than 8"),
        (["--limit", "0"], "--limit is 0"),
        (["--device", "tpu"], "choose from auto, cpu"),
        (["--dataset", "folder", "--data-dir", "absent"], "absent does not exist"),
    ],
)
def test_what_does_not_fit_gets_one_line_and_nothing_is_written(
    complaint, run, contents, flags, named
):
    before = contents(run)
    flags = [flag.format(run=run) for flag in flags]
    assert named in complaint("diagnose", run, *flags)
    assert contents(run) == before


def test_a_run_without_a_model_or_a_partner_of_other_images_gets_one_line(
    complaint, run, small, tmp_path
):
    from test_cli import make_tree

    make_tree(tmp_path / "images", count=8)
    other = tmp_path / "other"
    folder = ("--dataset", "folder", "--data-dir", str(tmp_path / "images"))
    few = ("--batch-size", "4", "--epochs", "1", "--eval-limit", "4")
    assert cli.main(["train", *small, *folder, *few, "--out", str(other)]) == 0
    line = complaint("diagnose", run, "--partner", other)
    assert str(other) in line and "2 classes (a, b)" in line and "digits" in line
    (run / MODEL).unlink()
    assert "no trained model in it yet" in complaint("diagnose", run)
    assert "no such run" in complaint("diagnose", tmp_path / "absent")
