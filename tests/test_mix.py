"""Mixing: distributions against their closed forms, the loss against float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastiat import kernels, models
from fastiat.mix import (
    DEFAULT_ALPHA,
    Mix,
    MixPoints,
    chance_loss,
    draw,
    mixed_correct,
    mixed_loss,
    point_names,
)
from fastiat.models import correct
from fastiat.system.errors import InputError


def _draws(kind, count, **settings):
    generator = torch.Generator().manual_seed(0)
    return [draw(kind, 4, generator=generator, **settings) for _ in range(count)]


@pytest.mark.parametrize(
    ("kind", "alpha", "expected"),
    [("mixup", None, 1.0), ("manifold", None, 2.0), ("mixup", 0.4, 0.4), ("manifold", 8.0, 8.0)],
)
def test_lambda_follows_its_beta_distribution(kind, alpha, expected):
    values = [float(mix.lam) for mix in _draws(kind, 2000, alpha=alpha)]
    assert stats.kstest(values, stats.beta(expected, expected).cdf).pvalue > 1e-3


def test_lambda_per_sample_follows_the_distribution_too():
    mix = draw("manifold", 4000, generator=torch.Generator().manual_seed(1), per_sample=True)
    assert mix.lam.shape == (4000,)
    assert stats.kstest(mix.lam.numpy(), stats.beta(2, 2).cdf).pvalue > 1e-3


@pytest.mark.parametrize(
    ("kind", "layers", "expected"),
    [("mixup", None, {0}), ("manifold", None, {0, 1, 2}), ("manifold", (1, 2), {1, 2})],
)
def test_layers_are_drawn_uniformly(kind, layers, expected):
    drawn = [mix.layer for mix in _draws(kind, 900, layers=layers)]
    counts = np.bincount(drawn, minlength=3)
    assert set(drawn) == expected
    assert stats.chisquare(counts[sorted(expected)]).pvalue > 1e-3 if len(expected) > 1 else True


def test_pairing_is_a_permutation_and_repeats_from_the_same_seed():
    first = draw("manifold", 50, generator=torch.Generator().manual_seed(7))
    second = draw("manifold", 50, generator=torch.Generator().manual_seed(7))
    assert sorted(first.perm.tolist()) == list(range(50))
    assert first.layer == second.layer
    assert torch.equal(first.perm, second.perm) and torch.equal(first.lam, second.lam)


def test_a_generator_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    draw("manifold", 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())


def test_none_draws_nothing():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert draw("none", 8, generator=generator) is None
    assert torch.equal(before, generator.get_state())


@given(st.integers(1, 9), st.floats(0, 1), st.integers(0, 2**31))
def test_mixing_keeps_the_batch_sum_and_is_a_permutation_matrix(batch, lam, seed):
    x = torch.randn(batch, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    perm = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    mixed = kernels.mix(x, perm, lam)
    torch.testing.assert_close(mixed.sum(0), x.sum(0))
    matrix = lam * torch.eye(batch, dtype=torch.float64)
    matrix += (1 - lam) * torch.eye(batch, dtype=torch.float64)[perm]
    torch.testing.assert_close(mixed, matrix @ x)


@pytest.mark.parametrize("lam", [torch.tensor(0.0), torch.tensor(1.0), torch.tensor([0.2, 0.9, 0])])
@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_mixed_loss_is_the_formula_in_float64(lam, loss):
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    y, perm = torch.tensor([4, 0, 2]), torch.tensor([1, 2, 0])
    z = logits.double().numpy()
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    weights = np.broadcast_to(lam.numpy(), 3)

    def of(labels):
        if loss == "ce":
            return -np.log(p[np.arange(3), labels])
        one_hot = np.eye(5)[labels]
        return -(one_hot * np.log(p) + (1 - one_hot) * np.log(1 - p)).mean(1)

    expected = (weights * of(y.numpy()) + (1 - weights) * of(y[perm].numpy())).mean()
    assert float(mixed_loss(logits, y, Mix(0, perm, lam), loss)) == pytest.approx(
        expected, rel=1e-5
    )
    plain = of(y.numpy()).mean()
    assert float(mixed_loss(logits, y, None, loss)) == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("lam", [None, torch.tensor(0.3), torch.tensor([0.2, 0.9, 0])])
@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_smoothed_loss_is_that_of_smoothed_and_mixed_labels_in_float64(loss, lam, smoothing):
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    y, perm = torch.tensor([4, 0, 2]), torch.tensor([1, 2, 0])
    exact = logits.double().requires_grad_()
    target = torch.eye(5, dtype=torch.float64)[y]
    if lam is not None:
        weight = lam.double().expand(3)[:, None]
        target = weight * target + (1 - weight) * target[perm]
    target = (1 - smoothing) * target + smoothing / 5
    if loss == "ce":
        expected = torch.nn.functional.cross_entropy(exact, target)
    else:
        p = exact.softmax(1)
        expected = -(target * p.log() + (1 - target) * (1 - p).log()).mean()
    mix = None if lam is None else Mix(0, perm, lam)
    found = mixed_loss(logits.requires_grad_(), y, mix, loss, smoothing)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    found.backward()
    expected.backward()
    torch.testing.assert_close(logits.grad, exact.grad.float(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_loss_of_half_precision_logits_is_that_of_float64(loss, mixed, dtype):
    torch.manual_seed(0)
    logits, y = (2 * torch.randn(64, 10)).to(dtype), torch.randint(10, (64,))
    mix = Mix(0, torch.randperm(64), torch.tensor(0.7)) if mixed else None
    exact = logits.double().requires_grad_()
    target = torch.eye(10, dtype=torch.float64)[y]
    if mix is not None:
        target = 0.7 * target + 0.3 * target[mix.perm]
    p = exact.softmax(1)
    of_class = target * p.log()
    if loss == "bce":
        expected = -(of_class + (1 - target) * (1 - p).log()).mean()
    else:
        expected = -of_class.sum(1).mean()
    actual = mixed_loss(logits.requires_grad_(), y, mix, loss)
    assert actual.dtype == torch.float32
    assert float(actual) == pytest.approx(float(expected), rel=1e-5)
    actual.backward()
    expected.backward()
    torch.testing.assert_close(logits.grad, exact.grad.to(dtype), rtol=1e-2, atol=1e-6)


def test_correct_predictions_count_with_the_weight_of_the_label_they_hit():
    logits = torch.eye(3)
    y, perm = torch.tensor([0, 2, 2]), torch.tensor([1, 2, 0])
    # Predicted 0, 1, 2: the first hits its own label, the last too; nobody hits a partner's.
    mix = Mix(0, perm, torch.tensor(0.25))
    assert float(mixed_correct(logits, y, mix)) == pytest.approx(0.5)
    assert float(mixed_correct(logits, y, None)) == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("cutmix", 4), "cutmix"),
        (("mixup", 0), "batch"),
        (("mixup", 4, -1.0), "alpha"),
        (("mixup", 4, float("nan")), "alpha"),
    ],
)
def test_draw_refuses_by_name(arguments, named):
    with pytest.raises(InputError, match=named):
        draw(*arguments)


@pytest.mark.parametrize("layers", [(), (-1,), (0, -1)])
def test_draw_refuses_layers_that_are_no_mix_points(layers):
    with pytest.raises(InputError, match="mix layers"):
        draw("manifold", 4, layers=layers)


def test_defaults_are_the_papers():
    assert DEFAULT_ALPHA == {"mixup": 1.0, "manifold": 2.0, "cutmix": 1.0}


@pytest.mark.parametrize("loss", ["ce", "bce"])
@pytest.mark.parametrize("classes", [2, 10, 100])
def test_chance_loss_is_that_of_equal_logits(classes, loss):
    y = torch.arange(classes)
    logits = torch.zeros(classes, classes, dtype=torch.float64)
    expected = float(mixed_loss(logits, y, None, loss))
    assert chance_loss(classes, loss) == pytest.approx(expected, rel=1e-12)


OUTSIDE = [3, -1, -100, 2**62, -(2**63)]


@pytest.mark.parametrize("label", OUTSIDE)
@pytest.mark.parametrize("loss", ["ce", "bce"])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_label_that_names_no_class_is_refused(label, loss, mixed):
    logits, y = torch.randn(2, 3, requires_grad=True), torch.tensor([1, label])
    mix = Mix(0, torch.tensor([1, 0]), torch.tensor(0.7)) if mixed else None
    with pytest.raises(InputError, match=r"0 to 2") as error:
        mixed_loss(logits, y, mix, loss)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="y_b holds a class outside"):
        kernels.mixed_cross_entropy(logits, y.clamp(0, 2), y, 0.7)


def test_checking_labels_leaves_tracing_and_transforms_alone():
    logits, y = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    mix = Mix(0, torch.tensor([1, 0, 3, 2]), torch.tensor(0.7))
    losses = [lambda z, y, m=m, n=n: mixed_loss(z, y, m, n) for m in (None, mix) for n in NAMES]
    for loss in losses:
        expected = loss(logits, y)
        compiled = torch.compile(loss, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(logits, y), expected)
        each = torch.func.vmap(loss)(torch.stack([logits] * 2), torch.stack([y, y.flip(0)]))
        torch.testing.assert_close(each, torch.stack([expected, loss(logits, y.flip(0))]))


NAMES = ("ce", "bce")


@pytest.mark.parametrize("mixed", [False, True])
def test_a_prediction_from_logits_that_are_no_numbers_is_wrong(mixed):
    nan = torch.nan
    logits = torch.tensor([[nan, nan, nan], [0.0, nan, 1.0], [nan, 0.0, 1.0], [0.0, 1.0, 2.0]])
    y = torch.tensor([0, 1, 0, 2])
    mix = Mix(0, torch.tensor([0, 1, 2, 3]), torch.tensor(0.25)) if mixed else None
    assert float(mixed_correct(logits, y, mix)) == 1
    assert correct(logits, y).tolist() == [False, False, False, True]


@pytest.mark.parametrize("scale", [0.0, 6.0, 40.0, 400.0])
@pytest.mark.parametrize("classes", [2, 10])
def test_bce_and_its_gradient_are_exact_where_a_prediction_is_certain(classes, scale):
    torch.manual_seed(0)
    logits, y = scale * torch.randn(32, classes), torch.randint(classes, (32,))
    mix = Mix(0, torch.randperm(32), torch.tensor(0.7))
    one_hot = torch.eye(classes, dtype=torch.float64)[y]
    target = 0.7 * one_hot + 0.3 * one_hot[mix.perm]

    def formula(z):
        everything = z.logsumexp(1, keepdim=True)
        others = [torch.cat([z[:, :k], z[:, k + 1 :]], 1).logsumexp(1) for k in range(classes)]
        log_q = torch.stack(others, 1) - everything
        return -(target * (z - everything) + (1 - target) * log_q).mean()

    gradient, value = torch.func.grad_and_value(formula)(logits.double())
    found = torch.func.grad_and_value(lambda z: mixed_loss(z, y, mix, "bce"))(logits)
    torch.testing.assert_close(found[1].double(), value, rtol=1e-6, atol=0)
    torch.testing.assert_close(found[0].double(), gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", ["ce", "bce"])
@pytest.mark.parametrize("mixed", [False, True])
def test_labels_of_another_type_or_shape_are_refused(loss, mixed):
    logits, y = torch.randn(3, 3), torch.tensor([0, 1, 2])
    mix = Mix(0, torch.tensor([1, 2, 0]), torch.tensor(0.7)) if mixed else None
    for wrong in (y.int(), y.byte(), y.float(), torch.eye(3), y.tolist()):
        with pytest.raises(TypeError, match="int64"):
            mixed_loss(logits, wrong, mix, loss)
    for wrong in (y[:, None], y[:2], torch.eye(3).long()):
        with pytest.raises(InputError, match="one label for each of the 3"):
            mixed_loss(logits, wrong, mix, loss)


class Checkpointed(nn.Module):
    """Two blocks; the passes of the second are repeated in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.out = nn.Linear(6, 3)

    def blocks(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.second(torch.tanh(self.first(x))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(checkpoint(self.blocks, x, use_reentrant=False))


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_mix_points_of_any_network_mix_there_and_also_in_repeated_passes(layer):
    torch.manual_seed(0)
    model = Checkpointed().double()
    x, y = torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    mix = Mix(layer, torch.tensor([1, 3, 0, 2]), torch.tensor([0.3, 0.9, 0.5, 0.0]))
    lam = mix.lam.double()[:, None]

    def mixed_at(number, h):
        return lam * h + (1 - lam) * h[mix.perm] if number == layer else h

    h = mixed_at(1, model.first(mixed_at(0, x)))
    logits = model.out(torch.tanh(mixed_at(2, model.second(torch.tanh(h)))))
    expected = torch.autograd.grad(mixed_loss(logits, y, mix), list(model.parameters()))
    points = MixPoints(model, ["input", "first", "second"])
    with points.applied(mix):
        found = model(x)
        gradients = torch.autograd.grad(mixed_loss(found, y, mix), list(model.parameters()))
    torch.testing.assert_close(found, logits)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_removed_or_unused_mix_points_change_nothing():
    model = Checkpointed()
    x = torch.randn(4, 6)
    plain = model(x)
    points = MixPoints(model, ["input", "first"])
    assert torch.equal(model(x), plain)
    with points.applied(None):
        assert torch.equal(model(x), plain)
    points.remove()
    with points.applied(Mix(1, torch.tensor([1, 0, 3, 2]), torch.tensor(0.5))):
        assert torch.equal(model(x), plain)


def test_a_mix_point_that_the_network_lacks_is_refused():
    with pytest.raises(InputError, match="has no module frist: choose input or a module such as f"):
        MixPoints(Checkpointed(), ["frist"])


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        ("mixup", None, ("input",)),
        ("manifold", None, ("input", "groups.0", "groups.1")),
        ("manifold", ["1", "2"], ("groups.0", "groups.1")),
        ("manifold", ["0", "groups.1.0.conv1"], ("input", "groups.1.0.conv1")),
        ("mixup", ["2"], ("groups.1",)),
    ],
)
def test_mix_points_are_given_by_number_or_by_name(kind, given, expected):
    assert point_names(models.build("preact18", width=1), kind, given) == expected


@pytest.mark.parametrize(
    ("given", "twice"),
    [
        (["0", "1", "0"], "--mix-at 0 names input twice"),
        (["0", "input"], "--mix-at 0 names input twice"),
        (["1", "groups.0"], "--mix-at 1 names groups.0 twice"),
    ],
)
def test_a_mix_point_that_is_named_twice_is_refused(given, twice):
    with pytest.raises(InputError, match=twice):
        point_names(models.build("preact18", width=1), "manifold", given)
