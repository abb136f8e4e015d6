"""The L-infinity PGD step: sign step, projection onto the ball, clamp to the pixel range.

    x_adv <- clip(x_adv + alpha * sign(grad), max(x - eps, low), min(x + eps, high))

(Madry et al. 2018, eq. 2.9; section 4.1 of the IAT paper.) sign(NaN) is 0: a NaN gradient moves
nothing, so that its pixel is only projected; an infinite one takes its sign. A NaN pixel stays
NaN. fp16 and bf16 are calculated in fp32 and rounded once; but their spacing in [0.5, 1) is 1/2048
and 1/256, the size of a usual alpha, so keep iterates in fp32.
"""

# Kernel arguments are Triton values, for which there are no annotations.
# mypy: disable-error-code="no-untyped-def"

import torch
from torch import Tensor

from ._common import (
    blocks,
    check_clip,
    check_floating,
    check_like,
    check_radius,
    check_writable,
    compute_dtype,
    dense,
    empty_like,
    on_device_of,
    register,
    tl,
    triton,
)

_BLOCK = 1024


def pgd_step_reference(
    x_adv: Tensor, grad: Tensor, x: Tensor, eps: float, alpha: float, low: float, high: float
) -> Tensor:
    """The formula in torch: the truth of the tests and the CPU path."""
    x_adv = dense(x_adv)
    out = empty_like(x_adv, compute_dtype(x.dtype))
    _step_into(out, x_adv.to(out.dtype), grad, x.to(out.dtype), eps, alpha, low, high)
    return out.to(x.dtype)


def _pgd_step_inplace_reference(
    x_adv: Tensor, grad: Tensor, x: Tensor, eps: float, alpha: float, low: float, high: float
) -> None:
    check_writable("x_adv", x_adv, grad=grad, x=x)
    if x_adv.dtype == compute_dtype(x_adv.dtype):
        _step_into(x_adv, x_adv, grad, x, eps, alpha, low, high)
    else:
        x_adv.copy_(pgd_step_reference(x_adv, grad, x, eps, alpha, low, high))


def _step_into(
    out: Tensor,
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    eps: float,
    alpha: float,
    low: float,
    high: float,
) -> None:
    # One temporary in all: at image sizes the CPU spends longer on fresh pages than on arithmetic.
    bound = torch.sign(grad).to(out.dtype)
    torch.add(x_adv, bound, alpha=alpha, out=out)
    torch.maximum(out, torch.sub(x, eps, out=bound), out=out)
    torch.minimum(out, torch.add(x, eps, out=bound), out=out)
    out.clamp_(low, high)


@triton.jit
def sign(x):
    """-1, 0 or 1 in fp32; 0 for NaN."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def clamp(x, low, high):
    """`x` in [low, high]; NaN stays NaN, as in torch."""
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _pgd_step_kernel(x_adv, grad, x, out, n, eps, alpha, low, high, BLOCK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < n
    g = tl.load(grad + offset, mask, other=0).to(tl.float32)
    start = tl.load(x + offset, mask, other=0).to(tl.float32)
    y = tl.load(x_adv + offset, mask, other=0).to(tl.float32) + alpha * sign(g)
    y = clamp(clamp(y, start - eps, start + eps), low, high)
    tl.store(out + offset, y.to(out.dtype.element_ty), mask)


def _launch(x_adv: Tensor, grad: Tensor, x: Tensor, out: Tensor, *sizes: float) -> None:
    n = x_adv.numel()
    if n == 0:
        return
    with on_device_of(x_adv):
        _pgd_step_kernel[(blocks(n, _BLOCK),)](
            x_adv, grad, x, out, n, *sizes, BLOCK=_BLOCK, enable_fp_fusion=False
        )


def _pgd_step_triton(
    x_adv: Tensor, grad: Tensor, x: Tensor, eps: float, alpha: float, low: float, high: float
) -> Tensor:
    x_adv = dense(x_adv)
    out = empty_like(x_adv)
    _launch(x_adv, dense(grad, x_adv), dense(x, x_adv), out, eps, alpha, low, high)
    return out


def _pgd_step_inplace_triton(
    x_adv: Tensor, grad: Tensor, x: Tensor, eps: float, alpha: float, low: float, high: float
) -> None:
    check_writable("x_adv", x_adv, grad=grad, x=x)
    out = dense(x_adv)
    _launch(out, dense(grad, out), dense(x, out), out, eps, alpha, low, high)
    if out is not x_adv:
        x_adv.copy_(out)


_op = register(
    "pgd_step",
    _pgd_step_triton,
    cpu=pgd_step_reference,
    fake=lambda x_adv, *_: empty_like(x_adv),
)
_inplace_op = register(
    "pgd_step_",
    _pgd_step_inplace_triton,
    cpu=_pgd_step_inplace_reference,
    fake=lambda *_: None,
    mutates=("x_adv",),
)


def check_step(
    x_adv: Tensor, grad: Tensor, x: Tensor, eps: float, alpha: float, clip: tuple[float, float]
) -> tuple[float, float, float, float]:
    """Refuse bad arguments of a PGD step; return (eps, alpha, low, high) as floats."""
    check_floating("x", x)
    check_floating("grad", grad)
    check_like("x_adv", x_adv, "x", x)
    check_like("grad", grad, "x", x)
    if x_adv.dtype != x.dtype:
        raise TypeError(f"x_adv is {x_adv.dtype}, but x is {x.dtype}")
    return check_radius("eps", eps), check_radius("alpha", alpha), *check_clip(clip)


def pgd_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    eps: float,
    alpha: float,
    clip: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Return the next iterate of L-infinity PGD.

    `x_adv`, `grad` and `x` share one shape, any, and one device; `x_adv` and `x` one dtype. `eps`,
    `alpha` and `clip` are numbers in the units of `x`. The result has the dtype and the memory
    format of `x_adv` and carries no gradient; inside of torch.func and forward-mode AD a
    `RuntimeError` asks for `x.detach()`. Raises `ValueError` or `TypeError` for anything else,
    among it an `eps` or `alpha` that is negative or NaN.
    """
    sizes = check_step(x_adv, grad, x, eps, alpha, clip)
    return _op(x_adv, grad, x, *sizes)


def pgd_step_(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    eps: float,
    alpha: float,
    clip: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """`pgd_step`, writing into `x_adv` and returning it.

    `x_adv` may be strided, but a `ValueError` refuses one that is expanded, overlaps itself or
    shares memory with `grad` or `x`.
    """
    sizes = check_step(x_adv, grad, x, eps, alpha, clip)
    _inplace_op(x_adv, grad, x, *sizes)
    return x_adv
