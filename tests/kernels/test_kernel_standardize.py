import copy
import math

import pytest
import torch
from kernel_cases import HALVES, LAYOUTS, SHAPES, error, laid_out, reference_only
from torch import nn

from fastiat.kernels import standardize


def plain(x):
    """The definition, in the dtype of `x`; a Python loop over images and the deviation's root."""
    out = []
    for image in x:
        n = image.numel()
        deviation = (image - image.mean()).square().mean().sqrt()
        out.append((image - image.mean()) / deviation.clamp_min(1 / (255 * math.sqrt(n))))
    return torch.stack(out)


def make(shape=(3, 3, 5, 7), device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    return torch.rand(shape).to(device, dtype)


@pytest.mark.parametrize("shape", [s for s in SHAPES if math.prod(s[1:]) > 1])
def test_error_is_within_twice_that_of_torch_against_float64(shape, device):
    x = make(shape, device)
    weight = torch.randn(shape)
    exact_x = x.cpu().double().requires_grad_()
    exact = plain(exact_x)
    (exact_grad,) = torch.autograd.grad(exact, exact_x, weight.double())
    torch_x = x.cpu().requires_grad_()
    expected = plain(torch_x)
    (expected_grad,) = torch.autograd.grad(expected, torch_x, weight)
    out = standardize(x.requires_grad_())
    (grad,) = torch.autograd.grad(out, x, weight.to(device))
    assert error(out, exact) <= 2 * error(expected, exact) + 1e-6
    assert error(grad, exact_grad) <= 2 * error(expected_grad, exact_grad) + 1e-5


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_calculated_in_fp32(dtype, device):
    x = make(device=device, dtype=dtype)
    exact = plain(x.cpu().double())
    out = standardize(x.requires_grad_())
    assert out.dtype == dtype
    step = torch.finfo(dtype).eps
    assert ((out.detach().double().cpu() - exact).abs() <= step * exact.abs() + 1e-5).all()
    g = torch.randn_like(x)
    (grad,) = torch.autograd.grad(out, x, g)
    y = x.detach().cpu().double().requires_grad_()
    (exact_grad,) = torch.autograd.grad(plain(y), y, g.cpu().double())
    assert error(grad, exact_grad) <= step * exact_grad.abs().max().item() + 1e-5


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_uint8_pixels_give_what_the_same_pixels_in_the_unit_interval_give(dtype, device):
    torch.manual_seed(0)
    x = torch.randint(0, 256, (3, 3, 5, 7), dtype=torch.uint8)
    x[1] = 9
    x[1, 0, 0, 0] = 10  # a deviation under the floor
    out = standardize(x.to(device), dtype)
    assert out.dtype == (dtype or torch.float32)
    exact = plain(x.double() / 255)
    step = 0 if out.dtype == torch.float32 else torch.finfo(out.dtype).eps
    assert ((out.cpu().double() - exact).abs() <= step * exact.abs() + 1e-5).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_memory_format(layout, device):
    x = laid_out(make(device=device), layout)
    out = standardize(x)
    assert error(out, plain(x.cpu().double())) < 1e-5
    is_last = out.is_contiguous(memory_format=torch.channels_last)
    assert is_last if layout == "channels_last" else out.is_contiguous()


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_gradient_in_any_layout(layout, grad_layout, device):
    x = laid_out(make(device=device), layout).requires_grad_()
    g = laid_out(torch.randn(3, 3, 5, 7), grad_layout)
    (grad,) = torch.autograd.grad(standardize(x), x, g.to(device))
    y = x.detach().cpu().double().requires_grad_()
    (expected,) = torch.autograd.grad(plain(y), y, g.double())
    assert error(grad, expected) < 1e-4


def test_constant_image_gives_zeros_and_a_finite_gradient(device):
    x = make(device=device)
    x[0], x[1] = 0.0, 0.7
    out = standardize(x.requires_grad_())
    g = torch.randn(3, 3, 5, 7)
    (grad,) = torch.autograd.grad(out, x, g.to(device))
    assert (out[0] == 0).all()
    assert error(out[1], torch.zeros(3, 5, 7)) < 2e-3  # the rounding of 0.7's mean, over the floor
    expected = (g[:2] - g[:2].mean((1, 2, 3), keepdim=True)) * 255 * math.sqrt(105)
    torch.testing.assert_close(grad[:2].cpu(), expected, rtol=1e-4, atol=1e-2)


def test_nan_spoils_its_own_image_alone(device):
    x = make(device=device)
    x[1, 2, 3, 4] = math.nan
    assert standardize(x).isnan().flatten(1).all(1).tolist() == [False, True, False]
    assert standardize(x).isnan().flatten(1).any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("shape", [(0, 3, 5, 7), (2, 0)])
def test_empty_batches_pass_through(shape, device):
    x = make(shape, device).requires_grad_()
    out = standardize(x)
    assert out.shape == shape
    assert torch.autograd.grad(out.sum(), x)[0].shape == shape


@pytest.mark.parametrize(
    ("x", "dtype", "kind", "message"),
    [
        (torch.zeros(3), None, ValueError, "x must be"),
        (torch.zeros(3, 3, dtype=torch.int32), None, TypeError, "x must be float32"),
        ([[1.0]], None, TypeError, "x must be a tensor"),
        (torch.zeros(3, 3), torch.int8, TypeError, "does not return torch.int8"),
    ],
)
def test_wrong_arguments_are_named(x, dtype, kind, message):
    with pytest.raises(kind, match=message):
        standardize(x, dtype)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(standardize(x)).relu().mean((2, 3))


def test_works_inside_a_model_that_others_attack(device):
    torch.manual_seed(0)
    net, x = Net().eval().to(device), make(device=device).requires_grad_()
    (expected,) = torch.autograd.grad(net(x)[:, 0].sum(), x)
    twin = copy.deepcopy(net)
    values = {name: p.detach() for name, p in net.named_parameters()}
    for logits in (twin(x), torch.func.functional_call(twin, values, (x,))):
        (actual,) = torch.autograd.grad(logits[:, 0].sum(), x)
        torch.testing.assert_close(actual, expected)


def test_autocast_leaves_it_in_fp32(device):
    x = make(device=device).requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        out = standardize(x)
        (grad,) = torch.autograd.grad(out.square()[:, 0].sum(), x)
    assert out.dtype == torch.float32
    assert torch.equal(out, standardize(x))
    (expected,) = torch.autograd.grad(standardize(x).square()[:, 0].sum(), x)
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-6)


@reference_only
def test_gradcheck_to_second_order():
    x = make((2, 2, 2, 3), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(standardize, x)
    assert torch.autograd.gradgradcheck(standardize, x)
    flat = (0.5 + 1e-4 * make((2, 2, 2, 3), dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(standardize, flat, eps=1e-8, rtol=1e-3)
    assert torch.autograd.gradgradcheck(standardize, flat, eps=1e-8, rtol=1e-3)


def test_gradient_penalty_differentiates_twice(device):
    x = make(device=device).requires_grad_()
    (g,) = torch.autograd.grad(standardize(x).pow(3).sum(), x, create_graph=True)
    (actual,) = torch.autograd.grad(g.square().sum(), x)
    y = x.detach().cpu().double().requires_grad_()
    (g,) = torch.autograd.grad(plain(y).pow(3).sum(), y, create_graph=True)
    (expected,) = torch.autograd.grad(g.square().sum(), y)
    assert error(actual, expected) <= 1e-4 * expected.abs().max().item()


@reference_only
def test_torch_func_transforms_see_through(device):
    x = make(device=device)

    def loss(x):
        return standardize(x).pow(3).sum()

    (expected,) = torch.autograd.grad(loss(x.requires_grad_()), x)
    x = x.detach()
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    each = torch.func.vmap(torch.func.grad(lambda image: loss(image[None])))(x)
    torch.testing.assert_close(each, expected)
    slope = torch.func.jvp(loss, (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(slope, expected.sum(), rtol=1e-3, atol=1e-3)


@reference_only
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_opcheck(layout, device):
    x = laid_out(make(device=device), layout)
    pixels = (x * 255).to(torch.uint8)
    ops = torch.ops.fastiat
    torch.library.opcheck(ops.standardize.default, (pixels, torch.bfloat16))
    torch.library.opcheck(ops.standardize.default, (x.clone().requires_grad_(), torch.float32))
    torch.library.opcheck(ops.standardize_backward.default, (torch.randn_like(x), x))


@reference_only
def test_compiles_forward_and_backward_without_a_graph_break(device):
    def loss(x):
        return standardize(x * 2.0).pow(3).sum()

    x = make(device=device).requires_grad_()
    (expected,) = torch.autograd.grad(loss(x), x)
    (actual,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x), x)
    torch.testing.assert_close(actual, expected)


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_two_to_the_31_values():
    x = torch.zeros(2, 2**30 + 1, dtype=torch.bfloat16, device="cuda")
    x[:, 0] = 1
    z = standardize(x)
    assert torch.equal(z[0], z[1])
    assert z[1, 0] > 1000
