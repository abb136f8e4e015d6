"""Modes: how a network is set while it is attacked, and what of it a compiled attack depends on.

A model is any callable. What is a plain `nn.Module` shows its layers. Functions, TorchScript,
`torch.fx` and exported programs may hide theirs, or have their modes fixed: for these BatchNorm
cannot be chosen, and everything that they write to is put back.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastiat.system.errors import InputError

BatchNormMode = Literal["eval", "batch", "update"]
Model = Callable[[Tensor], Tensor]

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_OWN = frozenset(vars(nn.Module()))
"""Attributes that every module has."""


def is_plain(model: Model) -> bool:
    """Whether `model` is an `nn.Module` of Python code alone, whose modes can be set."""
    if not isinstance(model, nn.Module):
        return False
    programs = (torch.jit.ScriptModule, torch.fx.GraphModule)
    return not any(
        isinstance(module, programs) or type(module).__module__.startswith("torch.export")
        for module in model.modules()
    )


def check_mode(model: Model, bn: BatchNormMode) -> None:
    """Raise `InputError` where the BatchNorm layers of `model` cannot be set to `bn`."""
    if bn != "eval" and not is_plain(model):
        raise InputError(
            f"bn {bn!r} sets the BatchNorm layers of a plain nn.Module, and a {_kind(model)} may "
            f"hide them: give the nn.Module itself, or bn='eval'"
        )


def _kind(model: Model) -> str:
    modules = model.modules() if isinstance(model, nn.Module) else ()
    hidden = (module for module in modules if not is_plain(module))
    return type(min(hidden, key=lambda m: len(list(m.modules())), default=model)).__name__


def modules_of(model: object) -> list[nn.Module]:
    """Return the modules that can be reached from a model, each once.

    Beside the registered ones: those in lists, tuples and dictionaries that modules keep, the owner
    of a bound method, and what a partial or a function holds.
    """
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()

    def visit(thing: Any) -> None:
        if id(thing) in seen or not isinstance(thing, _HOLDERS):
            return
        seen.add(id(thing))
        if isinstance(thing, nn.Module):
            found[id(thing)] = thing
            held = [*thing.children(), *(v for k, v in vars(thing).items() if k not in _OWN)]
        elif isinstance(thing, dict):
            held = list(thing.values())
        elif isinstance(thing, partial):
            held = [thing.func, *thing.args, *thing.keywords.values()]
        elif isinstance(thing, MethodType):
            held = [thing.__self__]
        elif isinstance(thing, FunctionType):
            held = [*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()]
            held += [cell.cell_contents for cell in thing.__closure__ or () if _filled(cell)]
        else:
            held = list(thing)
        for value in held:
            visit(value)

    visit(model)
    return list(found.values())


_HOLDERS = (nn.Module, dict, list, tuple, partial, MethodType, FunctionType)


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


class _Flags:
    """Sets modules to eval mode, their BatchNorm layers to mode `bn`, and back."""

    def __init__(self, bn: BatchNormMode) -> None:
        self.bn = bn
        self.before: dict[int, tuple[nn.Module, bool, bool]] = {}

    def set(self, modules: list[nn.Module]) -> None:
        for module in modules:
            # A frozen ScriptModule has no mode.
            if id(module) in self.before or not hasattr(module, "training"):
                continue
            tracks = module.track_running_stats if isinstance(module, _BatchNorm) else False
            self.before[id(module)] = module, module.training, tracks
            module.training = isinstance(module, _BatchNorm) and self.bn != "eval"
            if isinstance(module, _BatchNorm) and self.bn == "batch":
                # In training mode it normalises by the batch then, and keeps its buffers.
                module.track_running_stats = False

    def restore(self) -> None:
        for module, training, tracks in self.before.values():
            module.training = training
            if isinstance(module, _BatchNorm):
                module.track_running_stats = tracks


@contextmanager
def attack_mode(model: Model, bn: BatchNormMode) -> Iterator[None]:
    """Put `model` in eval mode with its BatchNorm layers in mode `bn`; restore every flag after.

    What is no plain `nn.Module` is followed while it runs: the modules that it calls are put in
    eval mode as well, and tensors that it writes to, such as running statistics, get their values
    back. Raises `InputError` for such a model and another `bn` than "eval".
    """
    check_mode(model, bn)
    flags = _Flags(bn)
    flags.set(modules_of(model))
    try:
        if is_plain(model):
            yield
        else:
            with _following(flags), _Unwritten():
                yield
    finally:
        flags.restore()


@contextmanager
def _following(flags: _Flags) -> Iterator[None]:
    """Set the flags of every module that this thread calls."""
    thread = threading.get_ident()

    def follow(module: nn.Module, _: object) -> None:
        if torch.compiler.is_compiling() or threading.get_ident() != thread:
            return
        if id(module) not in flags.before:
            flags.set(modules_of(module))

    handle = torch_module.register_module_forward_pre_hook(follow)
    try:
        yield
    finally:
        handle.remove()


class _Unwritten(TorchDispatchMode):
    """Gives tensors from outside of the block that were written to in it their values back."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.made: set[int] = set()
        self.kept: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        for tensor in _written(func, args, kwargs):
            key = (_memory(tensor), tensor.storage_offset(), tensor.shape, tensor.stride())
            if key[0] not in self.made and key not in self.kept:
                self.kept[key] = tensor, tensor.detach().clone()
        # TorchScript hands tensors that are constants over as numbers.
        args = tuple(
            torch.tensor(given) if isinstance(given, _NUMBERS) and _is_tensor(argument) else given
            for given, argument in zip(args, func._schema.arguments, strict=False)
        )
        given = {_memory(tensor) for tensor in _tensors((args, kwargs))}
        out = func(*args, **kwargs)
        self.made.update({_memory(tensor) for tensor in _tensors(out)} - given)
        return out

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)
        for tensor, value in reversed(self.kept.values()):
            # Not in view of autograd, which may have saved the tensor for a pass outside.
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                tensor.data.copy_(value)


_NUMBERS = (bool, int, float, complex)


def _is_tensor(argument: Any) -> bool:
    return isinstance(argument.type, torch.TensorType)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    """Return what identifies the memory of a tensor while it lives."""
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors that a call of `func` writes to."""
    arguments = func._schema.arguments
    # Some of these have schemas that do not say so.
    normalises = "batch_norm" in func._schema.name and "backward" not in func._schema.name
    found = []
    for position, argument in enumerate(arguments):
        given = args[position] if position < len(args) else kwargs.get(argument.name)
        hidden = normalises and argument.name in ("running_mean", "running_var")
        if hidden or (argument.alias_info is not None and argument.alias_info.is_write):
            found += _tensors(given)
    return found


class Structure:
    """What a compiled program of `model` depends on, beside its modes and its tensors' values.

    Modules, their classes, `forward`s, hooks and names of parameters, and which of these are tied.
    With `captured`, also where the tensors are in memory, and the numbers and texts that modules
    keep: a CUDA graph has them as constants.
    """

    def __init__(self, model: nn.Module, captured: bool) -> None:
        order: dict[int, int] = {}
        found: list[Any] = [tuple(getattr(torch_module, f"_global{name}")) for name in HOOKS]
        # What is told by its identity must live on, lest another take that over.
        self.alive: list[Any] = []
        for module in modules_of(model):
            attributes = vars(module)
            forwards = attributes.get("forward"), type(module).forward
            self.alive += [module, *forwards]
            found += [id(module), type(module), *map(id, forwards)]
            found += [tuple(attributes[name]) for name in HOOKS]
            found += [(name, id(child)) for name, child in module._modules.items()]
            for name, parameter in module._parameters.items():
                found.append(
                    (name, parameter is None or order.setdefault(id(parameter), len(order)))
                )
            if captured:
                tensors = [*module._parameters.values(), *module._buffers.values()]
                found += [tensor.data_ptr() for tensor in tensors if tensor is not None]
                found += [
                    (name, value.data_ptr() if isinstance(value, Tensor) else value)
                    for name, value in attributes.items()
                    if name not in _OWN and isinstance(value, _VALUES)
                ]
        self.found = tuple(found)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Structure) and self.found == other.found

    __hash__ = None  # type: ignore[assignment]


_VALUES = (bool, int, float, str, Tensor, type(None))
