"""TRADES, MART, AWP, N-FGSM, CutMix and attacks on mixed batches, against their papers' formulas.

The references are written out in float64, one sample at a time where that is clearer.
"""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastiat import attack, data
from fastiat.attack import PGD, pgd
from fastiat.attacks import starts
from fastiat.config import TrainConfig
from fastiat.mix import Mix, MixPoints, draw, draw_boxes, mixed_loss, paste, soft_labels
from fastiat.runs.directory import Run
from fastiat.system.errors import InputError
from fastiat.train import Trainer, algorithm1, joint_update, mixed_attack_update, train
from fastiat.training.awp import WeightPerturbation
from fastiat.training.rows import overfitted
from fastiat.training.update import mart_loss, trades_terms

CLASSES, BETA, GAMMA = 3, 4.0, 0.3
Y = torch.tensor([0, 1, 2, 2, 0])
MIX = Mix(0, torch.tensor([2, 0, 1, 4, 3]), torch.tensor(0.3, dtype=torch.float64))


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(12, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, CLASSES)]
    return nn.Sequential(*layers).double()


def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(len(Y), 3, 2, 2, dtype=torch.float64, generator=generator)


def moved(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Adversarial examples that do not depend on the network, so that differences are exact."""
    return (x + 0.05 * torch.sin(40 * x)).clamp(0, 1)


def blended(x: torch.Tensor, mix: Mix | None) -> torch.Tensor:
    return x if mix is None else mix.lam * x + (1 - mix.lam) * x[mix.perm]


def reference_loss(
    model: nn.Module, method: str, x: torch.Tensor, x_adv: torch.Tensor, mix: Mix | None
) -> torch.Tensor:
    """The loss of a method by its paper's formula, sample by sample."""
    clean, adv = (F.softmax(model(blended(batch, mix)), 1) for batch in (x, x_adv))

    def of_sample(i: int, label: int) -> torch.Tensor:
        p, q = clean[i], adv[i]
        # The constants of MART's published code, which bound its logarithms.
        tiny = 1e-12 if method == "mart" else 0.0
        divergence = sum(p[k] * (p[k] / (q[k] + tiny)).log() for k in range(CLASSES))
        if method == "trades":
            return -p[label].log() + BETA * divergence
        if method == "mart":
            wrong = max(q[k] for k in range(CLASSES) if k != label)
            boosted = -q[label].log() - (1.0001 - wrong + tiny).log()
            return boosted + BETA * divergence * (1.0000001 - p[label])
        return -q[label].log()  # "adv": the adversarial half of Algorithm 1

    total = torch.zeros((), dtype=torch.float64)
    for i, label in enumerate(Y.tolist()):
        if mix is None:
            total = total + of_sample(i, label)
        else:
            other = int(Y[mix.perm[i]])
            total = total + mix.lam * of_sample(i, label) + (1 - mix.lam) * of_sample(i, other)
    return total / len(Y)


def perturbed(model: nn.Module, method: str, mix: Mix | None) -> nn.Module:
    """A copy of `model` after the ascent step of Wu et al. 2020, eq. 10."""
    proxy, result = copy.deepcopy(model), copy.deepcopy(model)
    reference_loss(proxy, method, images(), moved(images(), Y), mix).backward()
    with torch.no_grad():
        for p, q in zip(result.parameters(), proxy.parameters(), strict=True):
            if p.dim() > 1:
                p += GAMMA * p.norm() * q.grad / q.grad.norm()
    return result


def run_update(model: nn.Module, method: str, mix: Mix | None, awp: Any = None) -> Any:
    """Compute the gradients of `method` with fastiat; "adv" is Algorithm 1 without clean part."""
    points = MixPoints(model, ["input"])
    common: dict[str, Any] = {"draw": lambda: mix, "points": points, "awp": awp}
    try:
        if method == "adv":
            return algorithm1(model, images(), Y, moved, clean_weight=0.0, **common)
        return joint_update(model, images(), Y, moved, objective=method, beta=BETA, **common)
    finally:
        points.remove()


@pytest.mark.parametrize("mix", [None, MIX], ids=["plain", "mixed"])
@pytest.mark.parametrize("method", ["trades", "mart", "adv"])
@pytest.mark.parametrize("perturbs", [False, True], ids=["", "awp"])
def test_update_has_the_loss_and_gradient_of_the_papers_formula(method, mix, perturbs):
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    expected_network = perturbed(model, method, mix) if perturbs else copy.deepcopy(model)
    if method == "adv":  # the clean pass comes first and moves the running statistics
        expected_network(blended(images(), mix))
    expected = reference_loss(expected_network, method, images(), moved(images(), Y), mix)
    expected.backward()
    update = run_update(model, method, mix, WeightPerturbation(GAMMA) if perturbs else None)
    tolerance = 1e-9
    found = {"mart": update.adv_loss, "adv": update.adv_loss}.get(
        method, update.clean_loss + update.adv_loss
    )
    torch.testing.assert_close(found, expected.detach(), rtol=tolerance, atol=0)
    for p, q, old in zip(model.parameters(), expected_network.parameters(), before, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=tolerance, atol=tolerance / 10)
        assert torch.equal(p, old), "the weights are not restored"
    if not perturbs:
        for b, c in zip(model.buffers(), expected_network.buffers(), strict=True):
            if method != "adv":
                torch.testing.assert_close(b, c)


@pytest.mark.parametrize("method", ["trades", "mart", "adv"])
@pytest.mark.parametrize("perturbs", [False, True], ids=["", "awp"])
def test_gradient_is_that_of_finite_differences(method, perturbs):
    model = network()
    at = perturbed(model, method, MIX) if perturbs else copy.deepcopy(model)
    run_update(model, method, MIX, WeightPerturbation(GAMMA) if perturbs else None)

    def loss() -> float:
        probe = copy.deepcopy(at)
        update = run_update(probe, method, MIX)
        return float(update.adv_loss if method != "trades" else update.clean_loss + update.adv_loss)

    h = 1e-6
    for p, q in zip(model.parameters(), at.parameters(), strict=True):
        for place in range(0, p.numel(), 5):
            flat = q.data.view(-1)
            kept = float(flat[place])
            values = []
            for step in (h, -h):
                flat[place] = kept + step
                values.append(loss())
            flat[place] = kept
            slope = (values[0] - values[1]) / (2 * h)
            assert float(p.grad.view(-1)[place]) == pytest.approx(slope, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("loss", [trades_terms, mart_loss])
def test_gradients_are_finite_where_a_probability_is_zero_in_fp32(loss):
    clean = torch.tensor([[200.0, 0.0, 1.0]]).requires_grad_()
    adv = torch.tensor([[0.0, 300.0, 1.0]]).requires_grad_()
    found = loss(clean, adv, torch.tensor([0]), None, BETA)
    total = sum(found) if isinstance(found, tuple) else found
    for grad in torch.autograd.grad(total, (clean, adv)):
        assert grad.isfinite().all()


def test_awp_leaves_running_statistics_to_the_pass_at_the_perturbed_weights():
    model = network()
    shifted = perturbed(model, "trades", None)
    run_update(model, "trades", None, WeightPerturbation(GAMMA))
    shifted(images())
    shifted(moved(images(), Y))
    for found, expected in zip(model.buffers(), shifted.buffers(), strict=True):
        torch.testing.assert_close(found, expected)


def test_the_attack_of_trades_follows_the_divergence_from_normal_noise():
    model, x, std, steps, alpha, eps = network().eval(), images(), 0.001, 4, 0.01, 0.03
    settings = {"eps": eps, "alpha": alpha, "steps": steps, "loss": "kl"}
    settings |= {"start_noise": "normal", "start_size": std}
    generator = torch.Generator().manual_seed(5)
    found = pgd(model, x, Y, generator=generator, **settings)
    seed = torch.empty((), dtype=torch.int64).random_(generator=torch.Generator().manual_seed(5))
    x_adv = x + std * starts.start_from_seed(x * 0, 1.0, "linf", (-9, 9), seed, noise="normal")
    x_adv = x_adv.clamp(0, 1)
    p = model(x).softmax(1).detach()
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        divergence = (p * (p.log() - model(x_adv).log_softmax(1))).sum()
        (grad,) = torch.autograd.grad(divergence, x_adv)
        x_adv = (x_adv.detach() + alpha * grad.sign()).clamp(x - eps, x + eps).clamp(0, 1)
    torch.testing.assert_close(found, x_adv, rtol=0, atol=1e-12)


def test_normal_starts_have_the_moments_of_the_normal_distribution():
    x = torch.full((8, 3, 64, 64), 0.5)
    seed = torch.tensor(3)
    noise = starts.start_from_seed(x, 0.01, "linf", (0.0, 1.0), seed, noise="normal") - x
    count = noise.numel()
    assert abs(float(noise.mean())) < 5 * 0.01 / count**0.5
    assert float(noise.std()) == pytest.approx(0.01, rel=5 / (2 * count) ** 0.5)
    assert float((noise / 0.01).pow(4).mean()) == pytest.approx(3, abs=5 * (96 / count) ** 0.5)


def test_soft_labels_attack_as_their_expected_cross_entropy():
    model, x = network().eval(), images()
    target = torch.rand(len(Y), CLASSES, dtype=torch.float64).softmax(1)
    logits = model(x)
    expected = -(target * logits.log_softmax(1)).sum(1)
    torch.testing.assert_close(attack.attack_loss(logits, target, "ce"), expected)
    divergence = (target * (target.log() - logits.log_softmax(1))).sum(1)
    torch.testing.assert_close(attack.attack_loss(logits, target, "kl"), divergence)
    settings = {"eps": 0.05, "steps": 3, "random_start": False}
    hard = pgd(model, x, Y, **settings)
    torch.testing.assert_close(pgd(model, x, F.one_hot(Y, CLASSES).double(), **settings), hard)
    with pytest.raises(InputError, match=r"margin.*labels"):
        pgd(model, x, target, loss="margin")
    with pytest.raises(InputError, match="2 restarts"):
        pgd(model, x, target, restarts=2)
    with pytest.raises(InputError, match="random_start"):
        pgd(model, x, Y, loss="kl", random_start=False)
    with pytest.raises(InputError, match="give a probability for each"):
        pgd(model, x, target[:, :2])


def test_a_prepared_attack_takes_the_divergence_and_soft_labels_as_the_plain_one():
    model, x = network().float(), images().float()
    settings = {"eps": 0.05, "steps": 3, "loss": "kl", "start_noise": "normal", "start_size": 0.01}
    plain, prepared = (
        PGD(model, engine=engine, generator=torch.Generator().manual_seed(2), **settings)
        for engine in ("eager", "compile")
    )
    torch.testing.assert_close(prepared(x, Y), plain(x, Y))
    target = torch.rand(len(Y), CLASSES).softmax(1)
    plain, prepared = (
        PGD(model, engine=engine, random_start=False) for engine in ("eager", "compile")
    )
    torch.testing.assert_close(prepared(x, target), plain(x, target))


def test_the_mixed_batch_is_attacked_with_its_mixed_labels():
    model, x = network(), images()
    reference = copy.deepcopy(model)
    settings = {"eps": 0.05, "alpha": 0.02, "steps": 3, "random_start": False}
    update = mixed_attack_update(
        model, x, Y, lambda x, y: pgd(model, x, y, **settings), lambda: MIX, classes=CLASSES
    )
    mixed, one_hot = blended(x, MIX), torch.eye(CLASSES, dtype=torch.float64)[Y]
    target = blended(one_hot, MIX)
    reference.eval()
    x_adv = mixed
    for _ in range(3):
        x_adv = x_adv.detach().requires_grad_()
        loss = -(target * reference(x_adv).log_softmax(1)).sum()
        (grad,) = torch.autograd.grad(loss, x_adv)
        x_adv = (x_adv.detach() + 0.02 * grad.sign()).clamp(mixed - 0.05, mixed + 0.05).clamp(0, 1)
    reference.train()
    expected = -(target * reference(x_adv).log_softmax(1)).sum() / len(Y)
    expected.backward()
    torch.testing.assert_close(update.adv_loss, expected.detach())
    assert float(update.clean_loss) == float(update.clean_correct) == 0
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("per_sample", [False, True])
def test_cutmix_pastes_boxes_whose_area_is_lambda(per_sample):
    generator, x = torch.Generator().manual_seed(0), torch.rand(6, 2, 8, 12)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    for _ in range(20):
        mix = draw("cutmix", 6, generator=generator, size=(8, 12), per_sample=per_sample)
        found, labels = mix.blend(x), soft_labels(y, mix, CLASSES)
        for i in range(6):
            top, left, bottom, right = (mix.box[i] if per_sample else mix.box).tolist()
            lam = float(mix.lam[i] if per_sample else mix.lam)
            expected, other = x[i].clone(), int(mix.perm[i])
            expected[:, top:bottom, left:right] = x[other][:, top:bottom, left:right]
            assert torch.equal(found[i], expected)
            assert lam == pytest.approx(1 - (bottom - top) * (right - left) / 96, abs=1e-6)
            assert float(labels[i, y[i]]) >= lam - 1e-6
    torch.testing.assert_close(labels.sum(1), torch.ones(6))


def test_boxes_have_the_sides_and_centres_of_the_published_code():
    random = np.random.default_rng(0)
    boxes, lam = draw_boxes(np.full(20000, 0.75), (32, 32), random)
    heights = boxes[:, 2] - boxes[:, 0]
    assert boxes.min() == 0 and boxes.max() == 32 and heights.max() == 16
    # The centre is uniform in 0..31 and the box of side 16 reaches 8 pixels to each side.
    expected = np.mean([min(c + 8, 32) - max(c - 8, 0) for c in range(32)])
    assert heights.mean() == pytest.approx(expected, abs=0.1)
    assert lam.mean() == pytest.approx(1 - (expected / 32) ** 2, abs=0.01)


def test_paste_keeps_images_outside_of_an_empty_box_and_takes_all_of_a_full_one():
    x, perm = torch.rand(3, 1, 4, 4), torch.tensor([1, 2, 0])
    assert torch.equal(paste(x, perm, torch.tensor([2, 2, 2, 2])), x)
    assert torch.equal(paste(x, perm, torch.tensor([0, 0, 4, 4])), x[perm])


TINY = TrainConfig(
    dataset="digits", arch="mlp6", width=8, batch_size=64, device="cpu", precision="fp32",
    epochs=4, eval_limit=40, steps=1, mix="none",
)  # fmt: skip


def test_n_fgsm_steps_from_noise_and_is_not_projected():
    trainer = Trainer(replace(TINY, adv="n-fgsm", eps=0.1, noise=2.0), data.load("digits"))
    model = trainer.model
    x, y = torch.rand(5, *trainer.batch_shape[1:]), torch.arange(5)
    state = trainer.random["attack"].get_state()
    found = trainer.attack(x, y)
    generator = torch.Generator()
    generator.set_state(state)
    start = attack.start_in_ball(x, 0.2, "linf", (0.0, 1.0), generator).requires_grad_()
    model.eval()
    (grad,) = torch.autograd.grad(F.cross_entropy(model(start), y, reduction="sum"), start)
    torch.testing.assert_close(found, (start + 0.1 * grad.sign()).clamp(0, 1).detach())
    assert float((found - x).abs().max()) > 0.2, "some pixels leave the ball"


def test_catastrophic_overfitting_is_said_and_the_last_good_epoch_is_kept(
    monkeypatch, tmp_path, capsys
):
    # Errors, of 134 held-out images, of PGD-10 and FGSM after each of the four epochs.
    errors = iter([(50, 45), (60, 50), (130, 20), (131, 10)])
    pair: list[int] = []

    def counted(self: Trainer, batches: Any, given: Any) -> int:
        if batches is not self.holdout:
            return 0
        if not pair:
            pair.extend(next(errors))
        return pair.pop(0)

    monkeypatch.setattr(Trainer, "_errors", counted)
    weights = []
    save = Run.save_model
    monkeypatch.setattr(
        Run, "save_model", lambda self, state, card: (weights.append(1), save(self, state, card))
    )
    path = train(replace(TINY, adv="n-fgsm", out=str(tmp_path / "run")))
    lines = capsys.readouterr().out
    assert lines.count("catastrophic overfitting") == 2 and "epoch 2 kept" in lines
    assert len(weights) == 2
    rows = [row for row in Run.open(path).rows() if row["kind"] == "epoch"]
    assert [overfitted(row) for row in rows] == [False, False, True, True]
    assert rows[2]["holdout_fgsm_error_percent"] < rows[2]["holdout_error_percent"]


WRONG = [
    ({"objective": "trades", "adv": "none"}, "--objective trades", "--adv none"),
    ({"objective": "trades", "adv": "fgsm"}, "--objective trades", "--adv fgsm"),
    ({"objective": "trades", "random_start": False}, "--objective trades", "--no-random-start"),
    ({"objective": "trades", "attack_loss": "margin"}, "--objective trades", "--attack-loss"),
    ({"objective": "trades", "clean_weight": 0.2}, "--objective trades", "--clean-weight"),
    ({"objective": "mart", "loss": "bce"}, "--objective mart", "--loss bce"),
    ({"objective": "mart", "smoothing": 0.1}, "--objective mart", "--smoothing"),
    ({"objective": "mart", "shared_mix": True}, "--objective mart", "--shared-mix"),
    ({"beta": 2.0}, "--beta", "--objective at"),
    ({"awp": 0.01, "adv": "none"}, "--awp", "--adv none"),
    ({"awp_warmup": 2}, "--awp-warmup", "--awp 0"),
    ({"awp": 0.01, "awp_warmup": 200}, "--awp-warmup 200", "--epochs 200"),
    ({"preset": "strong", "epochs": 10, "awp_warmup": 10}, "--awp-warmup 10", "--epochs 10"),
    ({"noise": 1.0}, "--noise", "--adv pgd"),
    ({"adv": "n-fgsm", "random_start": False}, "--adv n-fgsm", "--no-random-start"),
    ({"attack_mixed": True, "mix": "none"}, "--attack-mixed", "--mix none"),
    ({"attack_mixed": True, "mix": "manifold"}, "--attack-mixed", "--mix manifold"),
    ({"attack_mixed": True, "mix": "mixup", "adv": "none"}, "--attack-mixed", "--adv none"),
    ({"attack_mixed": True, "mix": "mixup", "objective": "mart"}, "--attack-mixed", "--objective"),
    ({"attack_mixed": True, "mix": "cutmix", "clean_weight": 0.1}, "--attack-mixed", "--clean-w"),
    ({"mix": "cutmix", "mix_at": ("layer1",)}, "--mix cutmix", "--mix-at"),
    ({"mix": "none", "mix_at": ("input",)}, "--mix-at", "--mix none"),
    ({"mix": "none", "mix_alpha": 1.0}, "--mix-alpha", "--mix none"),
    ({"mix": "none", "mix_space": "pixel"}, "--mix-space", "--mix none"),
    ({"mix": "none", "lam_per_sample": True}, "--lam-per-sample", "--mix none"),
    ({"mix": "none", "shared_mix": True}, "--shared-mix", "--mix none"),
    ({"preset": "strong", "mix_at": ("1",)}, "--mix-at", "--mix none"),
]


@pytest.mark.parametrize(("settings", "first", "second"), WRONG)
def test_settings_that_cannot_go_together_are_refused_in_one_line_with_both(
    settings, first, second
):
    with pytest.raises(InputError) as refused:
        TrainConfig(**settings).check()
    text = str(refused.value)
    assert first in text and second in text and "\n" not in text


@pytest.mark.parametrize(
    ("given", "warmup"),
    [
        ({}, 10),
        ({"epochs": 200}, 10),
        ({"epochs": 99}, 9),
        ({"epochs": 25}, 2),
        ({"epochs": 9}, 0),
        ({"epochs": 25, "awp_warmup": 7}, 7),
        ({"awp": 0}, 0),
    ],
)
def test_a_presets_warm_up_of_awp_is_at_most_a_tenth_of_the_epochs(given, warmup):
    config = TrainConfig(preset="strong", **given)
    config.check()
    assert config.awp_warmup == warmup
    # Every field is given: nothing is filled in again.
    assert replace(config, epochs=1).awp_warmup == warmup


@pytest.mark.parametrize("given", [{"epochs": "x"}, {"epochs": -5}, {"awp": "x"}])
def test_wrong_epochs_are_refused_by_their_own_name(given):
    with pytest.raises(InputError, match=f"--{next(iter(given))} is"):
        TrainConfig(preset="strong", **given).check()


def test_mixed_loss_takes_the_area_of_a_box_as_lambda():
    logits = torch.randn(len(Y), CLASSES, dtype=torch.float64)
    mix = Mix(0, MIX.perm, torch.tensor(0.25), torch.tensor([0, 0, 3, 4]))
    own = F.cross_entropy(logits, Y, reduction="none")
    other = F.cross_entropy(logits, Y[mix.perm], reduction="none")
    expected = (0.25 * own + 0.75 * other).mean()
    torch.testing.assert_close(mixed_loss(logits, Y, mix), expected)
