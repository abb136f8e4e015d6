"""Per-image standardisation: z = (x - mean) / max(std, 1 / (255 sqrt(N))) over an image's N values.

The formula of `tf.image.per_image_standardization`, which Madry et al.'s CIFAR-10 challenge uses
on pixels in 0..255 with the floor 1/sqrt(N); on pixels in [0, 1] the floor is 255 times smaller.
std is the population standard deviation. The floor makes a constant image map to zeros. With
r = 1 / max(std, floor), the gradient is

    dx = r * (g - mean(g) - z * mean(g * z))    without the last term where the floor holds

All arithmetic is in fp32 (fp64 for fp64), whatever the storage and under autocast too.
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
    """The least variance, in the squared units of `x`: 0..255 for uint8, else [0, 1]."""
    n = max(x[:1].numel(), 1) if x.shape[0] else 1
    return 1.0 / n if x.dtype == torch.uint8 else 1.0 / (255.0**2 * n)


def _centre(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of x - mean, their 1 / max(std, floor), and their variance."""
    rows = image_rows(dense(x)).to(compute_dtype(x.dtype))
    rows = rows - rows.mean(1, keepdim=True)
    # Clamping the variance, not its root, keeps the derivative finite at a constant image.
    variance, floor = rows.square().mean(1, keepdim=True), variance_floor(x)
    return rows, torch.rsqrt(variance.clamp_min(floor)), variance


def standardize_reference(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The formula in torch: the truth of the tests and the CPU path."""
    rows, scale, _ = _centre(x)
    return from_rows((rows * scale).to(dtype), x)


def standardize_backward_reference(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient in torch, itself differentiable."""
    rows, scale, variance = _centre(x)
    g = image_rows(dense(grad, x)).to(rows.dtype)
    z = rows * scale
    slope = torch.where(variance < variance_floor(x), 0, (g * z).mean(1, keepdim=True))
    return from_rows(((g - g.mean(1, keepdim=True) - z * slope) * scale).to(x.dtype), x)


@triton.jit
def _standardize_kernel(x, out, floor, N: tl.constexpr, BLOCK: tl.constexpr):
    base = tl.program_id(0).to(tl.int64) * N
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        offset = start + lane
        total += tl.load(x + base + offset, offset < N, other=0).to(tl.float32)
    mean = tl.sum(total, 0) / N
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        offset = start + lane
        centred = tl.load(x + base + offset, offset < N, other=0).to(tl.float32) - mean
        squares += tl.where(offset < N, centred * centred, 0.0)
    variance = tl.sum(squares, 0) / N
    scale = tl.rsqrt(tl.maximum(variance, floor))
    for start in range(0, N, BLOCK):
        offset = start + lane
        z = (tl.load(x + base + offset, offset < N, other=0).to(tl.float32) - mean) * scale
        tl.store(out + base + offset, z.to(out.dtype.element_ty), offset < N)


@triton.jit
def _standardize_backward_kernel(grad, x, out, floor, N: tl.constexpr, BLOCK: tl.constexpr):
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
        products += g * centred
    variance = tl.sum(squares, 0) / N
    scale = tl.rsqrt(tl.maximum(variance, floor))
    slope = tl.where(variance < floor, 0.0, tl.sum(products, 0) / N * scale)
    for start in range(0, N, BLOCK):
        offset = start + lane
        z = (tl.load(x + base + offset, offset < N, other=0).to(tl.float32) - mean) * scale
        g = tl.load(grad + base + offset, offset < N, other=0).to(tl.float32)
        dx = (g - mean_g - z * slope) * scale
        tl.store(out + base + offset, dx.to(out.dtype.element_ty), offset < N)


def _tile(n: int) -> dict[str, int]:
    # The size of an image is a constant, so that one of a single block is read only once.
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
    # Gradient mode is on only under create_graph=True: torch differentiates the formula then.
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
    """Standardise every image of a batch by itself.

    `x` is (B, ...), (B, C, H, W) as a rule, floating point with pixels in [0, 1] or uint8 in
    0..255. The result has the memory format of `x` and `dtype`: that of `x`, or float32 for uint8,
    unless given. Differentiable, also twice, and at a constant image, where the output and the
    gradient stay finite. Raises `ValueError` or `TypeError` for anything else.
    """
    if not isinstance(x, Tensor) or x.dtype != torch.uint8:
        check_floating("x", x)
    check_device("x", x)
    check_images("x", x)
    if dtype is None:
        dtype = torch.float32 if x.dtype == torch.uint8 else x.dtype
    if dtype not in FLOATS or (dtype == torch.float64 and x.is_cuda):
        raise TypeError(f"standardize does not return {dtype} on {x.device.type}")
    return _op(x, dtype)
