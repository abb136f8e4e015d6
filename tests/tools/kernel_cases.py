"""Inputs and comparisons that the tests of the kernels share."""

import os

import pytest
import torch
from torch import Tensor

HALVES = [torch.float16, torch.bfloat16]
# One value; odd sizes; one value over a block of 256, of 1024 and of 4096; a CIFAR image.
SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 5, 7),
    (1, 1, 1, 257),
    (2, 1, 25, 41),
    (1, 1, 17, 241),
    (2, 3, 32, 32),
]
LAYOUTS = ["contiguous", "channels_last", "sliced", "expanded"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
reference_only = pytest.mark.reference_only


def laid_out(x: Tensor, layout: str) -> Tensor:
    """`x` with the same values (expanded: its first image's) in another memory layout."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1] + 1, dtype=x.dtype, device=x.device)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "expanded":
        return x[:1].expand_as(x)
    return x


def assert_within_one_ulp(actual: Tensor, exact: Tensor) -> None:
    """`actual`, half precision, is at most one step of its dtype from `exact`, float64."""
    rounded = exact.to(actual.dtype)
    step = torch.finfo(actual.dtype).eps * rounded.double().abs().clamp_min(
        torch.finfo(actual.dtype).tiny
    )
    assert ((actual.double().cpu() - exact.cpu()).abs() <= step.cpu()).all()


def error(actual: Tensor, exact: Tensor) -> float:
    """The largest deviation from the float64 truth."""
    return (actual.detach().double().cpu() - exact.detach().cpu()).abs().max().item()
