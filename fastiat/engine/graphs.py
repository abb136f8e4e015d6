"""Engines: a network's passes run eagerly, compiled, or captured as CUDA graphs.

The attack and the training step share these parts: half-precision copies of weights, which many
passes use; `torch.compile` with one program per function; and the capture of a function whose
tensors are fixed buffers as a CUDA graph.
"""

import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fastiat.engine import onednn
from fastiat.system.errors import InputError

Engine = Literal["auto", "eager", "compile", "graph"]
BACKEND = "inductor"
"""The backend of `torch.compile`."""
WARM_UPS = 3
"""Runs before a capture. They compile the function, and cuDNN and Triton choose their kernels."""


def pick_engine(name: Engine, device: torch.device) -> str:
    """Return the engine `name`; "auto" is "graph" on CUDA, else "eager".

    On the CPU, "auto" is not "compile": compilation takes minutes, which only a long training of a
    wide network makes up for. Raises `InputError` if the engine `name` cannot run on `device`.
    """
    if name == "auto":
        return "graph" if device.type == "cuda" else "eager"
    if name == "graph" and device.type != "cuda":
        raise InputError(
            f"--engine graph captures CUDA graphs, but the device is {device}: "
            f"use --engine compile or eager"
        )
    if name == "compile" and not has_compiler(device):
        raise InputError(
            "--engine compile needs a C++ compiler: install g++, or use --engine eager"
        )
    return name


def has_compiler(device: torch.device) -> bool:
    """Return whether `torch.compile` works on `device`: the CPU needs a C++ compiler."""
    candidates = [os.environ.get("CXX"), "g++", "clang++"]
    return device.type != "cpu" or any(shutil.which(name) for name in candidates if name)


def inductor_config() -> Any:
    """Return the settings of Inductor, whose import takes seconds."""
    from torch._inductor import config

    return config


def prepare(device: torch.device, deterministic: bool) -> None:
    """Set PyTorch's process-wide options: fast algorithms, or deterministic ones.

    fp32 convolutions do not use TF32. On the CPU, oneDNN's defective weight gradient is replaced
    for every network, see `fastiat.engine.onednn`.
    """
    if device.type == "cpu":
        onednn.replace_weight_gradient()
    torch.use_deterministic_algorithms(deterministic)
    # Deterministic mode would also fill every uninitialized tensor, which costs a pass over memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # Otherwise Inductor chooses kernels by their measured time, and they sum in different orders.
    inductor_config().deterministic = deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not deterministic
        torch.backends.cudnn.allow_tf32 = False


@contextmanager
def prepared(device: torch.device, deterministic: bool | None = None) -> Iterator[None]:
    """Call `prepare`, and restore the process-wide options at the end.

    deterministic: None keeps the present mode.
    """
    present = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    places = [
        (torch.utils.deterministic, "fill_uninitialized_memory"),
        (inductor_config(), "deterministic"),
        (torch.backends.cudnn, "benchmark"),
        (torch.backends.cudnn, "allow_tf32"),
    ]
    before = [getattr(*place) for place in places]
    try:
        prepare(device, present if deterministic is None else deterministic)
        yield
    finally:
        torch.use_deterministic_algorithms(present, warn_only=warn)
        for (holder, name), value in zip(places, before, strict=True):
            setattr(holder, name, value)


def placed(model: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `values` by every name of their parameters, so that `functional_call` replaces all.

    `values` has the names of `model.named_parameters()`, which gives a tied parameter one name. The
    result has a tied parameter's value under each of its names. A module that is registered twice
    counts once: `functional_call` would not restore its second registration.
    """
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    holders = {
        name: first[id(parameter)]
        for prefix, module in model.named_modules()
        for name, parameter in module.named_parameters(
            prefix, recurse=False, remove_duplicate=False
        )
    }
    return {holder: values[name] for holder, name in holders.items() if name in values}


# Functions for which autocast casts all arguments.
_MULTIPLY = {
    F.linear,
    *(F.conv1d, F.conv2d, F.conv3d),
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
}
# Functions whose result does not depend on a tensor's values or type.
_LOOK = {
    Tensor.size,
    Tensor.dim,
    *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "device", "requires_grad")),
}


class CastableWeights(TorchFunctionMode):
    """Finds the weights that may be cast to `dtype` once, instead of by autocast at every use.

    These are the fp32 parameters that the observed passes use only as arguments of linear layers
    and convolutions under autocast to `dtype`. If a network also uses a weight in another way, such
    as for its norm, a copy in `dtype` would change the results.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype
        parameters = dict(model.named_parameters())
        # Each pass gets aliases of the parameters, in the way that it would get copies. A pass that
        # uses a parameter itself, such as a parameter in a closure, would not use the copy either,
        # so `__torch_function__` rules that parameter out.
        aliases = {name: parameter.detach() for name, parameter in parameters.items()}
        self.aliases = placed(model, aliases)
        self.names_of = {id(alias): name for name, alias in aliases.items()}
        self.originals = {id(parameter): name for name, parameter in parameters.items()}
        self.multiplied: set[str] = set()
        self.ruled_out = {n for n, p in parameters.items() if p.dtype != torch.float32}

    @property
    def names(self) -> set[str]:
        """Names of the castable weights, according to all observed passes."""
        return self.multiplied - self.ruled_out

    def observe(self, x: Tensor) -> Tensor:
        """Run one forward and backward pass on pixels `x`, and return the logits, (B, K).

        Buffers and random states are restored. No parameter gets a gradient.
        """
        x, logits = x.detach().clone(), torch.empty(0)
        both = _BothPasses(self.model)
        aliases = {f"model.{name}": alias for name, alias in self.aliases.items()}

        def run() -> None:
            nonlocal logits
            with torch.enable_grad():
                logits = forward(both, aliases, self.dtype, x.requires_grad_())

        devices = [x.device] if x.is_cuda else []
        with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"), self:
            with_state_restored(run, self.model.buffers(), 1)
        return logits.detach()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for leaf in tree_leaves((args, kwargs)) if func not in _LOOK else ():
            if id(leaf) in self.originals:
                self.ruled_out.add(self.originals[id(leaf)])
            elif id(leaf) in self.names_of:
                device = leaf.device.type
                casts = func in _MULTIPLY and torch.is_autocast_enabled(device)
                casts = casts and torch.get_autocast_dtype(device) == self.dtype
                (self.multiplied if casts else self.ruled_out).add(self.names_of[id(leaf)])
        return func(*args, **kwargs)


class _BothPasses(nn.Module):
    """Runs the backward pass too, so that it gets the weights that the forward pass got.

    A network that saves memory by `torch.utils.checkpoint` runs again in its backward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, and compute the gradient of their sum with respect to `x`."""
        logits: Tensor = self.model(x)
        if logits.requires_grad:
            # `torch.autograd.grad` makes this call, but disables `CastableWeights` for the whole
            # backward pass, in which an autograd.Function may use weights too.
            total = logits.sum()
            with torch.autocast(x.device.type, enabled=False):  # as in the backward pass of a loop
                torch.autograd.Variable._execution_engine.run_backward(
                    (total,), (torch.ones_like(total),), False, False, (x,),
                    allow_unreachable=True, accumulate_grad=False,
                )  # fmt: skip
        return logits


def detached_weights(
    model: nn.Module, dtype: torch.dtype | None, cast: Collection[str]
) -> dict[str, Tensor]:
    """Return the detached parameters; those named in `cast` are copies in `dtype`. See `placed`.

    A compiled function of detached weights computes no weight gradients. A compiled function of the
    parameters would compute them even if only the gradient of the input is needed, because the
    whole backward pass is compiled.
    """
    weights = {
        name: parameter.detach().to(dtype if name in cast else parameter.dtype)
        for name, parameter in model.named_parameters()
    }
    return placed(model, weights)


class Weights:
    """The weights of the training passes, with copies in `dtype` of the weights named in `cast`.

    The copies are fixed buffers, which captured graphs read. Call `refresh` after every change of
    the parameters: it copies them again. `trained` names the parameters that get gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype | None,
        cast: Collection[str],
        trained: Collection[str],
    ) -> None:
        parameters: dict[str, Tensor] = dict(model.named_parameters())
        self.masters = [parameter for name, parameter in parameters.items() if name in cast]
        copies = {
            name: torch.empty_like(parameter, dtype=dtype).requires_grad_(name in trained)
            for name, parameter in parameters.items()
            if name in cast
        }
        self.made = list(copies.values())
        self.copies = placed(model, copies)
        leaves = parameters | copies
        # A pass is differentiated with respect to these: the trained parameters, in order.
        self.leaves = [leaf for name, leaf in leaves.items() if name in trained]
        self.detached = placed(model, {name: leaf.detach() for name, leaf in leaves.items()})
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the current values of the parameters."""
        if self.made:
            torch._foreach_copy_(self.made, self.masters)


def forward(
    model: nn.Module, weights: dict[str, Tensor], dtype: torch.dtype | None, x: Tensor
) -> Tensor:
    """Return the logits of `model` for pixels `x`, with `weights` in place of its parameters.

    The model runs under autocast to `dtype`, which does not cast weights that are in `dtype`
    already. None disables autocast.
    """
    # No cache: autocast would reuse the casts of one pass in the next pass, and a captured graph
    # would keep the addresses of these casts.
    with torch.autocast(
        x.device.type, dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False
    ):
        # `weights` has every name of a tied parameter already, see `placed`.
        return torch.func.functional_call(model, weights, (x,), tie_weights=False)


def compile_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a Python function for static shapes, with a code object of its own.

    Dynamo compiles a code object at most eight times and then runs it uncompiled. Functions that
    are defined by the same `def` share one code object, so each of them gets its own copy here.
    """
    assert isinstance(function, FunctionType)
    own = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    return torch.compile(own, dynamic=False, backend=BACKEND)


@contextmanager
def restored(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Restore the values of `tensors` at the end, in place."""
    kept = [(tensor.detach(), tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        for tensor, before in kept:
            tensor.copy_(before)


def with_state_restored(
    function: Callable[[], object], state: Iterable[Tensor], times: int
) -> None:
    """Call `function` `times` times, then restore the tensors of `state` in place."""
    with restored(state):
        for _ in range(times):
            function()


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream on which all graphs of `device` are captured.

    Graphs share the memory of a pool only if it was allocated on the same stream.
    """
    return torch.cuda.Stream(device)


class Captured:
    """A function of fixed buffers, captured as a CUDA graph at its first call and then replayed.

    A graph holds addresses, not tensors, so the function may read and write only memory that lives
    as long as the graph. `state` returns the tensors that the function changes and that other code
    reads later; they are restored after the warm-up runs. Graphs of one `pool` share the memory of
    their intermediate results, so they must never run at the same time. A function that cannot be
    captured raises `RuntimeError`.
    """

    def __init__(
        self,
        function: Callable[[], object],
        state: Callable[[], Sequence[Tensor]],
        device: torch.device,
        pool: Any = None,
    ) -> None:
        self.function, self.state, self.device, self.pool = function, state, device, pool
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Run the function on the current contents of its buffers."""
        with torch.cuda.device(self.device):
            if self.graph is None:
                self.graph = self._capture()
            self.graph.replay()

    def _capture(self) -> torch.cuda.CUDAGraph:
        here, aside = torch.cuda.current_stream(), _capture_stream(self.device)
        # Warm-up runs may draw random numbers. The generator state is restored at the end, so that
        # a capture does not change later draws.
        random = torch.cuda.get_rng_state()
        aside.wait_stream(here)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(aside):
            with_state_restored(self.function, self.state(), WARM_UPS)
            try:
                # thread_local: other threads, such as the thread that pins a loader's memory, may
                # make CUDA calls that are forbidden during a capture.
                with torch.cuda.graph(
                    graph, pool=self.pool, stream=aside, capture_error_mode="thread_local"
                ):
                    self.function()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise RuntimeError(
                    "this network cannot be captured as a CUDA graph, because one of its "
                    "operations synchronizes with the GPU: use the engine compile"
                ) from error
        here.wait_stream(aside)
        torch.cuda.set_rng_state(random)
        return graph
