import math

import pytest
import torch
from kernel_cases import HALVES, INTERPRETED, LAYOUTS, SHAPES, laid_out, reference_only

from fastiat.kernels import mix

PERM = torch.tensor([2, 0, 1, 3])  # its own inverse it is not


def plain(x, perm, lam):
    if isinstance(lam, torch.Tensor) and lam.dim():
        lam = lam.view(-1, *[1] * (x.dim() - 1))
    return lam * x + (1 - lam) * x[perm]


def make(shape=(4, 3, 5, 7), device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(shape).to(device, dtype), torch.randperm(shape[0]).to(device)


LAMS = [0, 1, 1.0, 0.3, 1 / 3, "scalar", "scalar64", "per sample", "ends per sample"]


def make_lam(lam, batch, device="cpu"):
    if lam == "scalar":
        return torch.tensor(0.7, device=device)
    if lam == "scalar64":
        return torch.tensor(1 / 3, dtype=torch.float64, device=device)
    if lam == "per sample":
        return torch.rand(batch, generator=torch.Generator().manual_seed(1)).to(device)
    if lam == "ends per sample":
        return (torch.arange(batch, device=device) % 2).float()
    return lam


def to_cpu(lam):
    return lam.cpu() if isinstance(lam, torch.Tensor) else lam


@pytest.mark.parametrize("lam", LAMS)
def test_fp32_is_bit_equal_to_the_textbook_expression(lam, device):
    x, _ = make(device=device)
    perm, lam = PERM.to(device), make_lam(lam, 4, device)
    assert torch.equal(mix(x, perm, lam).cpu(), plain(x.cpu(), PERM, to_cpu(lam)))


@pytest.mark.parametrize("shape", [*SHAPES, (5,), (3, 1025), (2, 3, 2, 3, 4)])
def test_odd_shapes(shape, device):
    if len(shape) == 1:
        shape = (*shape, 1)
    x, perm = make(shape, device)
    assert torch.equal(mix(x, perm, 0.3).cpu(), plain(x.cpu(), perm.cpu(), 0.3))


@pytest.mark.parametrize("lam", LAMS)
def test_gradient_is_that_of_the_textbook_expression(lam, device):
    x, _ = make(device=device)
    lam = make_lam(lam, 4, device)
    weight = torch.randn(x.shape)
    y = x.cpu().double().requires_grad_()
    (expected,) = torch.autograd.grad(plain(y, PERM, to_cpu(lam)), y, weight.double())
    (actual,) = torch.autograd.grad(
        mix(x.requires_grad_(), PERM.to(device), lam), x, weight.to(device)
    )
    torch.testing.assert_close(actual.cpu(), expected.float(), rtol=1e-6, atol=1e-6)


def test_gradient_is_bit_reproducible_and_sums_no_more_than_two_terms(device):
    x, perm = make((4, 3, 32, 32), device)
    g, lam = torch.randn_like(x), make_lam("per sample", 4, device)
    (actual,) = torch.autograd.grad(mix(x.requires_grad_(), perm, lam), x, g)
    inverse = perm.argsort()
    own, other = lam.view(-1, 1, 1, 1), (1 - lam)[inverse].view(-1, 1, 1, 1)
    assert torch.equal(actual.cpu(), (own.cpu() * g.cpu() + other.cpu() * g[inverse].cpu()))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("lam", [0.3, "scalar", "per sample"])
def test_half_precision_is_rounded_once(dtype, lam, device):
    x, perm = make((4, 3, 5, 7), device, dtype)
    lam = make_lam(lam, 4, device)
    exact = plain(x.cpu().double(), perm.cpu(), lam.cpu().double() if torch.is_tensor(lam) else lam)
    out = mix(x, perm, lam)
    assert out.dtype == dtype
    # The fp32 sum cancels where the terms have opposite signs: measure against the terms.
    tolerance = torch.finfo(dtype).eps * exact.abs() + 1e-6
    assert ((out.cpu().double() - exact).abs() <= tolerance).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_memory_format(layout, device):
    x, perm = make(device=device)
    x = laid_out(x, layout)
    out = mix(x, perm, 0.3)
    assert torch.equal(out.cpu(), plain(x.cpu(), perm.cpu(), 0.3))
    is_last = out.is_contiguous(memory_format=torch.channels_last)
    assert is_last if layout == "channels_last" else out.is_contiguous()


def test_gradient_in_another_layout_than_the_input(device):
    x, perm = make(device=device)
    g = torch.randn_like(x)
    gradients = [
        torch.autograd.grad(mix(y.requires_grad_(), perm, 0.3), y, h)[0]
        for y in (x.clone(), laid_out(x, "channels_last").detach().clone())
        for h in (g, laid_out(g, "channels_last"), laid_out(g, "sliced"))
    ]
    assert all(torch.equal(gradients[0], other) for other in gradients)


@pytest.mark.parametrize("shape", [(0, 3, 5, 7), (4, 0)])
def test_empty_batches_pass_through(shape, device):
    x, perm = make(shape, device)
    out = mix(x.requires_grad_(), perm, 0.3)
    assert out.shape == shape
    assert torch.autograd.grad(out.sum(), x)[0].shape == shape


@pytest.mark.parametrize("perm", [[0, 0, 1, 2], [0, 1, 2, 4], [-1, 0, 1, 2]])
@reference_only
def test_perm_that_is_no_permutation_is_refused_on_the_cpu(perm):
    x, _ = make()
    with pytest.raises(ValueError, match="perm is no permutation"):
        mix(x, torch.tensor(perm), 0.3)
    with pytest.raises(ValueError, match="perm is no permutation"):
        torch.compile(mix, fullgraph=True, backend="aot_eager")(x, torch.tensor(perm), 0.3)


@pytest.mark.kernel_only
@pytest.mark.parametrize(
    ("perm", "spoiled", "spoiled_gradients"),
    [([0, 1, 9, 2], [2], [3]), ([0, -1, 2, 3], [1], [1]), ([0, 0, 1, 2], [], [3])],
)
def test_perm_that_is_no_permutation_shows_as_nan_in_the_kernel(perm, spoiled, spoiled_gradients):
    place = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
    x, _ = make(device=place)
    out = mix(x.requires_grad_(), torch.tensor(perm, device=place), 0.5)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert out.isnan().flatten(1).any(1).nonzero().flatten().tolist() == spoiled
    assert grad.isnan().flatten(1).any(1).nonzero().flatten().tolist() == spoiled_gradients


X = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("x", "perm", "lam", "kind", "message"),
    [
        (X, PERM[:3], 0.5, ValueError, "perm must have shape"),
        (X, PERM[:, None], 0.5, ValueError, "perm must have shape"),
        (X, PERM.int(), 0.5, TypeError, "perm must be torch.int64"),
        (X, [2, 0, 1, 3], 0.5, TypeError, "perm must be a tensor"),
        (X, PERM.to("meta"), 0.5, ValueError, "perm is on meta"),
        (X.long(), PERM, 0.5, TypeError, "x must be float32"),
        (X[:, 0], PERM, 0.5, ValueError, "x must be"),
        (X, PERM, 1.5, ValueError, "lam must be in"),
        (X, PERM, -0.5, ValueError, "lam must be in"),
        (X, PERM, math.nan, ValueError, "lam must be in"),
        (X, PERM, "0.5", TypeError, "lam must be a number"),
        (X, PERM, torch.zeros(3), ValueError, "lam must be a scalar or have shape"),
        (X, PERM, torch.zeros(4, 1), ValueError, "lam must be a scalar or have shape"),
        (X, PERM, torch.tensor(1), TypeError, "lam must be a floating-point"),
        (X, PERM, torch.tensor(0.5, device="meta"), ValueError, "lam is on meta"),
        (X, PERM, torch.tensor(0.5, requires_grad=True), ValueError, "lam requires a gradient"),
    ],
)
def test_wrong_arguments_are_named(x, perm, lam, kind, message):
    with pytest.raises(kind, match=message):
        mix(x, perm, lam)


@reference_only
@pytest.mark.parametrize("lam", [torch.tensor(1.5), torch.tensor([0.5, 0.5, math.nan, 0.5])])
def test_lam_values_outside_the_unit_interval_are_refused_on_the_cpu(lam):
    with pytest.raises(ValueError, match="lam must be in"):
        mix(X, PERM, lam)


@reference_only
@pytest.mark.parametrize("lam", ["scalar", "per sample"])
@pytest.mark.parametrize("transpose", [False, True])
def test_opcheck(lam, transpose, device):
    x, perm = make(device=device)
    args = (x.requires_grad_(), perm, make_lam(lam, 4, device), transpose)
    torch.library.opcheck(torch.ops.fastiat.mix.default, args)


@reference_only
def test_gradcheck_to_second_order():
    x, _ = make((4, 3), dtype=torch.float64)
    lam = make_lam("per sample", 4)
    assert torch.autograd.gradcheck(lambda x: mix(x, PERM, lam), x.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda x: mix(x, PERM, lam), x)


@reference_only
@pytest.mark.parametrize("lam", [0.3, "scalar", "per sample"])
def test_compiles_forward_and_backward_without_a_graph_break(lam, device):
    def loss(x, perm, lam):
        return mix(x * 2.0, perm, lam).square().sum()

    x, perm = make(device=device)
    lam = make_lam(lam, 4, device)
    (expected,) = torch.autograd.grad(loss(x.requires_grad_(), perm, lam), x)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (actual,) = torch.autograd.grad(compiled(x, perm, lam), x)
    torch.testing.assert_close(actual, expected)


@reference_only
def test_torch_func_transforms_see_through(device):
    x, perm = make(device=device)
    expected = torch.autograd.grad(mix(x.requires_grad_(), perm, 0.3).pow(3).sum(), x)[0]
    actual = torch.func.grad(lambda x: mix(x, perm, 0.3).pow(3).sum())(x.detach())
    torch.testing.assert_close(actual, expected)


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_two_to_the_31_values():
    x = torch.zeros(2, 2**30 + 1, dtype=torch.bfloat16, device="cuda")
    x[1] = 1
    out = mix(x, torch.tensor([1, 0], device="cuda"), 0.25)
    assert (out[0] == 0.75).all()
    assert (out[1] == 0.25).all()
