"""The sizes of a PGD step, eps, alpha, low and high: four numbers, or a number for each channel."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._common import (
    check_clip,
    check_floating,
    check_like,
    check_radius,
    check_same_device,
    compute_dtype,
    layout,
)

Size = float | Tensor
"""A number, or a tensor with a number for each channel."""


class Sizes(NamedTuple):
    """The sizes of a step: four floats, or four (C,) tensors of the dtype that it computes in."""

    eps: Size
    alpha: Size
    low: Size
    high: Size


def check_step(
    x_adv: Tensor, grad: Tensor, x: Tensor, eps: Size, alpha: Size, clip: tuple[Size, Size]
) -> Sizes:
    """Raise for wrong arguments of a PGD step; return its sizes, all tensors if one is a tensor."""
    check_floating("x", x)
    check_floating("grad", grad)
    check_like("x_adv", x_adv, "x", x)
    check_like("grad", grad, "x", x)
    if x_adv.dtype != x.dtype:
        raise TypeError(f"x_adv is {x_adv.dtype}, but x is {x.dtype}")
    if not _differs(eps):
        eps = check_radius("eps", eps)
    if not _differs(alpha):
        alpha = check_radius("alpha", alpha)
    pair = isinstance(clip, (tuple, list)) and len(clip) == 2
    low, high = clip if pair and any(map(_differs, clip)) else check_clip(clip)  # type: ignore[arg-type]
    sizes = Sizes(eps, alpha, low, high)
    if not any(map(_differs, sizes)):
        return sizes
    names = ("eps", "alpha", "the low end of clip", "the high end of clip")
    return Sizes(*(_for_channels(*named, x) for named in zip(names, sizes, strict=True)))


def _differs(size: Size) -> bool:
    """Return whether `size` has a number for each channel; a 0-d tensor is a number."""
    return isinstance(size, Tensor) and size.dim() > 0


def _for_channels(name: str, size: Size, x: Tensor) -> Tensor:
    """Return `size` as a (C,) tensor for `x`, (B, C, ...), in the dtype that a step computes in."""
    dtype = compute_dtype(x.dtype)
    if x.dim() < 2:
        raise ValueError(f"{name}: sizes for each channel need x of (B, C, ...), not {x.dim()}-D")
    channels = x.shape[1]
    if not isinstance(size, Tensor):
        return torch.full((channels,), float(size), dtype=dtype, device=x.device)
    if not size.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, not {size.dtype}")
    check_same_device(name, size, "x", x)
    column = (channels, *[1] * (x.dim() - 2))
    if size.shape not in ((), (channels,), column, (1, *column)):
        raise ValueError(
            f"{name} has shape {tuple(size.shape)}: give a number, or a number for each of the "
            f"{channels} channels of x, {(channels,)} or {column}"
        )
    return size.to(dtype).reshape(-1).expand(channels).contiguous()


def over_channels(
    eps: Tensor, alpha: Tensor, low: Tensor, high: Tensor, x: Tensor
) -> tuple[Tensor, ...]:
    """Return (C,) tensors on the CPU as views that broadcast over `x`, (B, C, ...).

    Raises `ValueError` for values that `check_step` refuses as numbers.
    """
    for name, wrong in (("eps", ~(eps >= 0)), ("alpha", ~(alpha >= 0))):
        if wrong.any():
            raise ValueError(f"{name} must be zero or more in every channel")
    if not (low <= high).all():
        raise ValueError("clip must be (low, high) with low <= high in every channel")
    return tuple(size.view(-1, *[1] * (x.dim() - 2)) for size in (eps, alpha, low, high))


def kind(sizes: Sizes) -> str:
    """Return the type of all sizes in the schema of an op: "float" or "Tensor"."""
    return "Tensor" if isinstance(sizes.eps, Tensor) else "float"


def channel_layout(x: Tensor, size: Size) -> dict[str, int]:
    """Return how a kernel finds the channel of a value of the dense batch `x`.

    It is offset // INNER % CHANNELS. CHANNELS is 0 if `size`, one of the sizes, is a number.
    """
    if not isinstance(size, Tensor):
        return {"CHANNELS": 0, "INNER": 1}
    last = layout(x) != torch.contiguous_format
    inner = 1 if last else math.prod(x.shape[2:])
    if x.shape[1] * inner > 2**30:
        raise ValueError("an image has more than 2^30 values: give numbers, not a size per channel")
    return {"CHANNELS": x.shape[1], "INNER": inner}


def step_schema(size: str, in_place: bool = False) -> str:
    """Return the schema of an op whose sizes have the type `size`: "float" or "Tensor"."""
    first, result = ("Tensor(a!)", "()") if in_place else ("Tensor", "Tensor")
    names = ", ".join(f"{size} {name}" for name in Sizes._fields)
    return f"({first} x_adv, Tensor grad, Tensor x, {names}) -> {result}"
