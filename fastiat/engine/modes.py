"""Training flags of a network during an attack, and the parts that a compiled attack depends on.

A model is any callable. The layers of a plain `nn.Module` are known, so their flags can be set.
Functions, TorchScript, `torch.fx` and exported programs may hide their layers or have a fixed mode.
For these models the mode of BatchNorm cannot be chosen, and every tensor that they write to is
restored after the attack.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
"""Names of the attributes that every module has, such as `training` and `_parameters`."""


def is_plain(model: Model) -> bool:
    """Return whether `model` is an `nn.Module` whose modules all run Python code.

    The training flags of such a model can be set.
    """
    if not isinstance(model, nn.Module):
        return False
    programs = (torch.jit.ScriptModule, torch.fx.GraphModule)
    return not any(
        isinstance(module, programs) or type(module).__module__.startswith("torch.export")
        for module in model.modules()
    )


def check_mode(model: Model, bn: BatchNormMode) -> None:
    """Raise `InputError` if the BatchNorm layers of `model` cannot be set to mode `bn`."""
    if bn != "eval" and not is_plain(model):
        raise InputError(
            f"bn {bn!r} needs a plain nn.Module, and this model is not one or "
            f"contains a module that is not, which may hide BatchNorm layers: give the nn.Module "
            f"itself, or bn='eval'"
        )


def modules_of(model: object) -> list[nn.Module]:
    """Return the modules that can be reached from a model, each once.

    These are the registered modules, and the modules found in: lists, tuples and dictionaries that
    are attributes of a module; the object of a bound method; the function and the arguments of a
    `functools.partial`; the defaults and the closure of a function.
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
            for cell in thing.__closure__ or ():
                with suppress(ValueError):  # the variable has no value yet
                    held.append(cell.cell_contents)
        else:
            held = list(thing)
        for value in held:
            visit(value)

    visit(model)
    return list(found.values())


_HOLDERS = (nn.Module, dict, list, tuple, partial, MethodType, FunctionType)


class _Flags:
    """Sets modules to eval mode and BatchNorm layers to mode `bn`, and restores their flags."""

    def __init__(self, bn: BatchNormMode) -> None:
        self.bn = bn
        self.before: dict[int, tuple[nn.Module, bool, bool]] = {}

    def set(self, modules: list[nn.Module]) -> None:
        for module in modules:
            # A frozen ScriptModule has no attribute `training`.
            if id(module) in self.before or not hasattr(module, "training"):
                continue
            tracks = module.track_running_stats if isinstance(module, _BatchNorm) else False
            self.before[id(module)] = module, module.training, tracks
            module.training = isinstance(module, _BatchNorm) and self.bn != "eval"
            if isinstance(module, _BatchNorm) and self.bn == "batch":
                # In training mode without tracking, BatchNorm uses the statistics of the batch and
                # does not write running statistics.
                module.track_running_stats = False

    def restore(self) -> None:
        # The last module first: a wrapper, such as `torch.compile` returns, passes its flag on to
        # the module that it wraps, which comes after it.
        for module, training, tracks in reversed(self.before.values()):
            module.training = training
            if isinstance(module, _BatchNorm):
                module.track_running_stats = tracks


@contextmanager
def attack_mode(model: Model, bn: BatchNormMode) -> Iterator[None]:
    """Put `model` in eval mode with its BatchNorm layers in mode `bn`; restore every flag after.

    If `model` is not a plain `nn.Module`, every module that it calls is put in eval mode too, and
    tensors that it writes to, such as running statistics, are restored. `bn` must be "eval" for
    such a model; other modes raise `InputError`.
    """
    check_mode(model, bn)
    flags = _Flags(bn)
    flags.set(modules_of(model))
    try:
        if is_plain(model):
            yield
        else:
            with _following(flags), _WritesUndone():
                yield
    finally:
        flags.restore()


@contextmanager
def _following(flags: _Flags) -> Iterator[None]:
    """Set the flags of every module that this thread calls; `flags` restores them.

    The modules that a function will call are not known before it runs, so a global forward pre-hook
    sets the flags.
    """
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


class _WritesUndone(TorchDispatchMode):
    """Restores, on exit, the tensors that operators wrote to inside the context.

    Tensors that were created inside the context are not restored.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.made: set[int] = set()
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        # Storages, not tensors: views of the same memory are restored once. Writing to a storage
        # also does not raise the version counter of a tensor that autograd has saved for a backward
        # pass outside.
        for storage in _storages(_written(func, args, kwargs)):
            if storage._cdata not in self.made and storage._cdata not in self.before:
                self.before[storage._cdata] = storage, storage.clone()
        # TorchScript passes constant tensors as numbers, which the operator would reject.
        args = tuple(
            torch.tensor(given)
            if isinstance(given, _NUMBERS) and isinstance(argument.type, torch.TensorType)
            else given
            for given, argument in zip(args, func._schema.arguments, strict=False)
        )
        given = {storage._cdata for storage in _storages((args, kwargs))}
        out = func(*args, **kwargs)
        # An in-place operator returns its argument, which is not a new tensor.
        self.made.update({storage._cdata for storage in _storages(out)} - given)
        return out

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)
        for storage, before in self.before.values():
            storage.copy_(before)


_NUMBERS = (bool, int, float, complex)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    """Return the storages of all strided tensors in `tree`; sparse tensors have no storage."""
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return [t.untyped_storage() for t in tensors if t.layout == torch.strided]


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return the arguments that a call of `func` writes to."""
    # The schemas of some normalisations do not declare that they update running statistics.
    normalises = "batch_norm" in func._schema.name and "backward" not in func._schema.name
    found = []
    for position, argument in enumerate(func._schema.arguments):
        hidden = normalises and argument.name in ("running_mean", "running_var")
        if hidden or (argument.alias_info is not None and argument.alias_info.is_write):
            found.append(args[position] if position < len(args) else kwargs.get(argument.name))
    return found


def structure(model: nn.Module, *, constants: bool, addresses: bool) -> tuple[Any, ...]:
    """Return the parts of `model` that a compiled program depends on, to be compared with `==`.

    These are the modules, their classes, `forward` methods and hooks, the names of the parameters
    and which of them are tied. Dynamo guards only some of these. Training flags and values of
    tensors are not included, because the program reads them. `constants` adds the numbers and the
    strings that are attributes of modules, `addresses` the addresses of tensors.
    """
    order: dict[int, int] = {}
    found: list[Any] = [tuple(getattr(torch_module, f"_global{hooks}")) for hooks in HOOKS]
    for module in modules_of(model):
        attributes = vars(module)
        # Objects, not their `id`: the id of a deleted object may be used for a new object.
        found += [module, type(module), attributes.get("forward"), type(module).forward]
        found += [tuple(attributes[hooks]) for hooks in HOOKS]
        found += module._modules.items()
        for name, parameter in module._parameters.items():
            # Parameters are numbered in order. A tied parameter keeps its first number.
            tied = parameter is None or order.setdefault(id(parameter), len(order))
            found.append((name, tied))
        own = [(name, value) for name, value in attributes.items() if name not in _OWN]
        if constants:
            found += [(name, value) for name, value in own if isinstance(value, _CONSTANTS)]
        if addresses:
            tensors = [*module._parameters.values(), *module._buffers.values()]
            tensors += [value for _, value in own if isinstance(value, Tensor)]
            found += [tensor.data_ptr() for tensor in tensors if tensor is not None]
    return tuple(found)


_CONSTANTS = (bool, int, float, str, type(None))
