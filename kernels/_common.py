"""What every op here shares: Triton if there is one, registration, memory layout, argument checks.

An op is registered three times over: its Triton launcher for CUDA, its torch reference for the
CPU and a shape function for tracing. Where a transform needs more than that (torch.func,
forward-mode AD, a vmapped backward), the op is replaced by its formula in torch, which torch
transforms; an op without a derivative refuses to be differentiated there. With
`TRITON_INTERPRET=1` in the environment CPU tensors run the Triton launcher too, in Triton's
interpreter, so that kernels can be tested without a GPU.
"""

import math
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._library.autograd import make_autograd_impl
from torch.autograd import forward_ad

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, or a CPU-only installation

    class _NeedsTriton:
        def __init__(self, function: Callable[..., Any]) -> None:
            self.name = function.__name__

        def __getitem__(self, grid: Any) -> Any:
            raise RuntimeError(
                f"{self.name} runs on CUDA tensors through Triton, which is not installed here: "
                "install triton, or move the tensors to the CPU"
            )

    class triton:  # type: ignore[no-redef]
        jit = _NeedsTriton

    class tl:  # type: ignore[no-redef]
        constexpr = None


__all__ = ["tl", "triton"]

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, *HALVES, torch.float64)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def register(
    name: str,
    launch: Callable[..., Any],
    *,
    cpu: Callable[..., Any],
    fake: Callable[..., Any],
    mutates: Sequence[str] = (),
    formula: Callable[..., Tensor] | None = None,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> "torch.library.CustomOpDef":
    """Register `torch.ops.fastiat.<name>`: `launch` for CUDA, `cpu`, and `fake` for tracing.

    `formula` is the op in differentiable torch code, written out of place; None for an op without
    a derivative. `backward` and `setup_context` are those of `torch.library.register_autograd`.
    """
    op = torch.library.custom_op(
        f"fastiat::{name}", launch, mutates_args=mutates, device_types="cuda"
    )
    op.register_kernel("cpu")(launch if INTERPRETED else cpu)
    op.register_fake(fake)
    if backward is not None:
        op.register_autograd(backward, setup_context=setup_context)
    if formula is None:
        op.register_vmap(_one_by_one(op, in_place=bool(mutates)))
    else:
        _LIBRARY.impl(name, formula, "FuncTorchBatched")
    _guard_derivatives(op, formula)
    return op


# Registrations live as long as their library object.
_LIBRARY = torch.library.Library("fastiat", "FRAGMENT")


def _guard_derivatives(
    op: "torch.library.CustomOpDef", formula: Callable[..., Tensor] | None
) -> None:
    """Put a kernel in front of autograd's that sees to the derivatives autograd's does not give.

    A custom op drops the tangents of forward-mode AD, and its backward knows no torch.func. The
    dispatcher is the one place that every way to the op leads through: eager, compiled, exported.
    """
    autograd_kernel = make_autograd_impl(op._opoverload, op)

    def kernel(keys: Any, *args: Any) -> Any:
        if formula is None:
            if torch.is_grad_enabled() and any(_transformed(arg) for arg in args):
                raise RuntimeError(
                    f"{op._name} has no derivative: pass x.detach() for every "
                    "argument x that the transform differentiates"
                )
            with torch.no_grad():
                return autograd_kernel(keys, *args)
        if any(_transformed(arg) for arg in args):
            return formula(*args)
        return autograd_kernel(keys, *args)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        _LIBRARY.impl(op._name, kernel, "Autograd", with_keyset=True)


def _transformed(arg: object) -> bool:
    """Whether forward-mode AD, or torch.func in either mode, differentiates in `arg`."""
    if not isinstance(arg, Tensor):
        return False
    in_functorch = torch._C._functorch.is_gradtrackingtensor(arg)
    if in_functorch and arg.requires_grad:
        return True
    # Compiled code enters the one level there is, 0, without telling forward_ad of it.
    in_level = in_functorch or forward_ad._current_level >= 0
    return in_level and forward_ad.unpack_dual(arg, level=0).tangent is not None


def _one_by_one(op: "torch.library.CustomOpDef", in_place: bool) -> Callable[..., Any]:
    """The vmap rule that calls `op`, which may write into its first argument, once per entry."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, int | None]:
        if in_place and in_dims[0] is None:
            raise RuntimeError(
                f"{op._name} writes into a tensor that vmap does not batch: give it an in_dim"
            )
        outs = [
            op(
                *(
                    a if dim is None else a.select(dim, i)
                    for a, dim in zip(args, in_dims, strict=True)
                )
            )
            for i in range(info.batch_size)
        ]
        return (None, None) if in_place else (torch.stack(outs), 0)

    return rule


@torch.compiler.assume_constant_result  # runs while torch.compile traces, which guards the level
def _refuse_duals() -> None:
    """Refuse to be compiled for dual tensors: Inductor drops the tangents of what it is given."""
    interpreters = torch._C._functorch.get_interpreter_stack() or ()
    within = any(i.key() == torch._C._functorch.TransformType.Jvp for i in interpreters)
    if forward_ad._current_level >= 0 and not within:
        raise RuntimeError(
            "compiled code drops the tangents of torch.autograd.forward_ad: call the function or "
            "the model without torch.compile, or compile torch.func.jvp of it"
        )


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Make the device of `x` current: Triton launches on the current one, whatever its tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def blocks(n: int, block: int) -> int:
    """How many blocks of `block` cover `n`."""
    return -(-n // block)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()


def layout(x: Tensor) -> torch.memory_format:
    """The dense layout, images outermost, nearest to that of `x`: channels-last if `x` is."""
    if x.is_contiguous():
        return torch.contiguous_format
    if x.dim() == 4 and x.stride(1) == 1:
        return torch.channels_last
    if x.dim() == 5 and x.stride(1) == 1:
        return torch.channels_last_3d
    return torch.contiguous_format


def dense(x: Tensor, like: Tensor | None = None) -> Tensor:
    """`x` itself where it is laid out as `layout` says (of `like`), else a copy that is."""
    return x.contiguous(memory_format=layout(x if like is None else like))


def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor shaped and laid out as `dense(x)`."""
    return torch.empty_like(x, dtype=dtype, memory_format=layout(x))


def image_rows(x: Tensor) -> Tensor:
    """A dense batch as a (B, N) view, every row one image's values in memory order."""
    if not x.is_contiguous():
        x = x.permute(0, *range(2, x.dim()), 1)
    return x.view(x.shape[0], math.prod(x.shape[1:]))


def from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """`image_rows` undone: (B, N) in memory order as a batch shaped and laid out as `like`."""
    if layout(like) == torch.contiguous_format:
        return rows.view(like.shape)
    batch, channels, *size = like.shape
    return rows.view(batch, *size, channels).movedim(-1, 1)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to calculate in: half precision is for storage only."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_floating(name: str, x: Tensor) -> None:
    """Refuse what is no floating-point tensor on a device that these ops run on."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, not {x.dtype}")
    check_device(name, x)
    # torch.compile guards what it reads, so code compiled outside of a level is not used inside.
    if torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        _refuse_duals()
    if x.dtype == torch.float64 and x.is_cuda:
        raise TypeError(f"{name} is float64, which only the CPU path takes: use {name}.float()")


def check_device(name: str, x: Tensor) -> None:
    """Refuse devices without a kernel."""
    if x.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"{name} is on {x.device}; fastiat.kernels run on cpu and cuda")


def check_like(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse `x` unless it has the shape and the device of `other`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(x).__name__}")
    if x.shape != other.shape:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, but {other_name} has {tuple(other.shape)}"
        )
    check_same_device(name, x, other_name, other)


def check_same_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse `x` on another device than `other`."""
    if x.device != other.device:
        raise ValueError(f"{name} is on {x.device}, but {other_name} is on {other.device}")


def check_images(name: str, x: Tensor) -> None:
    """Refuse a tensor without a batch dimension and at least one more."""
    if x.dim() < 2:
        raise ValueError(f"{name} must be (B, ...) with two dimensions or more, not {x.dim()}")


def check_vector(
    name: str, x: Tensor, length: int, dtype: torch.dtype, other_name: str, other: Tensor
) -> None:
    """Refuse `x` unless it is (length,), of `dtype`, on the device of `other`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(x).__name__}")
    if x.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, not {x.dtype}")
    if x.shape != (length,):
        raise ValueError(f"{name} must have shape ({length},), not {tuple(x.shape)}")
    check_same_device(name, x, other_name, other)


def check_radius(name: str, value: float) -> float:
    """`value` as a float, refused where it is no number, negative or NaN."""
    if isinstance(value, (Tensor, str)):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    if not value >= 0:
        raise ValueError(f"{name} must be zero or more, not {value}")
    return float(value)


def check_clip(clip: tuple[float, float]) -> tuple[float, float]:
    """The pixel range as two floats, refused unless low <= high."""
    try:
        low, high = clip
    except (TypeError, ValueError):
        raise ValueError(f"clip must be a pair (low, high), not {clip!r}") from None
    if not low <= high:
        raise ValueError(f"clip must be (low, high) with low <= high, not {clip!r}")
    return float(low), float(high)


def check_writable(name: str, x: Tensor, /, **inputs: Tensor) -> None:
    """Refuse to write into `x` where it overlaps itself or shares memory with an input.

    For the kernels of an op alone: what is traced has neither sizes to sort nor addresses.
    """
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride <= reach:
            raise ValueError(f"{name} overlaps itself in memory (expanded?): pass {name}.clone()")
        reach += (size - 1) * stride
    for other_name, other in inputs.items():
        (start, end), (other_start, other_end) = _extent(x), _extent(other)
        if start < other_end and other_start < end:
            raise ValueError(f"{name} shares memory with {other_name}: pass {name}.clone()")


def _extent(x: Tensor) -> tuple[int, int]:
    """The addresses between which `x` lies."""
    if x.numel() == 0 or x.is_meta:
        return 0, 0
    reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (reach + 1) * x.element_size()


def lam_tensor(lam: Tensor | float, x_name: str, x: Tensor) -> Tensor:
    """`lam` as a () or (B,) tensor beside `x`, at least as wide as the arithmetic on `x`.

    A number becomes float64, so that 1 - lam is rounded only once, as Python does it. The values
    of a tensor are not looked at here, which would wait for the device.
    """
    if not isinstance(lam, Tensor):
        if isinstance(lam, str) or not isinstance(lam, (int, float)):
            raise TypeError(f"lam must be a number or a tensor, not {type(lam).__name__}")
        if not 0 <= lam <= 1:
            raise ValueError(f"lam must be in [0, 1], not {lam}")
        return torch.full((), lam, dtype=torch.float64, device=x.device)
    if lam.dtype not in FLOATS:
        raise TypeError(f"lam must be a floating-point tensor, not {lam.dtype}")
    if lam.shape not in ((), (x.shape[0],)):
        raise ValueError(
            f"lam must be a scalar or have shape ({x.shape[0]},), not {tuple(lam.shape)}"
        )
    check_same_device("lam", lam, x_name, x)
    return lam.to(torch.promote_types(lam.dtype, compute_dtype(x.dtype)))


def check_lam_values(lam: Tensor) -> None:
    """Refuse values outside [0, 1], on the CPU, where looking at them is free."""
    low, high = lam.aminmax() if lam.dim() and lam.numel() else (lam, lam)
    if lam.numel() and not 0 <= low.item() <= high.item() <= 1:
        raise ValueError("lam must be in [0, 1]")


def refuse_lam_gradient(required: bool) -> None:
    """Refuse a `lam` that a backward would have to give a gradient."""
    if required:
        raise ValueError("lam requires a gradient, which this op does not give: use lam.detach()")
