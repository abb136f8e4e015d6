"""Packed weights: the CPU's convolutions re-order theirs once an attack, not at every call.

oneDNN reads bf16 weights in an order of its own, and PyTorch puts them into it at every forward and
every backward call, although the weights of an attack stay the same over all its steps. A pass over
the compiled graphs gives the convolutions to the two ops here, which keep what they have packed
while `packing` is open. The results are the same, bit for bit.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.nn import functional as F

_kept: dict[int, dict[tuple[Any, ...], Tensor]] = {}
"""For the address of each weight that may be kept, what was packed of it."""


@contextmanager
def packing(weights: Iterable[Tensor]) -> Iterator[None]:
    """Keep `weights` packed until the end of the block, in which they must not change."""
    global _kept
    before, _kept = _kept, {weight.data_ptr(): {} for weight in weights}
    try:
        yield
    finally:
        _kept = before


def _packed(weight: Tensor, key: tuple[Any, ...], pack: Callable[[], Tensor]) -> Tensor:
    # A compiled program may hand over a copy of a weight, whose address is soon another one's.
    kept = _kept.get(weight.data_ptr())
    if kept is None:
        return pack()
    if key not in kept:
        kept[key] = pack()
    return kept[key]


@torch.library.custom_op("fastiat::packed_conv2d", mutates_args=(), device_types="cpu")
def packed_conv2d(x: Tensor, weight: Tensor, stride: list[int], padding: list[int]) -> Tensor:
    """Return conv2d(x, weight): x (B, C, H, W), weight (O, C, k, l), bf16, channels-last."""
    form = (padding, stride, [1, 1], 1)
    packed = _packed(
        weight,
        ("forward", *stride, *padding, *x.shape),
        lambda: torch.ops.aten.mkldnn_reorder_conv2d_weight(
            weight.to_mkldnn(), *form, list(x.shape)
        ),
    )
    return torch.ops.mkldnn._convolution_pointwise(x, packed, None, *form, "none", [], "")


@packed_conv2d.register_fake
def _(x: Tensor, weight: Tensor, stride: list[int], padding: list[int]) -> Tensor:
    out = F.conv2d(x, weight, None, stride, padding)
    return out.contiguous(memory_format=torch.channels_last)


@torch.library.custom_op("fastiat::packed_conv2d_input", mutates_args=(), device_types="cpu")
def packed_conv2d_input(
    grad: Tensor, weight: Tensor, size: list[int], stride: list[int], padding: list[int]
) -> Tensor:
    """Return the gradient of conv2d(x, weight) in x, of shape `size`: a transposed convolution."""
    rest = [
        n - ((m - 1) * step - 2 * pad + k)
        for n, m, step, pad, k in zip(
            size[2:], grad.shape[2:], stride, padding, weight.shape[2:], strict=True
        )
    ]
    form = (padding, rest, stride, [1, 1], 1)
    packed = _packed(
        weight,
        ("input", *size, *stride, *padding, *grad.shape),
        lambda: torch.ops.mkldnn._reorder_convolution_transpose_weight(
            weight, *form, list(grad.shape)
        ),
    )
    return torch.ops.mkldnn._convolution_transpose_pointwise(
        grad, packed, None, *form, "none", [], ""
    )


@packed_conv2d_input.register_fake
def _(
    grad: Tensor, weight: Tensor, size: list[int], stride: list[int], padding: list[int]
) -> Tensor:
    out = grad.new_empty(size)
    return torch.empty_like(out, memory_format=torch.channels_last)


class UsePacked(CustomGraphPass):
    """Gives the convolutions of a compiled graph by weights from outside to the ops above."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        """Change `graph` in place."""
        aten, ours = torch.ops.aten, torch.ops.fastiat
        for node in list(graph.nodes):
            old = node
            if node.target is aten.convolution.default:
                x, weight, bias, stride, padding, dilation, transposed, _, groups = node.args
                if bias is not None:
                    continue
                target = ours.packed_conv2d.default
                arguments: tuple[Any, ...] = (x, weight, stride, padding)
            elif node.target is aten.convolution_backward.default:
                grad, x, weight, _, stride, padding, dilation, transposed, _, groups, mask = (
                    node.args
                )
                if list(mask) != [True, False, False]:
                    continue
                (old,) = node.users
                target = ours.packed_conv2d_input.default
                arguments = (grad, weight, list(x.meta["val"].shape), stride, padding)
            else:
                continue
            if transposed or groups != 1 or list(dilation) != [1, 1] or not _takes(x, weight):
                continue
            with graph.inserting_before(node):
                new = graph.call_function(target, arguments)
            new.meta.update(old.meta)
            old.replace_all_uses_with(new)
            graph.erase_node(old)
            if old is not node:
                graph.erase_node(node)

    def uuid(self) -> Any:
        """Return what tells this pass from others in the compiler's cache."""
        return get_hash_for_files((__file__,))


def _takes(x: torch.fx.Node, weight: torch.fx.Node) -> bool:
    """Whether our ops can take these operands, and the weight is the same at every call."""
    values = [x.meta["val"], weight.meta["val"]]
    return weight.op == "placeholder" and all(
        value.device.type == "cpu"
        and value.dim() == 4
        and value.dtype == torch.bfloat16
        and value.is_contiguous(memory_format=torch.channels_last)
        for value in values
    )


def available() -> bool:
    """Whether this CPU's oneDNN multiplies bf16, without which it has nothing to pack for."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
