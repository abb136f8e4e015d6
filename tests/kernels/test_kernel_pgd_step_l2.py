import math

import pytest
import torch
from kernel_cases import HALVES, LAYOUTS, SHAPES, error, laid_out, reference_only

from fastiat.kernels import pgd_step_l2

EPS, ALPHA = 0.5, 0.2


def plain(x_adv, grad, x, eps, alpha, low=0.0, high=1.0):
    out = []
    for y, g, start in zip(x_adv, grad, x, strict=True):
        norm = g.norm()
        d = y + (alpha / norm * g if norm > 0 else 0 * g) - start
        length = d.norm()
        out.append(start + (d * (eps / length) if length > eps else d))
    return torch.stack(out).clamp(low, high)


def make(shape=(2, 3, 5, 7), device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.rand(shape)
    x_adv = (x + 0.05 * torch.randn(shape)).clamp(0, 1)
    return [t.to(device, dtype) for t in (x_adv, torch.randn(shape), x)]


@pytest.mark.parametrize("eps", [0.0, 0.05, 0.5, 100.0, math.inf])
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_within_twice_that_of_torch_against_float64(shape, eps, device):
    x_adv, grad, x = make(shape, device)
    host = [t.cpu() for t in (x_adv, grad, x)]
    exact = plain(*(t.double() for t in host), eps, ALPHA)
    out = pgd_step_l2(x_adv, grad, x, eps, ALPHA)
    assert error(out, exact) <= 2 * error(plain(*host, eps, ALPHA), exact) + 6e-8


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e30])
def test_tiny_and_huge_gradients_give_the_same_step(scale, device):
    x_adv, grad, x = make(device=device)
    grad = (4 * grad).round() / 4
    exact = plain(*(t.cpu().double() for t in (x_adv, grad, x)), 100.0, ALPHA)
    scaled = grad * scale
    tolerance = 1e-6 if scale > 1e-38 else 1e-3  # denormals have few digits
    assert error(pgd_step_l2(x_adv, scaled, x, 100.0, ALPHA), exact) < tolerance


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_calculated_in_fp32(dtype, device):
    x_adv, grad, x = make(device=device, dtype=dtype)
    exact = plain(*(t.cpu().double() for t in (x_adv, grad, x)), EPS, ALPHA)
    out = pgd_step_l2(x_adv, grad, x, EPS, ALPHA)
    assert out.dtype == dtype
    assert ((out.cpu().double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-6).all()


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layouts_mix_and_the_iterate_keeps_its_memory_format(layout, grad_layout, device):
    x_adv, grad, x = make(device=device)
    x_adv, grad = laid_out(x_adv, layout), laid_out(grad, grad_layout)
    exact = plain(*(t.cpu().double() for t in (x_adv, grad, x)), EPS, ALPHA)
    out = pgd_step_l2(x_adv, grad, x, EPS, ALPHA)
    assert error(out, exact) < 1e-6
    is_last = out.is_contiguous(memory_format=torch.channels_last)
    assert is_last if layout == "channels_last" else out.is_contiguous()


def test_nan_and_zero_gradients_move_nothing(device):
    x_adv, grad, _ = make(device=device)
    grad[0, 0], grad[1] = math.nan, 0
    moved = pgd_step_l2(x_adv, grad, x_adv, 100.0, 1e-3, (-9.0, 9.0)) - x_adv
    assert (moved[0, 0] == 0).all()
    assert (moved[1] == 0).all()
    assert moved[0].norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_infinite_gradients_take_their_sign_and_all_of_the_step(device):
    x = torch.full((1, 1, 2, 3), 0.5, device=device)
    grad = torch.tensor([math.inf, 1.0, -math.inf, math.nan, 1e30, 0.0], device=device).view_as(x)
    moved = (pgd_step_l2(x, grad, x, 1.0, 0.2) - x).flatten().cpu()
    step = 0.2 / math.sqrt(2)
    torch.testing.assert_close(moved, torch.tensor([step, 0, -step, 0, 0, 0]))


@pytest.mark.parametrize("shape", [(0, 3, 5, 7), (2, 0)])
def test_empty_batches_pass_through(shape, device):
    x_adv, grad, x = make(shape, device)
    assert pgd_step_l2(x_adv, grad, x, EPS, ALPHA).shape == shape


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"grad": torch.zeros(2, 2)}, ValueError, "grad has shape"),
        ({"x": torch.zeros(2, 3, dtype=torch.uint8)}, TypeError, "x must be float32"),
        ({"eps": -0.1}, ValueError, "eps must be zero or more"),
        ({"alpha": math.nan}, ValueError, "alpha must be zero or more"),
        ({n: torch.zeros(3) for n in ("x_adv", "grad", "x")}, ValueError, "x must be"),
    ],
)
def test_wrong_arguments_are_named(change, kind, message):
    good = {name: torch.zeros(2, 3) for name in ("x_adv", "grad", "x")}
    with pytest.raises(kind, match=message):
        pgd_step_l2(**{**good, "eps": 0.1, "alpha": 0.1, **change})


@reference_only
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_opcheck(layout, device):
    x_adv, grad, x = make(device=device)
    args = (laid_out(x_adv, layout), grad, x, EPS, ALPHA, 0.0, 1.0)
    torch.library.opcheck(torch.ops.fastiat.pgd_step_l2.default, args)


@reference_only
def test_compiles_without_a_graph_break(device):
    def step(x_adv, grad, x):
        return pgd_step_l2(x_adv * 1.0, grad, x, EPS, ALPHA) + 1

    args = make(device=device)
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(*args), step(*args))
