"""Per-image standardisation: z = (x - mean) / max(std, 1 / (255 sqrt(N))) over an image's N values.

This is the formula of `tf.image.per_image_standardization`, which Madry et al.'s CIFAR-10 challenge
uses on pixels in 0..255 with the floor 1/sqrt(N); on pixels in [0, 1] the floor is 255 times
smaller. std is the population standard deviation. Because of the floor, a constant image becomes
zeros, not NaN. With r = 1 / max(std, floor), the gradient is

    dx = r * (g - mean(g) - z * mean(g * z))    without the last term where std is below the floor

All arithmetic is in fp32 (fp64 for fp64 input), for every dtype and under autocast: a sum of 3072
squares in half precision would lose most of its digits.
"""

# Kernel arguments are Triton values, for which there are no annotations.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
from torch import Tensor

from ._common import (
    FLOATS,
    check_device,
    check_floating,
    check_images,
    compute_dtype,
    dense,
    empty_like,
    from_rows,
    image_rows,
    on_device_of,
    power_of_two,
    register,
    tl,
    triton,
)


def variance_floor(x: Tensor) -> float:
    """Return the least variance, in the squared units of `x`: 0..255 for uint8, else [0, 1]."""
    n = max(x[:1].numel(), 1) if x.shape[0] else 1
    return 1.0 / n if x.dtype == torch.uint8 else 1.0 / (255.0**2 * n)


def _centre(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows of x - mean, (B, N), and 1 / max(std, floor) and variance of each, (B, 1)."""
    rows = image_rows(dense(x)).to(compute_dtype(x.dtype))
    rows = rows - rows.mean(1, keepdim=True)
    # The variance is clamped, not the standard deviation, whose derivative at 0 is infinite.
    variance, floor = rows.square().mean(1, keepdim=True), variance_floor(x)
    return rows, torch.rsqrt(variance.clamp_min(floor)), variance


def standardize_reference(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The formula in PyTorch: the CPU implementation, and the reference of the tests."""
    rows, scale, _ = _centre(x)
    return from_rows((rows * scale).to(dtype), x)


def standardize_backward_reference(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient in PyTorch code, which autograd can differentiate again."""
    rows, scale, variance = _centre(x)
    g = image_rows(dense(grad, x)).to(rows.dtype)
    z = rows * scale
    slope = torch.where(variance < variance_floor(x), 0, (g * z).mean(1, keepdim=True))
    return from_rows(((g - g.mean(1, keepdim=True) - z * slope) * scale).to(x.dtype), x)


@triton.jit
def _standardize_kernel(x, out, floor, N: tl.constexpr, BLOCK: tl.constexpr):
    # One program has one image, whose N values are contiguous in memory in either memory format;
    # their order does not matter. It reads them three times: mean, variance, result.
    base = tl.program_id(0).to(tl.int64) * N
    lane = tl.arange(0, BLOCK)
    # Every lane has a partial sum, and the lanes are added up once at the end. This has shorter
    # chains of roundings than one running sum, and one reduction over the threads instead of one
    # for each block.
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        offset = start + lane
        total += tl.load(x + base + offset, offset < N, other=0).to(tl.float32)
    mean = tl.sum(total, 0) / N
    # A second pass, not mean(x^2) - mean^2, which loses digits for an image of little contrast.
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        offset = start + lane
        centred = tl.load(x + base + offset, offset < N, other=0).to(tl.float32) - mean
        # Masked lanes hold 0 - mean, which must not be counted.
        squares += tl.where(offset < N, centred * centred, 0.0)
    variance = tl.sum(squares, 0) / N
    scale = tl.rsqrt(tl.maximum(variance, floor))
    for start in range(0, N, BLOCK):
        offset = start + lane
        z = (tl.load(x + base + offset, offset < N, other=0).to(tl.float32) - mean) * scale
        tl.store(out + base + offset, z.to(out.dtype.element_ty), offset < N)


@triton.jit
def _standardize_backward_kernel(grad, x, out, floor, N: tl.constexpr, BLOCK: tl.constexpr):
    # Mean and scale are computed again: saving them would give torch.compile two more tensors to
    # keep for the backward pass, and the image has to be read anyway.
    base = tl.program_id(0).to(tl.int64) * N
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    total_g = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        offset = start + lane
        total += tl.load(x + base + offset, offset < N, other=0).to(tl.float32)
        total_g += tl.load(grad + base + offset, offset < N, other=0).to(tl.float32)
    mean = tl.sum(total, 0) / N
    mean_g = tl.sum(total_g, 0) / N
    squares = tl.zeros([BLOCK], tl.float32)
    products = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        offset = start + lane
        centred = tl.load(x + base + offset, offset < N, other=0).to(tl.float32) - mean
        g = tl.load(grad + base + offset, offset < N, other=0).to(tl.float32)
        squares += tl.where(offset < N, centred * centred, 0.0)
        products += g * centred  # g is 0 in masked lanes
    variance = tl.sum(squares, 0) / N
    scale = tl.rsqrt(tl.maximum(variance, floor))
    # mean(g * z), or 0 if the scale comes from the floor and does not depend on x.
    slope = tl.where(variance < floor, 0.0, tl.sum(products, 0) / N * scale)
    for start in range(0, N, BLOCK):
        offset = start + lane
        z = (tl.load(x + base + offset, offset < N, other=0).to(tl.float32) - mean) * scale
        g = tl.load(grad + base + offset, offset < N, other=0).to(tl.float32)
        dx = (g - mean_g - z * slope) * scale
        tl.store(out + base + offset, dx.to(out.dtype.element_ty), offset < N)


def _tile(n: int) -> dict[str, int]:
    """Return the size of a program's blocks and its number of warps, for images of `n` values.

    N is a constant of the kernels. So the loops over an image that fits into one block, such as
    32x32x3, have one iteration, and the compiled kernel reads the image once.
    """
    block = min(max(power_of_two(n), 256), 4096)
    return {"BLOCK": block, "num_warps": 8 if block > 1024 else 4}


def _standardize_triton(x: Tensor, dtype: torch.dtype) -> Tensor:
    x = dense(x)
    out = empty_like(x, dtype)
    if x.numel():
        n = x.numel() // x.shape[0]
        with on_device_of(x):
            _standardize_kernel[(x.shape[0],)](
                x, out, variance_floor(x), N=n, enable_fp_fusion=True, **_tile(n)
            )
    return out


def _standardize_backward_triton(grad: Tensor, x: Tensor) -> Tensor:
    x = dense(x)
    out = empty_like(x)
    if x.numel():
        n = x.numel() // x.shape[0]
        with on_device_of(x):
            _standardize_backward_kernel[(x.shape[0],)](
                dense(grad, x),
                x,
                out,
                variance_floor(x),
                N=n,
                enable_fp_fusion=True,
                **_tile(n),
            )
    return out


_backward_op = register(
    "standardize_backward",
    _standardize_backward_triton,
    cpu=standardize_backward_reference,
    fake=lambda grad, x: empty_like(x),
    formula=standardize_backward_reference,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (x,) = ctx.saved_tensors
    # Gradient mode is enabled only under create_graph=True. Autograd then needs PyTorch code that
    # it can differentiate.
    backward = standardize_backward_reference if torch.is_grad_enabled() else _backward_op
    return backward(grad, x), None


_op = register(
    "standardize",
    _standardize_triton,
    cpu=standardize_reference,
    fake=lambda x, dtype: empty_like(x, dtype),
    formula=standardize_reference,
    backward=_backward,
    setup_context=_save,
)


def standardize(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return `x` with every image of the batch standardised to mean 0 and standard deviation 1.

    x: (B, ...), usually (B, C, H, W): floating-point pixels in [0, 1], or uint8 pixels in 0..255.
    dtype: dtype of the result; the default is the dtype of `x`, or float32 for uint8.

    The result has the memory format of `x`. The op is twice differentiable; for a constant image,
    output and gradient are finite. Raises `ValueError` or `TypeError` for other arguments.
    """
    if not isinstance(x, Tensor) or x.dtype != torch.uint8:
        check_floating("x", x)
    check_device("x", x)
    check_images("x", x)
    if dtype is None:
        dtype = torch.float32 if x.dtype == torch.uint8 else x.dtype
    if dtype not in FLOATS or (dtype == torch.float64 and x.is_cuda):
        raise TypeError(
            f"standardize does not return {dtype} on {x.device.type}: give dtype=torch.float32"
        )
    return _op(x, dtype)
