import math

import pytest
import torch
from kernel_cases import HALVES, error, laid_out, reference_only

from fastiat.kernels import pgd_step_standardize

EPS, ALPHA = 0.03, 0.0075


def truth(image, delta, grad, eps, alpha, low=0.0, high=1.0):
    """The step in float64, autograd differentiating the definition; and the pixel gradient."""

    def standardized(x):
        centred = x - x.mean((1, 2, 3), keepdim=True)
        deviation = centred.square().mean((1, 2, 3), keepdim=True).sqrt()
        return centred / deviation.clamp_min(1 / (255 * math.sqrt(x[0].numel())))

    x0 = image.double() / 255
    x = (x0 + delta).requires_grad_()
    (g,) = torch.autograd.grad(standardized(x), x, grad.double())
    x = torch.min(torch.max(x.detach() + alpha * g.sign(), x0 - eps), x0 + eps).clamp(low, high)
    return x - x0, standardized(x), g


def make(shape=(2, 3, 5, 7), device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    image = torch.randint(0, 256, shape, dtype=torch.uint8)
    delta = (image / 255 + EPS * (2 * torch.rand(shape) - 1)).clamp(0, 1) - image / 255
    return image.to(device), delta.to(device), torch.randn(shape).to(device, dtype)


# Five values (two have no gradient); blocks of 256 just and just not filled; CIFAR; one value more
# than a program holds.
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 5), (2, 3, 5, 7), (1, 1, 16, 16), (1, 1, 1, 257), (2, 3, 32, 32), (1, 1, 1, 8193)],
)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_step_and_standardisation_are_those_of_float64(shape, dtype, device):
    image, delta, grad = make(shape, device, dtype)
    new_delta, z = pgd_step_standardize(image, delta, grad, EPS, ALPHA)
    exact_delta, _, g = truth(*(t.cpu() for t in (image, delta, grad)), EPS, ALPHA)
    # A gradient that is zero but for rounding may take either sign.
    sure = g.abs() > 1e-5 * g.abs().amax((1, 2, 3), keepdim=True)
    assert sure.float().mean() > 0.99
    assert error(new_delta.cpu()[sure], exact_delta[sure]) < 1e-7
    assert (new_delta.dtype, z.dtype) == (torch.float32, dtype)
    *_, exact_z, _ = truth(image.cpu(), new_delta.cpu().double(), grad.cpu(), 1.0, 0.0)
    step = 0 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert ((z.cpu().double() - exact_z).abs() <= step * exact_z.abs() + 1e-5).all()


@reference_only
def test_reference_is_pgd_step_between_standardize_and_its_gradient():
    from fastiat.kernels import pgd_step, standardize

    image, delta, grad = make((4, 3, 32, 32))
    x0 = image / 255
    x = (x0 + delta).requires_grad_()
    (g,) = torch.autograd.grad(standardize(x), x, grad)
    expected = pgd_step(x.detach(), g, x0, EPS, ALPHA)
    new_delta, z = pgd_step_standardize(image, delta, grad, EPS, ALPHA)
    assert ((x0 + new_delta - expected).abs() > 1e-6).sum() <= 2
    torch.testing.assert_close(z, standardize(x0 + new_delta), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("grad_layout", ["contiguous", "channels_last", "expanded"])
def test_layouts_and_memory_format(layout, grad_layout, device):
    image, delta, grad = make(device=device)
    image, grad = laid_out(image, layout), laid_out(grad, grad_layout)
    outs = pgd_step_standardize(image, delta, grad, EPS, ALPHA, dtype=torch.bfloat16)
    plain = pgd_step_standardize(
        *(t.contiguous() for t in (image, delta, grad)), EPS, ALPHA, dtype=torch.bfloat16
    )
    for out, expected in zip(outs, plain, strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)
        is_last = out.is_contiguous(memory_format=torch.channels_last)
        assert is_last if layout == "channels_last" else out.is_contiguous()


def test_iterate_stays_in_the_ball_and_the_pixel_range(device):
    image, delta, grad = make((2, 3, 5, 7), device)
    for _ in range(9):
        delta, _ = pgd_step_standardize(image, delta, grad, EPS, ALPHA)
        x = image / 255 + delta
        assert delta.abs().max() <= EPS + 6e-8
        assert x.min() >= 0
        assert x.max() <= 1
    assert delta.abs().max() > 0.029


def test_nan_gradient_moves_its_image_nowhere(device):
    image, delta, grad = make(device=device)
    grad[0, 1, 2, 3] = math.nan
    new_delta, _ = pgd_step_standardize(image, delta, grad, EPS, ALPHA)
    assert error(new_delta[0], delta[0].cpu().double()) < 1e-7
    assert error(new_delta[1], delta[1].cpu().double()) > 0.007


def test_infinite_gradient_keeps_the_iterate_finite_and_in_the_ball(device):
    image, delta, grad = make(device=device)
    grad[0, 1, 2, 3] = math.inf
    new_delta, z = pgd_step_standardize(image, delta, grad, EPS, ALPHA)
    assert new_delta.abs().max() <= EPS + 6e-8
    assert z.isfinite().all()


def test_constant_image_steps_along_the_centred_gradient(device):
    image = torch.full((1, 3, 5, 7), 128, dtype=torch.uint8, device=device)
    _, delta, grad = make((1, 3, 5, 7), device)
    new_delta, z = pgd_step_standardize(image, torch.zeros_like(delta), grad, EPS, ALPHA)
    assert torch.equal(new_delta.sign(), (grad - grad.mean()).sign())
    assert z.isfinite().all()


def test_empty_batch(device):
    image, delta, grad = make((0, 3, 5, 7), device)
    for out in pgd_step_standardize(image, delta, grad, EPS, ALPHA):
        assert out.shape == (0, 3, 5, 7)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"image": torch.zeros(2, 3)}, TypeError, "image must be a uint8"),
        ({"image": torch.zeros(2, dtype=torch.uint8)}, ValueError, "image must be"),
        ({"delta": torch.zeros(2, 2)}, ValueError, "delta has shape"),
        ({"delta": torch.zeros(2, 3).bfloat16()}, TypeError, "delta must be float32"),
        ({"grad": torch.zeros(3)}, ValueError, "grad has shape"),
        ({"grad": torch.zeros(2, 3).double()}, TypeError, "grad and dtype"),
        ({"grad": torch.zeros(2, 3, device="meta")}, ValueError, "grad is on meta"),
        ({"dtype": torch.int8}, TypeError, "grad and dtype"),
        ({"eps": -1.0}, ValueError, "eps must be"),
        ({"alpha": math.nan}, ValueError, "alpha must be"),
    ],
)
def test_wrong_arguments_are_named(change, kind, message):
    good = {
        "image": torch.zeros(2, 3, dtype=torch.uint8),
        "delta": torch.zeros(2, 3),
        "grad": torch.zeros(2, 3),
    }
    with pytest.raises(kind, match=message):
        pgd_step_standardize(**{**good, "eps": 0.1, "alpha": 0.1, **change})


@reference_only
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_opcheck(layout, device):
    image, delta, grad = make(device=device)
    args = (laid_out(image, layout), delta, grad, EPS, ALPHA, 0.0, 1.0, torch.bfloat16)
    torch.library.opcheck(torch.ops.fastiat.pgd_step_standardize.default, args)


@reference_only
def test_compiles_without_a_graph_break(device):
    def glue(image, delta, grad):
        delta, z = pgd_step_standardize(image, delta, grad, EPS, ALPHA)
        return delta + 1, z * 2

    args = make(device=device)
    for actual, expected in zip(
        torch.compile(glue, fullgraph=True, backend="aot_eager")(*args), glue(*args), strict=True
    ):
        torch.testing.assert_close(actual, expected)
