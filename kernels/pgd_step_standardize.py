"""What a PGD attack does between two passes of a network that standardises its input, in one go.

Per image, with x = image / 255 + delta and its standardisation z (see `standardize`):

    g <- gradient with respect to x, given `grad`, the gradient with respect to z
    x' <- clip(image / 255 + clip(delta + alpha * sign(g), -eps, eps), low, high)
    delta' <- x' - image / 255;  z' <- standardisation of image / 255 + delta'

(Madry et al. 2018, eq. 2.9.) The iterate is kept as an fp32 perturbation of uint8 pixels and is
never in half precision; only z is, where the network is. g is a positive number 1 / max(std, floor)
times another vector, and only the sign of that vector is taken. It holds the mean of `grad` over
the image, so one NaN there makes all of g NaN, and a NaN moves nothing: the image stays. An
infinite gradient gives the signs that IEEE arithmetic gives, NaN being none.
"""

# Kernel arguments are Triton values, for which there are no annotations.
# mypy: disable-error-code="no-untyped-def"

import math

import torch
from torch import Tensor

from ._common import (
    HALVES,
    check_clip,
    check_device,
    check_floating,
    check_images,
    check_like,
    check_radius,
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
from .pgd_step import clamp, sign

_LARGEST = 8192
"""Values of an image that one program can hold in registers; larger ones take several passes."""


def _standardize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Standardised rows in fp32, and whether the floor of the deviation holds there."""
    centred = rows - rows.mean(1, keepdim=True)
    deviation = centred.square().mean(1, keepdim=True).sqrt()
    floor = 1.0 / (255.0 * math.sqrt(max(rows.shape[1], 1)))
    return centred * (1.0 / deviation.clamp_min(floor)), deviation < floor


def pgd_step_standardize_reference(
    image: Tensor,
    delta: Tensor,
    grad: Tensor,
    eps: float,
    alpha: float,
    low: float,
    high: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The formulas in torch: the truth of the tests and the CPU path."""
    pixels = image_rows(dense(image)).to(torch.float32) / 255
    moved = image_rows(dense(delta, image)).clone()
    g = image_rows(dense(grad, image)).to(torch.float32)
    z, floored = _standardize_rows(pixels + moved)
    slope = torch.where(floored, 0, (g * z).mean(1, keepdim=True))
    g = g - g.mean(1, keepdim=True) - z.mul_(slope)
    moved.add_(torch.sign(g), alpha=alpha).clamp_(-eps, eps)
    moved = moved.add_(pixels).clamp_(low, high).sub_(pixels)
    z, _ = _standardize_rows(pixels + moved)
    return from_rows(moved, image), from_rows(z.to(dtype), image)


@triton.jit
def _standardize_block(x, mask, n, floor):
    centred = tl.where(mask, x - tl.sum(tl.where(mask, x, 0.0), 0) / n, 0.0)
    deviation = tl.sqrt_rn(tl.sum(centred * centred, 0) / n)
    return centred * tl.div_rn(1.0, tl.maximum(deviation, floor)), deviation < floor


@triton.jit
def _pgd_step_standardize_kernel(
    image,
    delta,
    grad,
    new_delta,
    new_z,
    n,
    floor,
    eps,
    alpha,
    low,
    high,
    BLOCK: tl.constexpr,
):
    lane = tl.arange(0, BLOCK)
    mask = lane < n
    offset = tl.program_id(0).to(tl.int64) * n + lane
    # Correctly rounded, as torch divides on the CPU: a multiplication by 1 / 255 is not.
    pixels = tl.div_rn(tl.load(image + offset, mask, other=0).to(tl.float32), 255.0)
    d = tl.load(delta + offset, mask, other=0)
    g = tl.load(grad + offset, mask, other=0).to(tl.float32)
    z, floored = _standardize_block(pixels + d, mask, n, floor)
    slope = tl.where(floored, 0.0, tl.sum(g * z, 0) / n)
    g = g - tl.sum(g, 0) / n - z * slope
    moved = pixels + clamp(d + alpha * sign(g), -eps, eps)
    d = clamp(moved, low, high) - pixels
    z, floored = _standardize_block(pixels + d, mask, n, floor)
    tl.store(new_delta + offset, d, mask)
    tl.store(new_z + offset, z.to(new_z.dtype.element_ty), mask)


def _pgd_step_standardize_triton(
    image: Tensor,
    delta: Tensor,
    grad: Tensor,
    eps: float,
    alpha: float,
    low: float,
    high: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    if math.prod(image.shape[1:]) > _LARGEST:
        return pgd_step_standardize_reference(image, delta, grad, eps, alpha, low, high, dtype)
    image = dense(image)
    new_delta, new_z = empty_like(image, torch.float32), empty_like(image, dtype)
    if image.numel():
        n = image.numel() // image.shape[0]
        block = max(power_of_two(n), 256)
        with on_device_of(image):
            _pgd_step_standardize_kernel[(image.shape[0],)](
                image, dense(delta, image), dense(grad, image), new_delta, new_z,
                n, 1.0 / (255.0 * math.sqrt(n)), eps, alpha, low, high,
                BLOCK=block, num_warps=min(max(block // 512, 4), 16), enable_fp_fusion=False,
            )  # fmt: skip
    return new_delta, new_z


_op = register(
    "pgd_step_standardize",
    _pgd_step_standardize_triton,
    cpu=pgd_step_standardize_reference,
    fake=lambda image, *rest: (empty_like(image, torch.float32), empty_like(image, rest[-1])),
)


def pgd_step_standardize(
    image: Tensor,
    delta: Tensor,
    grad: Tensor,
    eps: float,
    alpha: float,
    clip: tuple[float, float] = (0.0, 1.0),
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the next perturbation and the standardised network input that belongs to it.

    `image` is (B, ...) uint8, (B, C, H, W) as a rule, in 0..255; `delta` is the float32
    perturbation in units of [0, 1] pixels, so that the attacked image is image / 255 + delta, and
    `grad` the gradient of the loss with respect to that image's standardisation, fp32, fp16 or
    bf16. `eps`, `alpha` and `clip` are numbers in [0, 1] pixels. Both results are shaped and laid
    out as `image` (give it channels-last); the first is float32 and the second `dtype`, that of
    `grad` unless given. No gradient flows through. Start with `delta` from `random_start` or
    zeros and with `standardize(image / 255 + delta)`. Images of more than 8192 values, which do
    not fit the registers of one program, take torch's ops in several passes.

    Raises `ValueError` or `TypeError` for wrong arguments.
    """
    if not isinstance(image, Tensor) or image.dtype != torch.uint8:
        raise TypeError(f"image must be a uint8 tensor, not {getattr(image, 'dtype', image)}")
    check_device("image", image)
    check_images("image", image)
    check_like("delta", delta, "image", image)
    check_like("grad", grad, "image", image)
    check_floating("grad", grad)
    if delta.dtype != torch.float32:
        raise TypeError(f"delta must be float32, not {delta.dtype}")
    dtype = grad.dtype if dtype is None else dtype
    if grad.dtype == torch.float64 or dtype not in (torch.float32, *HALVES):
        raise TypeError(f"grad and dtype must be float32, float16 or bfloat16, not {dtype}")
    sizes = check_radius("eps", eps), check_radius("alpha", alpha), *check_clip(clip)
    with torch.no_grad():
        return _op(image, delta, grad, *sizes, dtype)
