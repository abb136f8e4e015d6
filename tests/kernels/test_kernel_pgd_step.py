import math

import pytest
import torch
from kernel_cases import HALVES, LAYOUTS, SHAPES, assert_within_one_ulp, laid_out, reference_only

from fastiat.kernels import pgd_step, pgd_step_

EPS, ALPHA = 0.03, 0.0075


def plain(x_adv, grad, x, eps, alpha, low=0.0, high=1.0):
    moved = x_adv + alpha * grad.sign()
    return torch.min(torch.max(moved, x - eps), x + eps).clamp(low, high)


def make(shape, device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.rand(shape)
    x_adv = (x + EPS * torch.randn(shape)).clamp(0, 1)
    grad = torch.randn(shape) * torch.randint(0, 2, shape)
    return [t.to(device, dtype) for t in (x_adv, grad, x)]


@pytest.mark.parametrize("shape", [*SHAPES, (1025,), (3,)])
def test_fp32_is_bit_equal_to_the_textbook_expression(shape, device):
    x_adv, grad, x = make(shape, device)
    expected = plain(*(t.cpu() for t in (x_adv, grad, x)), EPS, ALPHA)
    assert torch.equal(pgd_step(x_adv, grad, x, EPS, ALPHA).cpu(), expected)
    returned = pgd_step_(x_adv, grad, x, EPS, ALPHA)
    assert returned is x_adv
    assert torch.equal(x_adv.cpu(), expected)


@pytest.mark.parametrize("clip", [(-2.0, 3.0), (0.25, 0.5), (-math.inf, math.inf)])
def test_other_pixel_ranges(clip, device):
    x_adv, grad, x = make((2, 3, 5, 7), device)
    expected = plain(*(t.cpu() for t in (x_adv, grad, x)), EPS, ALPHA, *clip)
    assert torch.equal(pgd_step(x_adv, grad, x, EPS, ALPHA, clip).cpu(), expected)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_rounded_once(dtype, device):
    x_adv, grad, x = make((2, 3, 5, 7), device, dtype)
    exact = plain(*(t.cpu().double() for t in (x_adv, grad, x)), EPS, ALPHA)
    out = pgd_step(x_adv, grad, x, EPS, ALPHA)
    assert out.dtype == dtype
    assert_within_one_ulp(out, exact)
    assert_within_one_ulp(pgd_step_(x_adv, grad, x, EPS, ALPHA), exact)


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layouts_mix_and_the_iterate_keeps_its_memory_format(layout, grad_layout, device):
    x_adv, grad, x = make((2, 3, 5, 7), device)
    x_adv, grad, x = laid_out(x_adv, layout), laid_out(grad, grad_layout), laid_out(x, layout)
    expected = plain(*(t.cpu() for t in (x_adv, grad, x)), EPS, ALPHA)
    out = pgd_step(x_adv, grad, x, EPS, ALPHA)
    assert torch.equal(out.cpu(), expected)
    is_last = out.is_contiguous(memory_format=torch.channels_last)
    assert is_last if layout == "channels_last" else out.is_contiguous()


def test_in_place_writes_through_a_strided_view_and_nowhere_else(device):
    buffer = torch.full((2, 3, 5, 14), 9.0, device=device)
    x_adv, grad, x = make((2, 3, 5, 7), device)
    buffer[..., ::2] = x_adv
    pgd_step_(buffer[..., ::2], grad, x, EPS, ALPHA)
    assert torch.equal(buffer[..., ::2], pgd_step(x_adv, grad, x, EPS, ALPHA))
    assert (buffer[..., 1::2] == 9).all()


def test_nan_gradient_moves_nothing_and_infinite_one_takes_its_sign(device):
    x_adv = torch.full((40,), 0.5, device=device)
    grad = torch.ones(40, device=device)
    grad[:10], grad[10:20], grad[20:30] = math.nan, math.inf, -math.inf
    moved = pgd_step(x_adv, grad, x_adv, 1.0, 0.25).cpu()
    assert moved.tolist() == [0.5] * 10 + [0.75] * 10 + [0.25] * 10 + [0.75] * 10
    moved = pgd_step_(x_adv.clone(), grad, x_adv, 1.0, 0.25).cpu()
    assert moved.tolist() == [0.5] * 10 + [0.75] * 10 + [0.25] * 10 + [0.75] * 10


def test_nan_pixels_stay_nan_and_spoil_no_other(device):
    x_adv, grad, x = make((2, 3, 5, 7), device)
    x_adv[0, 0, 0, 0] = x[1, 1, 1, 1] = math.nan
    out = pgd_step(x_adv, grad, x, EPS, ALPHA)
    assert torch.equal(out.isnan(), x_adv.isnan() | x.isnan())


def test_gradient_may_have_another_dtype(device):
    x_adv, grad, x = make((2, 3, 5, 7), device)
    half = grad.to(torch.bfloat16)
    assert torch.equal(
        pgd_step(x_adv, half, x, EPS, ALPHA), pgd_step(x_adv, half.float(), x, EPS, ALPHA)
    )


@pytest.mark.parametrize("shape", [(0, 3, 5, 7), (2, 0), (0,)])
def test_empty_tensors_pass_through(shape, device):
    x_adv, grad, x = make(shape, device)
    assert pgd_step(x_adv, grad, x, EPS, ALPHA).shape == shape
    assert pgd_step_(x_adv, grad, x, EPS, ALPHA).shape == shape


def test_result_carries_no_gradient_though_the_iterate_requires_one(device):
    x_adv, grad, x = make((2, 3), device)
    assert not pgd_step(x_adv.requires_grad_(), grad, x, EPS, ALPHA).requires_grad
    assert pgd_step_(x_adv, grad, x, EPS, ALPHA).grad_fn is None


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"grad": torch.zeros(2, 2)}, ValueError, "grad has shape"),
        ({"x_adv": torch.zeros(3)}, ValueError, "x_adv has shape"),
        ({"x": torch.zeros(2, 3, dtype=torch.uint8)}, TypeError, "x must be float32"),
        ({"grad": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "grad must be float32"),
        ({"x_adv": torch.zeros(2, 3).half()}, TypeError, "x_adv is torch.float16"),
        ({"grad": None}, TypeError, "grad must be a tensor"),
        ({"grad": torch.zeros(2, 3, device="meta")}, ValueError, "grad is on meta"),
        ({"eps": -0.1}, ValueError, "eps must be zero or more"),
        ({"eps": math.nan}, ValueError, "eps must be zero or more"),
        ({"alpha": -0.1}, ValueError, "alpha must be zero or more"),
        ({"alpha": math.nan}, ValueError, "alpha must be zero or more"),
        ({"alpha": "8/255"}, TypeError, "alpha must be a number"),
        ({"clip": (1.0, 0.0)}, ValueError, "low <= high"),
        ({"clip": (0.0, math.nan)}, ValueError, "low <= high"),
        ({"clip": 1.0}, ValueError, "pair"),
    ],
)
@pytest.mark.parametrize("step", [pgd_step, pgd_step_])
def test_wrong_arguments_are_named(step, change, kind, message):
    good = {name: torch.zeros(2, 3) for name in ("x_adv", "grad", "x")}
    with pytest.raises(kind, match=message):
        step(**{**good, "eps": 0.1, "alpha": 0.1, **change})


def test_in_place_refuses_memory_that_overlaps():
    x_adv, grad, x = make((4, 3))
    with pytest.raises(ValueError, match="x_adv overlaps itself"):
        pgd_step_(x_adv[:1].expand(4, 3), grad, x, EPS, ALPHA)
    with pytest.raises(ValueError, match="x_adv overlaps itself"):
        pgd_step_(x_adv.view(-1).as_strided((4, 3), (1, 1)), grad, x, EPS, ALPHA)
    with pytest.raises(ValueError, match="x_adv shares memory with x"):
        pgd_step_(x, grad, x, EPS, ALPHA)
    with pytest.raises(ValueError, match="x_adv shares memory with grad"):
        pgd_step_(grad, grad.flatten()[:12].view(4, 3), x, EPS, ALPHA)
    both = torch.stack([x_adv, x])  # neighbours in one storage do not overlap
    assert torch.equal(
        pgd_step_(both[0], grad, both[1], EPS, ALPHA), plain(x_adv, grad, x, EPS, ALPHA)
    )


@reference_only
@pytest.mark.parametrize("name", ["pgd_step", "pgd_step_"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(name, dtype, device):
    tensors = make((2, 3, 5, 7), device, dtype)
    op = getattr(torch.ops.fastiat, name).default
    torch.library.opcheck(op, (*tensors, EPS, ALPHA, 0.0, 1.0))


@reference_only
def test_compiles_without_a_graph_break(device):
    def attack(x_adv, grad, x, eps):
        return pgd_step_(pgd_step(x_adv, grad, x, eps, ALPHA) * 1.0, grad, x, eps, ALPHA) + 1

    compiled = torch.compile(attack, fullgraph=True)
    x_adv, grad, x = make((2, 3, 5, 7), device)
    for eps in (0.03, 0.02, 0.01):  # a float that changes is not a constant of the graph
        assert torch.equal(compiled(x_adv, grad, x, eps), attack(x_adv, grad, x, eps))


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_two_to_the_31_values():
    x = torch.full((2**31 + 1025,), 0.5, dtype=torch.bfloat16, device="cuda")
    grad = torch.ones_like(x)
    grad[-1] = -1
    pgd_step_(out := x.clone(), grad, x, 0.5, 0.25)
    assert out[-1] == 0.25
    assert (out[:-1] == 0.75).all()
