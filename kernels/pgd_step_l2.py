"""The L2 PGD step, with the norms taken over each image:

    d  <- x_adv + alpha * grad / ||grad||_2 - x
    x_adv <- clip(x + d * min(1, eps / ||d||_2), low, high)

(Madry et al. 2018, section 2, with the step of Rony et al. 2019.) The gradient is divided by its
largest magnitude first, so that its norm neither overflows nor underflows. A NaN in a gradient
counts as zero. If some values of a gradient are infinite, the image moves along the signs of these
values alone, which is the limit for growing values. An image whose gradient is zero does not move.
fp16 and bf16 are computed in fp32 and rounded once.

eps and alpha may differ between channels, as they do for normalised images: the L2 ball of pixels
becomes an ellipsoid with the radius eps_c along channel c, and the gradient of the pixels is that
of the normalised images times alpha_c, except for a common factor. With a step for each channel,

    d  <- x_adv + alpha * alpha * grad / ||alpha * grad||_2 - x
    x_adv <- clip(x + d * min(1, 1 / ||d / eps||_2), low, high)

which are the same formulas if all channels have one eps and one alpha. A channel whose eps is 0
keeps the values of x, and does not count in the norm of d.
"""

# Kernel arguments are Triton values, for which there are no annotations.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
from torch import Tensor

from ._common import (
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
from ._step_sizes import (
    Size,
    channel_layout,
    check_step,
    kind,
    over_channels,
    step_schema,
)
from .pgd_step import clamp, sign


def pgd_step_l2_reference(
    x_adv: Tensor, grad: Tensor, x: Tensor, eps: Any, alpha: Any, low: Any, high: Any
) -> Tensor:
    """The formulas in PyTorch: the CPU implementation, and the reference of the tests."""
    if x_adv.numel() == 0:
        return empty_like(x_adv)
    if isinstance(eps, Tensor):
        # Sizes for each value of an image, in the order of `image_rows`.
        sizes = over_channels(eps, alpha, low, high, x)
        shape = (1, *x.shape[1:])
        eps, alpha, low, high = (image_rows(dense(size.expand(shape), x_adv)) for size in sizes)
    wide = compute_dtype(x.dtype)
    start = image_rows(dense(x, x_adv)).to(wide)
    g = image_rows(dense(grad, x_adv)).to(wide)
    g = torch.nan_to_num(g, nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    largest = g.abs().amax(1, keepdim=True)
    # The branch costs no synchronization on the CPU, and most batches have no infinite gradient.
    if bool(largest.isinf().any()):
        g = torch.where(largest.isinf(), torch.sign(g) * g.isinf(), g)
        largest.nan_to_num_(posinf=1.0)
    g = g / torch.where(largest > 0, largest, 1)
    if isinstance(eps, Tensor):
        norm = g.mul_(alpha).square().sum(1, keepdim=True).sqrt_()
        norm = torch.where(norm > 0, norm, 1)
    else:
        # The largest magnitude is 1 now, so the norm is at least 1, or 0 for a zero gradient.
        norm = g.square().sum(1, keepdim=True).sqrt_().clamp_(min=1)
    d = g.mul_(alpha / norm).add_(image_rows(dense(x_adv))).sub_(start)
    relative = d
    if isinstance(eps, Tensor):
        d = torch.where(eps > 0, d, 0)
        relative, eps = d / torch.where(eps > 0, eps, 1), 1.0
    length = relative.square().sum(1, keepdim=True).sqrt_()
    d = torch.where(length > eps, d * (eps / length), d)
    return from_rows(d.add_(start).clamp_(low, high).to(x.dtype), x_adv)


@triton.jit
def _direction(g, largest):
    """Return `g / largest`; 0 for NaN. If `largest` is infinite: the signs of infinite values."""
    infinite = largest == float("inf")
    # 1 / largest would overflow for a denormal number, so `g` and `largest` are multiplied by 2^64
    # then, which is exact. The reciprocal costs one division for the image instead of one for each
    # value.
    up = tl.where(largest < 1e-20, 18446744073709551616.0, 1.0)
    inverse = tl.div_rn(1.0, tl.where(largest == 0, 1.0, largest * up))
    signs = tl.where(tl.abs(g) == largest, sign(g), 0.0)
    return tl.where(infinite, signs, tl.where(g == g, g * up * inverse, 0.0))


@triton.jit
def _of_channel(size, offset, CHANNELS: tl.constexpr, INNER: tl.constexpr):
    """Return `size`; if it has a number for each channel, the numbers of the values at `offset`."""
    if CHANNELS:
        return tl.load(size + offset // INNER % CHANNELS)
    else:
        return size


@triton.jit
def _displacement(g, y, start, step, eps, alpha, CHANNELS: tl.constexpr):
    """Return x_adv + step - x, before the projection, for the direction `g` of the gradient."""
    if CHANNELS:
        return tl.where(eps > 0, g * alpha * (alpha * step) + y - start, 0.0)
    else:
        return g * step + y - start


@triton.jit
def _pgd_step_l2_kernel(
    x_adv,
    grad,
    x,
    out,
    eps,
    alpha,
    low,
    high,
    N: tl.constexpr,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program has one image, whose N values are contiguous in memory. It reads them four times,
    # in blocks: largest magnitude, norm of the gradient, length of d, result. Reading again is
    # cheaper than writing intermediate results: a whole image fits into the cache.
    base = tl.program_id(0).to(tl.int64) * N
    lane = tl.arange(0, BLOCK)
    tops = tl.zeros([BLOCK], tl.float32)
    for first in range(0, N, BLOCK):
        offset = first + lane
        g = tl.load(grad + base + offset, offset < N, other=0).to(tl.float32)
        tops = tl.maximum(tops, tl.where(g == g, tl.abs(g), 0.0))
    largest = tl.max(tops, 0)
    # Every lane has a partial sum in fp32, and the lanes are added up once at the end. This has
    # shorter chains of roundings than one running sum, and one reduction over the threads instead
    # of one for each block.
    squares = tl.zeros([BLOCK], tl.float32)
    for first in range(0, N, BLOCK):
        offset = first + lane
        g = tl.load(grad + base + offset, offset < N, other=0).to(tl.float32)
        g = _direction(g, largest)
        if CHANNELS:
            g *= _of_channel(alpha, offset, CHANNELS, INNER)
        squares += g * g
    # The largest magnitude is 1 now, so only a zero gradient has a norm under 0.5. div_rn and
    # sqrt_rn round as torch does; Triton's `/` and sqrt are approximate.
    norm = tl.sqrt_rn(tl.sum(squares, 0))
    if CHANNELS:
        step = tl.div_rn(1.0, tl.where(norm > 0, norm, 1.0))
    else:
        step = tl.div_rn(alpha, tl.maximum(norm, 0.5))
    squares = tl.zeros([BLOCK], tl.float32)
    for first in range(0, N, BLOCK):
        offset = first + lane
        mask = offset < N
        g = tl.load(grad + base + offset, mask, other=0).to(tl.float32)
        y = tl.load(x_adv + base + offset, mask, other=0).to(tl.float32)
        start = tl.load(x + base + offset, mask, other=0).to(tl.float32)
        # Masked lanes load zeros, which add nothing.
        radius = _of_channel(eps, offset, CHANNELS, INNER)
        a = _of_channel(alpha, offset, CHANNELS, INNER)
        d = _displacement(_direction(g, largest), y, start, step, radius, a, CHANNELS)
        if CHANNELS:
            d = tl.div_rn(d, tl.where(radius > 0, radius, 1.0))
        squares += d * d
    length = tl.sqrt_rn(tl.sum(squares, 0))
    limit = 1.0 if CHANNELS else eps
    outside = length > limit
    shrink = tl.where(outside, tl.div_rn(limit, tl.where(outside, length, 1.0)), 1.0)
    for first in range(0, N, BLOCK):
        offset = first + lane
        mask = offset < N
        g = tl.load(grad + base + offset, mask, other=0).to(tl.float32)
        y = tl.load(x_adv + base + offset, mask, other=0).to(tl.float32)
        start = tl.load(x + base + offset, mask, other=0).to(tl.float32)
        # d is computed again, because the registers hold one block, not the image.
        radius = _of_channel(eps, offset, CHANNELS, INNER)
        a = _of_channel(alpha, offset, CHANNELS, INNER)
        d = _displacement(_direction(g, largest), y, start, step, radius, a, CHANNELS) * shrink
        bottom = _of_channel(low, offset, CHANNELS, INNER)
        top = _of_channel(high, offset, CHANNELS, INNER)
        y = clamp(start + d, bottom, top)
        tl.store(out + base + offset, y.to(out.dtype.element_ty), mask)


def _pgd_step_l2_triton(
    x_adv: Tensor, grad: Tensor, x: Tensor, eps: Any, alpha: Any, low: Any, high: Any
) -> Tensor:
    x_adv = dense(x_adv)
    out = empty_like(x_adv)
    if x_adv.numel():
        n = x_adv.numel() // x_adv.shape[0]
        # Triton's blocks are powers of two; blocks above 4096 would need too many registers.
        block = min(max(power_of_two(n), 256), 4096)
        with on_device_of(x_adv):
            _pgd_step_l2_kernel[(x_adv.shape[0],)](
                x_adv, dense(grad, x_adv), dense(x, x_adv), out, eps, alpha, low, high,
                N=n, **channel_layout(x_adv, eps), BLOCK=block,
                num_warps=8 if block > 1024 else 4, enable_fp_fusion=False,
            )  # fmt: skip
    return out


_OPS = {
    size: register(
        name,
        _pgd_step_l2_triton,
        cpu=pgd_step_l2_reference,
        fake=lambda x_adv, *_: empty_like(x_adv),
        schema=step_schema(size),
    )
    for size, name in (("float", "pgd_step_l2"), ("Tensor", "pgd_step_l2_channels"))
}


def pgd_step_l2(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    eps: Size,
    alpha: Size,
    clip: tuple[Size, Size] = (0.0, 1.0),
) -> Tensor:
    """Return the next iterate of L2 PGD, computed for each image of the batch separately.

    x_adv, grad, x: the iterate, the gradient and the original batch, of the same shape, (B, ...),
        and on one device; `x_adv` and `x` have the same dtype.
    eps, alpha: radius of the ball and length of the step, L2 lengths in the units of `x`.
    clip: pixel range, in the same units.

    Each of the four numbers may be a tensor with a number for each channel, as in `pgd_step`. With
    the radius and the length divided by the standard deviation of each channel, the step is that of
    the pixels from which `x` was normalised.

    The result has the dtype and the memory format of `x_adv`. The op has no derivative: if
    torch.func or forward-mode AD differentiates an argument, a `RuntimeError` asks for
    `x.detach()`. Raises `ValueError` or `TypeError` for other arguments, such as a negative or NaN
    `eps` or `alpha`.
    """
    sizes = check_step(x_adv, grad, x, eps, alpha, clip)
    check_images("x", x)
    return _OPS[kind(sizes)](x_adv, grad, x, *sizes)
