"""A defect of oneDNN on the CPU, and two workarounds.

oneDNN's weight gradient of a strided 1x1 convolution, channels-last, with fewer input channels than
a SIMD register holds (8 with AVX2, 16 with AVX-512), writes out of bounds: the process crashes or
continues with wrong numbers (uxlfoundation/oneDNN#6035, PyTorch 2.11 to 2.15). A transposed
convolution with as few output channels computes its weight gradient by the same code.

Both workarounds are needed. `replace_weight_gradient` replaces a PyTorch kernel in the whole
process. `graphs.prepare` calls it for every training that fastiat runs, so that it also protects a
user's own network. Building or loading a network must not have such a side effect. Networks of
`fastiat.models` may be trained by code outside fastiat, so `fastiat.models.Shortcut` avoids the
defect without it.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, get_kernel

CHANNELS = 16
"""Least number of channels for which the gradient is correct on every CPU."""

OP = "aten::convolution_backward"


@cache
def replace_weight_gradient() -> Library:
    """Replace PyTorch's CPU kernel of `convolution_backward` in this process.

    The new kernel calls the original kernel. For the defective gradients it first selects the
    pixels that the strided convolution reads, and calls the original kernel with stride 1. The
    replacement applies to all networks: modules and functions, compiled and scripted. Returns the
    registration, which lasts as long as the process.
    """
    original = get_kernel(OP, "CPU")

    @torch.compiler.disable
    def convolution_backward(
        keys: Any,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        bias_sizes: Sequence[int] | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        transposed: bool,
        output_padding: Sequence[int],
        groups: int,
        output_mask: Sequence[bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        form = (bias_sizes, stride, padding, dilation, transposed, output_padding, groups)
        # `source` is the operand of which only every `stride`-th pixel is used.
        source, target = (grad, x) if transposed else (x, grad)
        of_input, of_weight, of_bias = output_mask
        if not (
            (of_weight or of_bias)  # oneDNN computes both gradients in one call
            and source.shape[1] < CHANNELS
            and groups == 1
            and all(size == 1 for size in weight.shape[2:])
            and any(step != 1 for step in stride)
            and not any(padding)
        ):
            return original.call_boxed(keys, grad, x, weight, *form, output_mask)
        input_grad = weight_grad = bias_grad = None
        if of_input:
            only = [True, False, False]
            input_grad = original.call_boxed(keys, grad, x, weight, *form, only)[0]
        if of_weight:
            picked = source[(slice(None), slice(None), *(slice(None, None, s) for s in stride))]
            zeros, ones = [0] * len(stride), [1] * len(stride)
            unit = (None, ones, zeros, ones, False, zeros, 1)
            only = [False, True, False]
            weight_grad = original.call_boxed(keys, target, picked, weight, *unit, only)[1]
        if of_bias:
            bias_grad = grad.sum([0, *range(2, grad.dim())])
        return input_grad, weight_grad, bias_grad

    library = Library("aten", "IMPL")
    library.impl("convolution_backward", convolution_backward, "CPU", with_keyset=True)
    return library
