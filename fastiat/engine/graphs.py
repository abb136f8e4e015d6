"""Engines: how the passes of a network run. Plain PyTorch, compiled, or captured as CUDA graphs.

What the attack and the step share: half-precision weights that are made once for many passes, a
compiler that keeps one program per function, and the capture of a function of fixed buffers.
"""

import os
import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cache
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fastiat.engine import onednn
from fastiat.system.errors import InputError

Engine = Literal["auto", "eager", "compile", "graph"]
BACKEND = "inductor"
"""What `torch.compile` hands its graphs to."""
WARM_UPS = 3
"""Runs before a capture: the first compiles, and cuDNN and Triton choose their kernels."""


def pick_engine(name: Engine, device: torch.device) -> str:
    """Turn "auto" into the engine a training takes: "graph" on CUDA, else "eager".

    On the CPU "compile" pays only for long trainings of wide networks, as it compiles for minutes.
    Raises `InputError` where the one asked for cannot run.
    """
    if name == "auto":
        return "graph" if device.type == "cuda" else "eager"
    if name == "graph" and device.type != "cuda":
        raise InputError(
            f"--engine graph captures CUDA graphs and the device is {device}: "
            f"use --engine compile or eager"
        )
    if name == "compile" and not has_compiler(device):
        raise InputError(
            "--engine compile needs a C++ compiler: install g++, or use --engine eager"
        )
    return name


def has_compiler(device: torch.device) -> bool:
    """Whether `torch.compile` finds the C++ compiler that its CPU code goes through."""
    candidates = [os.environ.get("CXX"), "g++", "clang++"]
    return device.type != "cpu" or any(shutil.which(name) for name in candidates if name)


def prepare(device: torch.device, deterministic: bool) -> None:
    """Set what PyTorch keeps per process: the choice of algorithms, fast or repeatable.

    fp32 means fp32: convolutions are kept from rounding their inputs to TF32. On the CPU no
    network's weight gradient may write out of bounds (see `fastiat.engine.onednn`).
    """
    if device.type == "cpu":
        onednn.replace_weight_gradient()
    torch.use_deterministic_algorithms(deterministic)
    # Deterministic mode would also fill every new tensor, which finds bugs but costs a pass.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # Inductor would time kernels that sum in different orders and take the fastest.
    inductor.deterministic = deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not deterministic
        torch.backends.cudnn.allow_tf32 = False


def matmul_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return the fp32 parameters of convolutions and linear layers, which autocast would cast.

    Each has one name, the first, however many layers share it.
    """
    layers = (nn.modules.conv._ConvNd, nn.Linear)
    theirs = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, layers)
        for parameter in module.parameters(recurse=False)
    }
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) in theirs and parameter.dtype == torch.float32
    }


def places(model: nn.Module) -> dict[str, str]:
    """Return {name of a place that holds a parameter: the parameter's first name}.

    A tied parameter has several places, those of a module that is used twice are named once:
    `functional_call` would leave what it put into the second of them there.
    """
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{prefix}.{name}" if prefix else name: first[id(parameter)]
        for prefix, module in model.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    }


# What autocast casts all arguments of, and what gives nothing of a tensor's values or type away.
_MULTIPLY = {
    F.linear,
    *(F.conv1d, F.conv2d, F.conv3d),
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
}
_LOOK = {
    Tensor.size,
    Tensor.dim,
    *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "device", "requires_grad")),
}


class Uses(TorchFunctionMode):
    """Finds the weights of which copies in `dtype` do what the weights do under autocast to it.

    These are the `matmul_parameters` that a pass uses in linear layers and convolutions alone, with
    autocast on. The rest stays as it is, and autocast casts what is to be cast.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype
        parameters = dict(model.named_parameters())
        aliases = {name: parameter.detach() for name, parameter in parameters.items()}
        self.aliases = {place: aliases[name] for place, name in places(model).items()}
        self.names = {id(alias): name for name, alias in aliases.items()}
        # What is used past its module's attribute would be used past a copy.
        self.originals = {id(parameter): name for name, parameter in parameters.items()}
        self.well: set[str] = set()
        self.ill: set[str] = set()

    def watch(self, *inputs: Any) -> Tensor:
        """Return the logits of one pass and its backward pass, which change nothing."""
        x, logits = inputs[0].detach().clone(), torch.empty(0)

        def run() -> None:
            nonlocal logits
            with torch.enable_grad():
                leaf = x.requires_grad_()
                logits = forward(self.model, self.aliases, self.dtype, leaf, *inputs[1:])
                if logits.requires_grad:
                    # What `grad` calls, which has the mode off while it runs.
                    total = logits.sum()
                    torch.autograd.Variable._execution_engine.run_backward(
                        (total,), (torch.ones_like(total),), False, False, (leaf,),
                        allow_unreachable=True, accumulate_grad=False,
                    )  # fmt: skip

        devices = [x.device] if x.is_cuda else []
        with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"), self:
            with_state_restored(run, self.model.buffers(), 1)
        return logits.detach()

    @property
    def cast(self) -> set[str]:
        """Names of the weights found in all passes that were watched."""
        return (
            (self.well - self.ill) & matmul_parameters(self.model).keys() if self.dtype else set()
        )

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for leaf in tree_leaves((args, kwargs)) if func not in _LOOK else ():
            if not isinstance(leaf, Tensor):
                continue
            if id(leaf) in self.originals:
                self.ill.add(self.originals[id(leaf)])
            elif id(leaf) in self.names:
                casts = func in _MULTIPLY and _autocasts(leaf.device.type, self.dtype)
                (self.well if casts else self.ill).add(self.names[id(leaf)])
        return func(*args, **kwargs)


def _autocasts(device: str, dtype: torch.dtype | None) -> bool:
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == dtype


def detached_weights(
    model: nn.Module, dtype: torch.dtype | None, cast: Collection[str]
) -> dict[str, Tensor]:
    """Return weights without a gradient: the parameters, those named in `cast` as `dtype`.

    A compiled function of these computes no weight gradients, whereas one of the parameters
    themselves would, even where only the input's gradient is asked for.
    """
    weights = {
        name: parameter.detach().to(dtype if name in cast else parameter.dtype)
        for name, parameter in model.named_parameters()
    }
    return {place: weights[name] for place, name in places(model).items()}


class Weights:
    """The weights of a training's passes, with copies in `dtype` of those named in `cast`.

    `refresh` makes the copies anew, in place; call it after every change of the parameters.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None, cast: Collection[str]) -> None:
        self.parameters = dict(model.named_parameters())
        self.masters = {name: p for name, p in self.parameters.items() if name in cast}
        copies = {
            name: torch.empty_like(master, dtype=dtype).requires_grad_()
            for name, master in self.masters.items()
        }
        self.made = list(copies.values())
        there = places(model)
        self.copies = {place: copies[name] for place, name in there.items() if name in copies}
        # One entry for each parameter, in the parameters' order: what a pass is differentiated by.
        self.leaves = [copies.get(name, p) for name, p in self.parameters.items()]
        detached = dict(zip(self.parameters, (leaf.detach() for leaf in self.leaves), strict=True))
        self.detached = {place: detached[name] for place, name in there.items()}
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the parameters as they are now."""
        if self.made:
            torch._foreach_copy_(self.made, list(self.masters.values()))


def forward(
    model: nn.Module, weights: dict[str, Tensor], dtype: torch.dtype | None, *inputs: Any
) -> Tensor:
    """Return what `model` gives for `inputs` with `weights` in the `places` of its parameters.

    It computes under autocast to `dtype`, which leaves weights that have this type alone; None is
    the type of the inputs.
    """
    device = inputs[0].device.type
    with torch.autocast(
        device, dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False
    ):
        return torch.func.functional_call(model, weights, inputs, tie_weights=False)


def compile_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a plain function, for one shape of each argument.

    Dynamo keeps its programs with the code object, eight at the most, and runs the ninth
    uncompiled. Functions that are made anew from the same source share their code object, so each
    gets one of its own here.
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


def with_state_restored(
    function: Callable[[], object], state: Iterable[Tensor], times: int
) -> None:
    """Call `function` and put `state`, which it may change, back in place, bit for bit."""
    state = [tensor.detach() for tensor in state]
    before = [tensor.clone() for tensor in state]
    for _ in range(times):
        function()
    for tensor, kept in zip(state, before, strict=True):
        tensor.copy_(kept)


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream that everything on `device` is captured on.

    Graphs share their pool's memory only where it was allocated on the same stream.
    """
    return torch.cuda.Stream(device)


class Captured:
    """A function of fixed buffers, captured as a CUDA graph at its first call and replayed after.

    `state` lists every tensor that the function changes and that outlives it, so that the warm-up
    leaves no trace. Graphs that share a `pool` share the memory of their intermediate results:
    they must never run at the same time.
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
        """Run the function on what the buffers hold now."""
        with torch.cuda.device(self.device):
            if self.graph is None:
                self.graph = self._capture()
            self.graph.replay()

    def _capture(self) -> torch.cuda.CUDAGraph:
        here, aside = torch.cuda.current_stream(), _capture_stream(self.device)
        random = torch.cuda.get_rng_state()
        aside.wait_stream(here)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(aside):
            with_state_restored(self.function, self.state(), WARM_UPS)
            try:
                # Other threads, such as a loader's that pins memory, may go on meanwhile.
                with torch.cuda.graph(
                    graph, pool=self.pool, stream=aside, capture_error_mode="thread_local"
                ):
                    self.function()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise RuntimeError(
                    "a CUDA graph cannot be captured of this network, which waits for the GPU "
                    "somewhere in its passes: use the engine compile"
                ) from error
        here.wait_stream(aside)
        torch.cuda.set_rng_state(random)
        return graph
