"""Code that all ops share: import of Triton, registration, memory layout, checks of arguments.

An op has three implementations: a Triton launcher for CUDA, the reference in PyTorch for the CPU,
and a fake implementation for tracing, which returns an empty tensor of the right shape. A custom op
supports neither torch.func nor forward-mode AD. If one of them differentiates an op, or vmap
batches its backward pass, the op is replaced by its formula in PyTorch; an op without a derivative
raises instead. With `TRITON_INTERPRET=1` in the environment, CPU tensors run the Triton launcher
too, in Triton's interpreter, so that kernels can be tested without a GPU.

PyTorch has no public function that tells whether a transform is active, or that calls a custom op's
own autograd kernel. So these private names of PyTorch are used: `make_autograd_impl`,
`forward_ad._current_level` and `torch._C._functorch`. They are the same in PyTorch 2.11, 2.14 and
2.15.
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
    # Stand-ins, with which the modules can be imported; launching a kernel raises.
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
    schema: str | None = None,
) -> "torch.library.CustomOpDef":
    """Register `torch.ops.fastiat.<name>` and return it.

    launch, cpu, fake: the implementations for CUDA, for the CPU and for tracing.
    mutates: names of the arguments that the op writes to.
    formula: the op in differentiable PyTorch code, without in-place operations; None for an op
        without a derivative.
    backward, setup_context: arguments of `torch.library.register_autograd`.
    schema: see `torch.library.custom_op`; None takes it from the annotations of `launch`.
    """
    op = torch.library.custom_op(
        f"fastiat::{name}", launch, mutates_args=mutates, device_types="cuda", schema=schema
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


# A registration ends when its Library object is deleted, so the module keeps the object.
_LIBRARY = torch.library.Library("fastiat", "FRAGMENT")


def _guard_derivatives(
    op: "torch.library.CustomOpDef", formula: Callable[..., Tensor] | None
) -> None:
    """Replace the op's autograd kernel by a kernel that also handles torch.func and forward AD.

    PyTorch's kernel drops the tangents of forward-mode AD, and its backward does not work in
    torch.func. The replacement is registered with the dispatcher, because all calls of the op go
    through it: eager, compiled and exported.
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
        # The formula consists of PyTorch operations, which have all derivatives.
        if any(_transformed(arg) for arg in args):
            return formula(*args)
        return autograd_kernel(keys, *args)

    with warnings.catch_warnings():
        # The dispatcher warns that a registered kernel is replaced. Here that is intended.
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        _LIBRARY.impl(op._name, kernel, "Autograd", with_keyset=True, allow_override=True)


def _transformed(arg: object) -> bool:
    """Return whether forward-mode AD or torch.func differentiates with respect to `arg`."""
    if not isinstance(arg, Tensor):
        return False
    in_functorch = torch._C._functorch.is_gradtrackingtensor(arg)
    if in_functorch and arg.requires_grad:
        return True
    # Compiled code enters level 0, the only level, without setting `_current_level`.
    in_level = in_functorch or forward_ad._current_level >= 0
    return in_level and forward_ad.unpack_dual(arg, level=0).tangent is not None


def _one_by_one(op: "torch.library.CustomOpDef", in_place: bool) -> Callable[..., Any]:
    """Return a vmap rule that calls `op` once for each entry of the vmapped dimension.

    `in_place`: `op` writes into its first argument.
    """

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


# Dynamo calls this function during tracing, and guards the level that `check_floating` reads.
@torch.compiler.assume_constant_result
def _refuse_duals() -> None:
    """Raise if code is being compiled for dual tensors: Inductor drops the tangents of its inputs.

    Dynamo catches the error and runs the code uncompiled. In PyTorch 2.11, and with fullgraph=True,
    the error reaches the caller.
    """
    interpreters = torch._C._functorch.get_interpreter_stack() or ()
    within = any(i.key() == torch._C._functorch.TransformType.Jvp for i in interpreters)
    if forward_ad._current_level >= 0 and not within:
        raise RuntimeError(
            "compiled code drops the tangents of torch.autograd.forward_ad: call the function or "
            "the model without torch.compile, or compile torch.func.jvp of it"
        )


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Make the device of `x` current: Triton launches on the current device, not on that of `x`."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def blocks(n: int, block: int) -> int:
    """Return the number of blocks of `block` values that cover `n` values."""
    return -(-n // block)


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()


def layout(x: Tensor) -> torch.memory_format:
    """Return the memory format of `dense(x)`: channels-last if `x` has it, else contiguous."""
    if x.is_contiguous():
        return torch.contiguous_format
    if x.dim() == 4 and x.stride(1) == 1:
        return torch.channels_last
    if x.dim() == 5 and x.stride(1) == 1:
        return torch.channels_last_3d
    return torch.contiguous_format


def dense(x: Tensor, like: Tensor | None = None) -> Tensor:
    """Return `x` in the memory format `layout(like)`, by default `layout(x)`; copy if needed."""
    return x.contiguous(memory_format=layout(x if like is None else like))


def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return an uninitialised tensor with the shape and the memory format of `dense(x)`."""
    return torch.empty_like(x, dtype=dtype, memory_format=layout(x))


def image_rows(x: Tensor) -> Tensor:
    """Return a (B, N) view of a dense batch; a row has the values of an image in memory order."""
    if not x.is_contiguous():
        x = x.permute(0, *range(2, x.dim()), 1)
    return x.view(x.shape[0], math.prod(x.shape[1:]))


def from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """Return `rows`, (B, N), as a batch with the shape and memory format of `like`.

    This is the inverse of `image_rows`.
    """
    if layout(like) == torch.contiguous_format:
        return rows.view(like.shape)
    batch, channels, *size = like.shape
    return rows.view(batch, *size, channels).movedim(-1, 1)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in: fp64 for fp64, else fp32 (half precision is for storage)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_floating(name: str, x: Tensor) -> None:
    """Raise `TypeError` or `ValueError` unless the kernels support the dtype and device of `x`.

    fp64 is supported on the CPU only. Code that is compiled for dual tensors gets `RuntimeError`.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, not {x.dtype}")
    check_device(name, x)
    # Dynamo guards `_current_level`: code compiled outside a level is not used inside a level.
    if torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        _refuse_duals()
    if x.dtype == torch.float64 and x.is_cuda:
        raise TypeError(f"{name} is float64, which only the CPU supports: use {name}.float()")


def check_device(name: str, x: Tensor) -> None:
    """Raise `ValueError` if the kernels do not support the device of `x`."""
    if x.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"{name} is on {x.device}: move it to cpu or cuda for fastiat.kernels")


def check_like(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless `x` is a tensor with the shape and the device of `other`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(x).__name__}")
    if x.shape != other.shape:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, but {other_name} has {tuple(other.shape)}"
        )
    check_same_device(name, x, other_name, other)


def check_same_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Raise `ValueError` if `x` and `other` are on different devices."""
    if x.device != other.device:
        raise ValueError(f"{name} is on {x.device}, but {other_name} is on {other.device}")


def check_images(name: str, x: Tensor) -> None:
    """Raise `ValueError` unless `x` has a batch dimension and at least one more dimension."""
    if x.dim() < 2:
        raise ValueError(f"{name} must be (B, ...) with two dimensions or more, not {x.dim()}")


def check_vector(
    name: str, x: Tensor, length: int, dtype: torch.dtype, other_name: str, other: Tensor
) -> None:
    """Raise unless `x` is a tensor of shape (length,) and `dtype`, on the device of `other`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(x).__name__}")
    if x.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, not {x.dtype}")
    if x.shape != (length,):
        raise ValueError(f"{name} must have shape ({length},), not {tuple(x.shape)}")
    check_same_device(name, x, other_name, other)


def check_radius(name: str, value: float | Tensor) -> float:
    """Return `value` as a float; raise if it is not a number, or is negative or NaN."""
    if isinstance(value, (Tensor, str)):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    if not value >= 0:
        raise ValueError(f"{name} must be zero or more, not {value}")
    return float(value)


def check_clip(clip: tuple[float, float]) -> tuple[float, float]:
    """Return the pixel range as two floats; raise unless low <= high."""
    try:
        low, high = clip
    except (TypeError, ValueError):
        raise ValueError(f"clip must be a pair (low, high), not {clip!r}") from None
    if not low <= high:
        raise ValueError(f"clip must be (low, high) with low <= high, not {clip!r}")
    return float(low), float(high)


def check_writable(name: str, x: Tensor, /, **inputs: Tensor) -> None:
    """Raise `ValueError` if `x` overlaps itself or shares memory with an input.

    An in-place kernel would then read values that it has already overwritten. Call this only in the
    implementations of an op: a traced tensor has no address, and its sizes may be unknown.
    """
    # In rising order, each stride must be larger than the reach of all smaller strides: the
    # distance between the first and the last value that these address.
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
    """Return the first address of `x` and the address after its last value, in bytes."""
    if x.numel() == 0 or x.is_meta:
        return 0, 0
    reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (reach + 1) * x.element_size()


def lam_tensor(lam: Tensor | float, x_name: str, x: Tensor) -> Tensor:
    """Return `lam` as a () or (B,) tensor on the device of `x`, at least in `compute_dtype`.

    A number becomes float64, so that 1 - lam is as accurate as in Python. The values of a tensor
    are not checked here, because reading them would synchronize with the GPU. Raises `TypeError` or
    `ValueError` for other arguments.
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
    """Raise `ValueError` if the CPU tensor `lam` has values outside [0, 1]."""
    low, high = lam.aminmax() if lam.dim() and lam.numel() else (lam, lam)
    if lam.numel() and not 0 <= low.item() <= high.item() <= 1:
        raise ValueError("lam must be in [0, 1]")


def refuse_gradient(name: str, required: bool) -> None:
    """Raise `ValueError` if `required`: if autograd needs the gradient of the argument `name`."""
    if required:
        raise ValueError(f"{name} requires a gradient, but this op has none: use {name}.detach()")
