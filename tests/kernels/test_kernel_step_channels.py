"""PGD steps whose eps, alpha and clip differ between channels, as they do for normalised images."""

import math

import pytest
import torch
from kernel_cases import (
    HALVES,
    LAYOUTS,
    assert_within_one_ulp,
    error,
    laid_out,
    reference_only,
)

from fastiat.kernels import pgd_step, pgd_step_, pgd_step_l2

EPS, ALPHA = 8 / 255, 2 / 255
# One value; several blocks with a border inside a channel; a CIFAR image; no, one and three sizes.
SHAPES = [(1, 1, 1, 1), (2, 3, 25, 41), (2, 3, 32, 32), (2, 5), (2, 3, 7), (2, 3, 2, 5, 7)]


def column(values, x):
    return values.view(-1, *[1] * (x.dim() - 2))


def plain(x_adv, grad, x, eps, alpha, clip):
    eps, alpha, low, high = (column(size, x) for size in (eps, alpha, *clip))
    moved = x_adv + alpha * grad.sign()
    return torch.clamp(torch.min(torch.max(moved, x - eps), x + eps), low, high)


def plain_l2(x_adv, grad, x, eps, alpha, clip):
    eps, alpha, low, high = (column(size, x) for size in (eps, alpha, *clip))

    def norm(d):
        return d.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1))

    scaled = alpha * grad
    d = x_adv + alpha * scaled / norm(scaled) - x
    return torch.clamp(x + d / norm(d / eps).clamp_min(1), low, high)


def make(shape=(2, 3, 5, 7), device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    std = 0.2 + 0.1 * torch.rand(shape[1])
    mean = 0.4 + 0.1 * torch.rand(shape[1])
    pixels = torch.rand(shape)
    near = (pixels + EPS * torch.randn(shape)).clamp(0, 1)
    tensors = [(p - column(mean, p)) / column(std, p) for p in (near, pixels)]
    grad = torch.randn(shape) * torch.randint(0, 2, shape)
    x_adv, grad, x = (t.to(device, dtype) for t in (tensors[0], grad, tensors[1]))
    clip = tuple(((end - mean) / std).to(device) for end in (0, 1))
    return (x_adv, grad, x), ((EPS / std).to(device), (ALPHA / std).to(device), clip)


def on_host(tensors, sizes, dtype=torch.float32):
    eps, alpha, clip = sizes
    (eps, alpha, *clip), tensors = (
        [t.cpu().to(dtype) for t in many] for many in ((eps, alpha, *clip), tensors)
    )
    return *tensors, eps, alpha, tuple(clip)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_is_bit_equal_to_the_textbook_expression(shape, layout, device):
    tensors, sizes = make(shape, device)
    if len(shape) == 4:
        tensors = [laid_out(t, layout) for t in tensors]
    elif layout == "channels_last" and len(shape) == 5:
        tensors = [t.contiguous(memory_format=torch.channels_last_3d) for t in tensors]
    expected = plain(*on_host(tensors, sizes))
    assert torch.equal(pgd_step(*tensors, *sizes).cpu(), expected)
    assert pgd_step_(*tensors, *sizes) is tensors[0]
    assert torch.equal(tensors[0].cpu(), expected)


@pytest.mark.parametrize("step", [pgd_step, pgd_step_l2])
def test_equal_channels_give_the_step_of_numbers(step, device):
    (x_adv, grad, x), _ = make(device=device)
    one = torch.ones(3, device=device)
    actual = step(x_adv, grad, x, EPS * one, ALPHA * one, (-0.5 * one, 0.5 * one))
    expected = step(x_adv, grad, x, EPS, ALPHA, (-0.5, 0.5))
    if step is pgd_step:
        assert torch.equal(actual, expected)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("step", [pgd_step, pgd_step_, pgd_step_l2])
def test_shapes_of_a_size_and_numbers_beside_tensors(step, device):
    (x_adv, grad, x), (eps, alpha, (low, high)) = make(device=device)

    def call(*sizes):
        return step(x_adv.clone(), grad, x, *sizes)

    expected = call(eps, alpha, (low, high))
    views = [size.view(3, 1, 1) for size in (eps, alpha, low, high)]
    assert torch.equal(call(views[0], views[1][None], (low, views[3].double())), expected)
    one = torch.ones(3, device=device)
    assert torch.equal(call(EPS, alpha, (-2, 2)), call(EPS * one, alpha, (-2 * one, 2 * one)))
    assert torch.equal(call(eps, ALPHA, (low, 2)), call(eps, ALPHA * one, (low, 2 * one)))
    assert torch.equal(call(EPS, ALPHA, (low, high)), call(EPS * one, ALPHA * one, (low, high)))


@pytest.mark.parametrize("eps", [0.02, 0.5, math.inf])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [s for s in SHAPES if len(s) == 4])
def test_l2_error_is_within_twice_that_of_torch_against_float64(shape, layout, eps, device):
    tensors, (radius, alpha, clip) = make(shape, device)
    tensors = [laid_out(t, layout) for t in tensors]
    tensors[1] += 0.1  # the gradient of a single value may be 0
    sizes = radius * (eps / EPS), 10 * alpha, clip
    exact = plain_l2(*on_host(tensors, sizes, torch.float64))
    out = pgd_step_l2(*tensors, *sizes)
    expected = plain_l2(*on_host(tensors, sizes))
    assert error(out, exact) <= 2 * error(expected, exact) + 1e-6


@pytest.mark.parametrize("eps", [0.05, 0.5])
def test_l2_step_is_that_of_the_pixels_normalised(eps, device):
    tensors, (radius, alpha, (low, high)) = make(device=device)
    std, mean = 1 / (high - low), -low / (high - low)
    x_adv, x = (t * column(std, t) + column(mean, t) for t in (tensors[0], tensors[2]))
    pixels = pgd_step_l2(x_adv, tensors[1] / column(std, x), x, eps, ALPHA)
    actual = pgd_step_l2(*tensors, radius * (eps / EPS), alpha, (low, high))
    torch.testing.assert_close(
        actual, (pixels - column(mean, x)) / column(std, x), rtol=0, atol=3e-6
    )


def test_l2_channel_of_radius_zero_stays_and_does_not_count(device):
    (x_adv, grad, x), (eps, alpha, _) = make(device=device)
    eps[1] = alpha[1] = 0
    wide = (-100 * torch.ones(3, device=device), 100.0)
    out = pgd_step_l2(x_adv, grad, x, eps, alpha, wide)
    assert torch.equal(out[:, 1], x[:, 1])
    rest = [0, 2]
    expected = pgd_step_l2(
        x_adv[:, rest], grad[:, rest], x[:, rest], eps[rest], alpha[rest], (-100.0, 100.0)
    )
    torch.testing.assert_close(out[:, rest], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_rounded_once(dtype, device):
    tensors, sizes = make(device=device, dtype=dtype)
    exact = plain(*on_host(tensors, sizes, torch.float64))
    assert_within_one_ulp(pgd_step(*tensors, *sizes), exact)
    exact = plain_l2(*on_host(tensors, sizes, torch.float64))
    out = pgd_step_l2(*tensors, *sizes)
    assert ((out.cpu().double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 2e-6).all()


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layouts_mix_and_the_iterate_keeps_its_memory_format(layout, grad_layout, device):
    (x_adv, grad, x), sizes = make(device=device)
    tensors = laid_out(x_adv, layout), laid_out(grad, grad_layout), laid_out(x, layout)
    out = pgd_step(*tensors, *sizes)
    assert torch.equal(out.cpu(), plain(*on_host(tensors, sizes)))
    is_last = out.is_contiguous(memory_format=torch.channels_last)
    assert is_last if layout == "channels_last" else out.is_contiguous()


@pytest.mark.parametrize("step", [pgd_step, pgd_step_, pgd_step_l2])
def test_empty_batches_pass_through(step, device):
    (x_adv, grad, x), sizes = make((0, 3, 5, 7), device)
    assert step(x_adv, grad, x, *sizes).shape == (0, 3, 5, 7)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"eps": torch.ones(2)}, ValueError, r"eps has shape \(2,\)"),
        ({"eps": torch.ones(1, 1, 3)}, ValueError, "eps has shape"),
        ({"alpha": torch.ones(3, 1)}, ValueError, "alpha has shape"),
        ({"eps": torch.ones(3).long()}, TypeError, "eps must be a floating-point"),
        ({"eps": torch.ones(3, device="meta")}, ValueError, "eps is on meta"),
        ({"eps": torch.ones(3), "alpha": -0.1}, ValueError, "alpha must be zero or more"),
        ({"eps": torch.ones(3), "alpha": "8/255"}, TypeError, "alpha must be a number"),
        ({"eps": torch.ones(3), "clip": 1.0}, ValueError, "pair"),
        ({"eps": torch.tensor(1.0)}, TypeError, "eps must be a number"),
        ({"clip": (torch.ones(2), 1.0)}, ValueError, "the low end of clip has shape"),
        ({n: torch.zeros(3) for n in ("x_adv", "grad", "x")}, ValueError, "need x of"),
    ],
)
@pytest.mark.parametrize("step", [pgd_step, pgd_step_, pgd_step_l2])
def test_wrong_arguments_are_named(step, change, kind, message):
    good = {name: torch.zeros(2, 3, 3, 3) for name in ("x_adv", "grad", "x")}
    sizes = {"eps": torch.ones(3), "alpha": 0.1} if "x" in change else {"eps": 0.1, "alpha": 0.1}
    with pytest.raises(kind, match=message):
        step(**{**good, **sizes, **change})


@reference_only  # a kernel would have to wait for the values
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": torch.tensor([0.1, -0.1, 0.1])}, "eps must be zero or more in every channel"),
        ({"alpha": torch.tensor([0.1, 0.1, math.nan])}, "alpha must be zero or more in every"),
        ({"clip": (torch.tensor([0.0, 0.0, 2.0]), 1.0)}, "low <= high in every channel"),
    ],
)
@pytest.mark.parametrize("step", [pgd_step, pgd_step_, pgd_step_l2])
def test_wrong_values_are_refused_on_the_cpu(step, change, message):
    good = {name: torch.zeros(2, 3, 3, 3) for name in ("x_adv", "grad", "x")}
    with pytest.raises(ValueError, match=message):
        step(**{**good, "eps": 0.1, "alpha": 0.1, **change})


@reference_only
@pytest.mark.parametrize(
    "name", ["pgd_step_channels", "pgd_step_channels_", "pgd_step_l2_channels"]
)
def test_opcheck(name, device):
    tensors, (eps, alpha, clip) = make(device=device)
    op = getattr(torch.ops.fastiat, name).default
    torch.library.opcheck(op, (*tensors, eps, alpha, *clip))


@reference_only
def test_compiles_without_a_graph_break(device):
    def attack(x_adv, grad, x, eps, alpha, clip):
        x_adv = pgd_step(x_adv * 1.0, grad, x, eps, alpha, clip)
        return pgd_step_l2(pgd_step_(x_adv, grad, x, eps, ALPHA, clip), grad, x, eps, alpha) + 1

    tensors, sizes = make(device=device)
    compiled = torch.compile(attack, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors, *sizes), attack(*tensors, *sizes))
