"""The L-infinity PGD step: sign step, projection onto the ball, clamp to the pixel range.

    x_adv <- clip(x_adv + alpha * sign(grad), max(x - eps, low), min(x + eps, high))

(Madry et al. 2018, eq. 2.9; section 4.1 of the IAT paper.) sign(NaN) is 0: a pixel whose
gradient is NaN is projected but not moved. An infinite gradient counts by its sign. A NaN pixel
stays NaN. fp16 and bf16 are computed in fp32 and rounded once. Keep iterates in fp32 nevertheless:
in [0.5, 1) neighbouring fp16 and bf16 numbers differ by 1/2048 and 1/256, which is the size of a
usual alpha.

eps, alpha, low and high may differ between channels, as they do for normalised images: a box of
pixels is not a cube after the division by a standard deviation for each channel.
"""

# Kernel arguments are Triton values, for which there are no annotations.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
from torch import Tensor

from ._common import (
    blocks,
    check_writable,
    compute_dtype,
    dense,
    empty_like,
    on_device_of,
    register,
    tl,
    triton,
)
from ._step_sizes import (
    Size,
    channel_layout,
    check_step,
    kind,
    over_channels,
    step_schema,
)

# Values of one Triton program. The step does almost no arithmetic, so memory bandwidth limits its
# speed: 1024 values are 8 for each of 128 threads, which load 16 bytes at a time.
_BLOCK = 1024


def pgd_step_reference(
    x_adv: Tensor, grad: Tensor, x: Tensor, eps: Any, alpha: Any, low: Any, high: Any
) -> Tensor:
    """The formula in PyTorch: the CPU implementation, and the reference of the tests."""
    x_adv = dense(x_adv)
    out = empty_like(x_adv, compute_dtype(x.dtype))
    _step_into(out, x_adv.to(out.dtype), grad, x.to(out.dtype), eps, alpha, low, high)
    return out.to(x.dtype)


def _pgd_step_inplace_reference(
    x_adv: Tensor, grad: Tensor, x: Tensor, eps: Any, alpha: Any, low: Any, high: Any
) -> None:
    check_writable("x_adv", x_adv, grad=grad, x=x)
    if x_adv.dtype == compute_dtype(x_adv.dtype):
        # `out` may be `x_adv`: the step reads each value of `x_adv` before it writes the value.
        _step_into(x_adv, x_adv, grad, x, eps, alpha, low, high)
    else:
        x_adv.copy_(pgd_step_reference(x_adv, grad, x, eps, alpha, low, high))


def _step_into(
    out: Tensor,
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    eps: Any,
    alpha: Any,
    low: Any,
    high: Any,
) -> None:
    # `bound` is the only temporary: the CPU spends more time on the page faults of new memory than
    # on the arithmetic.
    bound = torch.sign(grad).to(out.dtype)
    if isinstance(alpha, Tensor):
        eps, alpha, low, high = over_channels(eps, alpha, low, high, x)
        torch.addcmul(x_adv, bound, alpha, out=out)
    else:
        torch.add(x_adv, bound, alpha=alpha, out=out)
    torch.maximum(out, torch.sub(x, eps, out=bound), out=out)
    torch.minimum(out, torch.add(x, eps, out=bound), out=out)
    out.clamp_(low, high)


@triton.jit
def sign(x):
    """Return the sign of `x`: -1, 0 or 1 in fp32; 0 for NaN."""
    # Both comparisons are false for NaN.
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def clamp(x, low, high):
    """Return `x` clamped to [low, high]; NaN stays NaN, as in PyTorch."""
    # By default Triton's maximum and minimum return the operand that is not NaN.
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _pgd_step_kernel(
    x_adv,
    grad,
    x,
    out,
    n,
    eps,
    alpha,
    low,
    high,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # The tensors are dense and have the same memory format, so they are read as flat arrays of any
    # shape. The offset is int64, because a batch may have more than 2^31 values.
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offset = first + tl.arange(0, BLOCK)
    mask = offset < n
    if CHANNELS:  # else the sizes are numbers
        # Counted from the image that `first` is in: a division of int32 is much faster.
        inside = (first % (CHANNELS * INNER)).to(tl.int32) + tl.arange(0, BLOCK)
        channel = inside // INNER % CHANNELS
        eps, alpha = tl.load(eps + channel), tl.load(alpha + channel)
        low, high = tl.load(low + channel), tl.load(high + channel)
    g = tl.load(grad + offset, mask, other=0).to(tl.float32)
    start = tl.load(x + offset, mask, other=0).to(tl.float32)
    y = tl.load(x_adv + offset, mask, other=0).to(tl.float32) + alpha * sign(g)
    # The clamp to the pixel range is last, as in the reference.
    y = clamp(clamp(y, start - eps, start + eps), low, high)
    tl.store(out + offset, y.to(out.dtype.element_ty), mask)


def _launch(x_adv: Tensor, grad: Tensor, x: Tensor, out: Tensor, *sizes: Any) -> None:
    n = x_adv.numel()
    if n == 0:
        return
    with on_device_of(x_adv):
        # Without fusion the result equals the reference bit for bit: an FMA for
        # x_adv + alpha * sign would round once, while PyTorch rounds twice.
        _pgd_step_kernel[(blocks(n, _BLOCK),)](
            x_adv, grad, x, out, n, *sizes, **channel_layout(x_adv, sizes[0]), BLOCK=_BLOCK,
            enable_fp_fusion=False,
        )  # fmt: skip


def _pgd_step_triton(
    x_adv: Tensor, grad: Tensor, x: Tensor, eps: Any, alpha: Any, low: Any, high: Any
) -> Tensor:
    x_adv = dense(x_adv)
    out = empty_like(x_adv)
    _launch(x_adv, dense(grad, x_adv), dense(x, x_adv), out, eps, alpha, low, high)
    return out


def _pgd_step_inplace_triton(
    x_adv: Tensor, grad: Tensor, x: Tensor, eps: Any, alpha: Any, low: Any, high: Any
) -> None:
    check_writable("x_adv", x_adv, grad=grad, x=x)
    out = dense(x_adv)
    _launch(out, dense(grad, out), dense(x, out), out, eps, alpha, low, high)
    if out is not x_adv:  # `x_adv` is not dense: the step was written into a dense copy
        x_adv.copy_(out)


_OPS = {
    size: register(
        name,
        _pgd_step_triton,
        cpu=pgd_step_reference,
        fake=lambda x_adv, *_: empty_like(x_adv),
        schema=step_schema(size),
    )
    for size, name in (("float", "pgd_step"), ("Tensor", "pgd_step_channels"))
}
_INPLACE_OPS = {
    size: register(
        name,
        _pgd_step_inplace_triton,
        cpu=_pgd_step_inplace_reference,
        fake=lambda *_: None,
        mutates=("x_adv",),
        schema=step_schema(size, in_place=True),
    )
    for size, name in (("float", "pgd_step_"), ("Tensor", "pgd_step_channels_"))
}


def pgd_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    eps: Size,
    alpha: Size,
    clip: tuple[Size, Size] = (0.0, 1.0),
) -> Tensor:
    """Return the next iterate of L-infinity PGD.

    x_adv, grad, x: the iterate, the gradient and the original batch, of the same shape (any shape)
        and on one device; `x_adv` and `x` have the same dtype.
    eps, alpha, clip: radius of the ball, length of the step and pixel range, in the units of `x`.
        Each of the four numbers may instead be a floating-point tensor with a number for each
        channel of `x`, (B, C, ...): of shape (C,), (C, 1, 1) or (1, C, 1, 1), on the device of `x`.

    The result has the dtype and the memory format of `x_adv`. The op has no derivative: if
    torch.func or forward-mode AD differentiates an argument, a `RuntimeError` asks for
    `x.detach()`. Raises `ValueError` or `TypeError` for other arguments, such as a negative or NaN
    `eps` or `alpha`. The values of a tensor are checked on the CPU only: reading them would
    synchronize with the GPU.

    Images that are normalised by a mean and a standard deviation for each channel (the loop of
    Wong et al. 2020):

        eps, alpha = 8 / 255 / std, 2 / 255 / std
        x_adv = pgd_step(x_adv, grad, x, eps, alpha, ((0 - mean) / std, (1 - mean) / std))
    """
    sizes = check_step(x_adv, grad, x, eps, alpha, clip)
    return _OPS[kind(sizes)](x_adv, grad, x, *sizes)


def pgd_step_(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    eps: Size,
    alpha: Size,
    clip: tuple[Size, Size] = (0.0, 1.0),
) -> Tensor:
    """Write the result of `pgd_step` into `x_adv` and return `x_adv`.

    Arguments and errors are those of `pgd_step`. `x_adv` may have any strides, but raises
    `ValueError` if it is expanded, overlaps itself or shares memory with `grad` or `x`.
    """
    sizes = check_step(x_adv, grad, x, eps, alpha, clip)
    _INPLACE_OPS[kind(sizes)](x_adv, grad, x, *sizes)
    return x_adv
