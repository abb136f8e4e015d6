"""What attacks and mixing promise, for settings, images and networks drawn at random."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fastiat import kernels
from fastiat.attack import PGD, attack_loss, fgsm, pgd
from fastiat.mix import Mix, draw, mixed_correct, mixed_loss

SHAPE = (2, 4, 4)
CLASSES = 3
SEEDS = st.integers(0, 2**31 - 1)


class Network(nn.Module):
    """Small, with BatchNorm, dropout and a bend."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(SHAPE[0], 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5),
            nn.Flatten(), nn.Linear(4 * 16, CLASSES),
        )  # fmt: skip

    def forward(self, x):
        return self.layers(x)


@st.composite
def problems(draw):
    """Draw a network in any mode, images of which some lie on the clip's bounds, and settings."""
    low = draw(st.sampled_from([0.0, -1.0, -2.5]))
    high = draw(st.sampled_from([1.0, 0.5, 3.0]))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw(SEEDS))
        model = Network().train(draw(st.booleans()))
        model.layers[1].running_mean.normal_()
        model.layers[1].train(draw(st.booleans()))
    # A large scale saturates the softmax, so that gradients vanish.
    with torch.no_grad():
        model.layers[-1].weight.mul_(draw(st.sampled_from([1.0, 0.0, 1e4])))
    batch = draw(st.integers(1, 5))
    x = low + (high - low) * torch.rand(batch, *SHAPE, generator=generator)
    edge = torch.rand(x.shape, generator=generator)
    share = draw(st.sampled_from([0.0, 0.3, 1.0]))
    x = torch.where(edge < share / 2, low, torch.where(edge > 1 - share / 2, high, x))
    y = torch.randint(CLASSES, (batch,), generator=generator)
    how = {
        "eps": draw(st.sampled_from([0.0, 1e-9, 8 / 255, 0.3, 7.0]) | st.floats(0, 2)),
        "alpha": draw(st.sampled_from([0.0, 1e-9, 0.1, 100.0]) | st.floats(0, 2)),
        "steps": draw(st.integers(1, 4)),
        "random_start": draw(st.booleans()),
        "norm": draw(st.sampled_from(["linf", "l2"])),
        "loss": draw(st.sampled_from(["ce", "margin"])),
        "bn": draw(st.sampled_from(["eval", "batch", "update"])),
        "clip": (low, high),
    }
    return model, x, y, how


def _assert_inside(x_adv, x, how):
    low, high = how["clip"]
    assert x_adv.isfinite().all() and x_adv.min() >= low and x_adv.max() <= high
    delta = (x_adv.double() - x.double()).flatten(1)
    reach = delta.abs().amax(1) if how["norm"] == "linf" else delta.norm(dim=1)
    # Two roundings to float32, at the size of the pixels.
    room = 4 * torch.finfo(torch.float32).eps * max(abs(low), abs(high)) * delta.shape[1] ** 0.5
    assert reach.max() <= how["eps"] * (1 + 1e-6) + room


@settings(max_examples=120)
@given(problems(), SEEDS)
def test_examples_lie_in_the_ball_and_the_clip_range_whatever_the_settings(problem, seed):
    model, x, y, how = problem
    x_adv = pgd(model, x, y, **how, generator=torch.Generator().manual_seed(seed))
    assert x_adv.shape == x.shape and x_adv.dtype == x.dtype
    _assert_inside(x_adv, x, how)
    if how["eps"] == 0:
        assert torch.equal(x_adv, x)


@settings(max_examples=60)
@given(problems(), st.integers(2, 3))
def test_an_attack_changes_nothing_but_its_result(problem, restarts):
    model, x, y, how = problem
    restarts = restarts if how["random_start"] else 1
    inputs = x.clone(), y.clone()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    pgd(model, x, y, **how, restarts=restarts, generator=torch.Generator().manual_seed(0))
    assert torch.equal(x, inputs[0]) and torch.equal(y, inputs[1]) and not x.requires_grad
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, weights[n])}
    moving = {f"layers.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert changed <= (moving if how["bn"] == "update" and how["eps"] else set())


@settings(max_examples=40)
@given(problems(), SEEDS, st.integers(1, 4))
def test_another_restart_never_weakens_the_attack(problem, seed, restarts):
    model, x, y, how = problem
    # The batch's statistics would depend on the other images' starts.
    how |= {"random_start": True, "bn": "eval", "steps": min(how["steps"], 2)}
    model.eval()
    outcomes = []
    for count in (restarts, restarts + 1):
        generator = torch.Generator().manual_seed(seed)
        x_adv = pgd(model, x, y, **how, restarts=count, generator=generator)
        _assert_inside(x_adv, x, how)
        with torch.no_grad():
            logits = model(x_adv)
        outcomes.append((logits.argmax(1) != y, attack_loss(logits, y, how["loss"])))
    (fooled, height), (more, higher) = outcomes
    assert (more >= fooled).all()
    assert (higher >= height)[more == fooled].all()


@settings(max_examples=30)
@given(problems(), SEEDS)
def test_the_same_seed_gives_the_same_examples_and_the_object_those_of_the_function(problem, seed):
    model, x, y, how = problem
    same = [
        attack(x, y)
        for attack in (
            lambda x, y: pgd(
                copy.deepcopy(model), x, y, **how, generator=torch.Generator().manual_seed(seed)
            ),
            PGD(
                copy.deepcopy(model), engine="eager", **how,
                generator=torch.Generator().manual_seed(seed),
            ),
        )
    ]  # fmt: skip
    assert torch.equal(*same)


@settings(max_examples=40)
@given(problems())
def test_fgsm_is_one_full_step_from_the_image(problem):
    model, x, y, how = problem
    shared = {name: how[name] for name in ("eps", "clip", "norm", "loss", "bn")}
    one = fgsm(copy.deepcopy(model), x, y, **shared)
    start = {"alpha": how["eps"], "steps": 1, "random_start": False}
    assert torch.equal(one, pgd(copy.deepcopy(model), x, y, **shared | start))
    _assert_inside(one, x, how)


@settings(max_examples=30)
@given(problems(), SEEDS)
def test_images_are_attacked_independently_of_their_batch_in_eval_mode(problem, seed):
    model, x, y, how = problem
    how |= {"bn": "eval", "random_start": False}
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    whole = pgd(model.double(), x.double(), y, **how)
    shuffled = pgd(model, x.double()[order], y[order], **how)
    torch.testing.assert_close(shuffled, whole[order], rtol=0, atol=1e-9)


@st.composite
def mixtures(draw):
    """Draw hidden units, a permutation of them, and a lambda or one for each."""
    batch = draw(st.integers(1, 8))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    h = torch.randn(batch, *draw(st.sampled_from([(3,), (2, 4, 4)])), generator=generator).double()
    perm = torch.randperm(batch, generator=generator)
    lam = torch.tensor(
        draw(st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 1)), dtype=torch.float32
    )
    if draw(st.booleans()):
        lam = torch.rand(batch, generator=generator)
    return h, perm, lam


@settings(max_examples=60)
@given(mixtures())
def test_mixing_with_one_is_the_identity_and_with_zero_the_partner(mixture):
    h, perm, _ = mixture
    assert torch.equal(kernels.mix(h, perm, 1.0), h)
    assert torch.equal(kernels.mix(h, perm, 0.0), h[perm])
    assert torch.equal(kernels.mix(h, torch.arange(len(h)), 1.0), h)


@settings(max_examples=60)
@given(mixtures())
def test_mixing_lies_between_both_and_leaves_them_alone(mixture):
    h, perm, lam = mixture
    before = h.clone(), perm.clone(), lam.clone()
    mixed = kernels.mix(h, perm, lam)
    low, high = torch.minimum(h, h[perm]), torch.maximum(h, h[perm])
    assert (mixed >= low - 1e-6).all() and (mixed <= high + 1e-6).all()
    assert all(torch.equal(one, other) for one, other in zip((h, perm, lam), before, strict=True))


@settings(max_examples=60)
@given(mixtures(), SEEDS)
def test_shuffling_a_batch_before_mixing_or_after_is_the_same(mixture, seed):
    h, perm, lam = mixture
    order = torch.randperm(len(h), generator=torch.Generator().manual_seed(seed))
    back = order.argsort()
    # Image order[i] comes to place i; its partner perm[order[i]] to place back[perm[order[i]]].
    lam_there = lam[order] if lam.dim() else lam
    shuffled = kernels.mix(h[order], back[perm[order]], lam_there)
    torch.testing.assert_close(shuffled[back], kernels.mix(h, perm, lam), rtol=0, atol=1e-7)


@settings(max_examples=60)
@given(mixtures())
def test_a_mixture_seen_from_the_partner_has_the_other_weight(mixture):
    h, perm, lam = mixture
    # lam h + (1 - lam) h[perm], gathered by the inverse: (1 - lam) h + lam h[inverse].
    inverse = perm.argsort()
    lam_there = lam[inverse] if lam.dim() else lam
    mixed = kernels.mix(h, perm, lam)[inverse]
    other = kernels.mix(h, inverse, 1 - lam_there)
    torch.testing.assert_close(mixed, other, rtol=0, atol=1e-6)


@settings(max_examples=80)
@given(mixtures(), SEEDS, st.sampled_from(["ce", "bce"]))
def test_the_mixed_loss_is_linear_in_lambda_between_both_labels_losses(mixture, seed, loss):
    _, perm, lam = mixture
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(len(perm), CLASSES, generator=generator)
    y = torch.randint(CLASSES, perm.shape, generator=generator)
    own = float(mixed_loss(logits, y, Mix(0, perm, torch.tensor(1.0)), loss))
    partner = float(mixed_loss(logits, y, Mix(0, perm, torch.tensor(0.0)), loss))
    assert own == pytest.approx(float(mixed_loss(logits, y, None, loss)), rel=1e-5, abs=1e-6)
    assert partner == pytest.approx(
        float(mixed_loss(logits, y[perm], None, loss)), rel=1e-5, abs=1e-6
    )
    if not lam.dim():
        mixed = float(mixed_loss(logits, y, Mix(0, perm, lam), loss))
        expected = float(lam) * own + (1 - float(lam)) * partner
        assert mixed == pytest.approx(expected, rel=1e-5, abs=1e-6)
    correct = float(mixed_correct(logits, y, Mix(0, perm, lam)))
    assert -1e-5 <= correct <= len(y) + 1e-5


@settings(max_examples=60)
@given(
    st.sampled_from(["mixup", "manifold"]),
    st.integers(1, 20),
    st.sampled_from([None, 1e-3, 1.0, 50.0]),
    SEEDS,
    st.booleans(),
)
def test_a_draw_is_a_permutation_and_weights_from_zero_to_one(kind, batch, alpha, seed, each):
    mix = draw(kind, batch, alpha, torch.Generator().manual_seed(seed), per_sample=each)
    assert sorted(mix.perm.tolist()) == list(range(batch))
    assert mix.lam.shape == ((batch,) if each else ()) and mix.lam.dtype == torch.float32
    assert mix.lam.min() >= 0 and mix.lam.max() <= 1
    assert mix.layer in ((0,) if kind == "mixup" else (0, 1, 2))


@settings(max_examples=40)
@given(mixtures(), SEEDS)
def test_the_gradient_of_a_mixture_goes_to_both(mixture, seed):
    h, perm, lam = mixture
    h.requires_grad_()
    weights = torch.randn(h.shape, generator=torch.Generator().manual_seed(seed)).double()
    (grad,) = torch.autograd.grad((weights * kernels.mix(h, perm, lam)).sum(), h)
    shape = (-1, *[1] * (h.dim() - 1))
    lam = (lam if lam.dim() else lam.expand(len(h))).double().view(shape)
    expected = (lam * weights).index_add(0, perm, (1 - lam) * weights)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-6)


def test_the_network_of_these_tests_bends_and_learns():
    """A property of a constant network would say nothing."""
    torch.manual_seed(0)
    model, x = Network().eval(), torch.rand(8, *SHAPE)
    y = model(x).argmax(1)
    assert F.cross_entropy(model(pgd(model, x, y, eps=0.5, alpha=0.2)), y) > F.cross_entropy(
        model(x), y
    )
