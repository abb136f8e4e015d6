"""Check, before a training or a measurement, that a network is one that fastiat can work with."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastiat.engine.modes import attack_mode
from fastiat.networks.normalise import inner
from fastiat.system.errors import InputError, one_line, out_of_memory
from fastiat.system.settings import closest

IMAGES = 2
"""Number of images in a trial pass: BatchNorm in training mode needs two values per channel."""


def named_points(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules whose outputs can be mixed, by the names that a user gives.

    The names are those of `named_modules`. In a `Normalised` network they are relative to the
    network itself.
    """
    return {name: module for name, module in inner(model).named_modules() if name}


def choose_module(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about the mix point `name`: the modules to choose from."""
    known = list(known)
    # The outermost modules: a deep network has hundreds.
    names = closest(name, known, 3) or sorted(known, key=lambda other: other.count("."))[:12]
    return f"choose input or a module such as {', '.join(names)}" if names else "choose input"


def check_network(
    model: nn.Module,
    shape: tuple[int, int, int],
    num_classes: int,
    points: Sequence[str] = (),
    *,
    chosen: bool = True,
    trained: bool = True,
    attacked: bool = True,
) -> None:
    """Raise `InputError` unless `model` maps pixels to logits and can be trained by fastiat.

    model: called with `IMAGES` images of `shape`, (C, H, W), once in training mode and once in eval
        mode. Buffers, flags and random numbers are restored.
    num_classes: number of logits that it must return.
    points: names of mix points. Each module must run once in a pass and return a tensor with a row
        for each image.
    chosen: whether the user has named the mix points.
    trained: False only asks for a network that can be measured.
    attacked: whether the logits must have a gradient with respect to the pixels.
    """
    network = inner(model)
    parameters = dict(network.named_parameters())
    if trained:
        _check_trainable(network)
    for name, tensor in [*parameters.items(), *network.named_buffers()]:
        if is_lazy(tensor):
            raise InputError(
                f"the network's {name} gets its shape in the first pass: call the network on a "
                f"batch of images before you give it to fastiat"
            )
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise InputError(
                f"the network's {name} is {tensor.dtype}: give a network in float32, such as "
                f"model.float(); --precision bf16 makes it compute in bfloat16"
            )
    known = named_points(model)
    asked = "--mix-at" if chosen else "the default mix point"
    choose = "" if chosen else "with --mix-at, "
    for name in points:
        if name != "input" and name not in known:
            raise InputError(
                f"{asked} {name}: the network has no module of this name: "
                f"{choose_module(name, known)}"
            )
    tensors = (*parameters.values(), *model.buffers())
    device = tensors[0].device if tensors else "cpu"
    pixels = torch.rand(IMAGES, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    # Only modules that can be watched, and only if their outputs matter.
    watched = {
        name: module
        for name, module in known.items()
        if any(name != "input" for name in points)
        and not isinstance(module, torch.jit.ScriptModule)
    }
    for training in (True, False) if trained else (False,):
        outputs = _trial(model, pixels, watched, num_classes, training)
        for name in points:
            fault = None if name == "input" else _fault(outputs[name])
            if fault:
                whole = [other for other, found in outputs.items() if not _fault(found)]
                raise InputError(
                    f"{asked} {name}: this module {fault}, so its output cannot be mixed: "
                    f"{choose}{choose_module(name, whole)}"
                )
    if attacked:
        _check_gradients(model, pixels, trained)


def _check_trainable(model: nn.Module) -> None:
    """Raise `InputError` for a network that has nothing to train or cannot be saved."""
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(f"the network {name} is TorchScript: give the nn.Module it was made from")
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError(
            f"the network {name} has no parameter that requires a gradient: there is nothing to "
            f"train"
        )
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise InputError(
                f"the network {name} has {key} in its state_dict, a {type(value).__name__}: keep "
                f"only tensors there, as a run saves only tensors"
            )


def _check_gradients(model: nn.Module, pixels: Tensor, trained: bool) -> None:
    """Raise `InputError` unless the logits have gradients: of the pixels, and of a parameter."""
    name = type(inner(model)).__name__
    x = pixels.clone().requires_grad_()
    asked = [p for p in model.parameters() if p.requires_grad] if trained else []
    devices = [x.device] if x.is_cuda else []
    try:
        with torch.random.fork_rng(devices), torch.enable_grad(), attack_mode(model, "eval"):
            logits = model(x)
            grads: Sequence[Tensor | None] = [None]
            if logits.requires_grad:
                grads = torch.autograd.grad(logits.sum(), [x, *asked], allow_unused=True)
    except Exception as error:
        # The network is the user's code: it may raise anything.
        if out_of_memory(error):
            raise
        raise InputError(
            f"the network {name} fails in its backward pass: {type(error).__name__}: "
            f"{one_line(error)[:150]}"
        ) from error
    if grads[0] is None:
        raise InputError(
            f"the logits of the network {name} have no gradient with respect to its pixels, which "
            f"an attack needs: remove detach() and no_grad() from its forward pass"
        )
    if asked and all(grad is None for grad in grads[1:]):
        raise InputError(
            f"the logits of the network {name} have no gradient with respect to its parameters: "
            f"there is nothing to train"
        )


def check_batch_of_one(model: nn.Module, shape: tuple[int, ...], batch_size: int) -> None:
    """Raise `InputError` if BatchNorm has only one value per channel in a batch of `shape`."""
    probe = copy.deepcopy(model).train()
    device = next(probe.parameters()).device
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            probe(torch.zeros(shape, device=device))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise InputError(
            f"--batch-size {batch_size} is one image per process, and BatchNorm needs more than "
            f"one value per channel, which images of {shape[-1]}x{shape[-1]} pixels do not give: "
            "give each process two images or more, or larger images"
        ) from None


def _fault(outputs: list[Any]) -> str:
    """Return why a module with these outputs of one pass is no mix point, or ""."""
    if len(outputs) != 1:
        return f"runs {len(outputs)} times in a pass" if outputs else "does not run"
    (output,) = outputs
    if not isinstance(output, Tensor):
        return f"returns a {type(output).__name__}"
    if output.dim() == 0 or len(output) != IMAGES or not output.is_floating_point():
        return f"returns a {output.dtype} tensor of shape {tuple(output.shape)} for {IMAGES} images"
    return ""


def _trial(
    model: nn.Module,
    pixels: Tensor,
    known: dict[str, nn.Module],
    num_classes: int,
    training: bool,
) -> dict[str, list[Any]]:
    """Run one pass, check its logits, and return the outputs of every module, by its name."""
    kind = type(inner(model)).__name__
    outputs: dict[str, list[Any]] = {name: [] for name in known}
    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: outputs[name].append(output))
        for name, module in known.items()
    ]
    x = pixels.clone()
    before = [buffer.clone() for buffer in model.buffers()]
    devices = [x.device] if x.is_cuda else []
    try:
        # `attack_mode` restores every flag, also those that `train` sets.
        with torch.random.fork_rng(devices), torch.no_grad(), attack_mode(model, "eval"):
            if training:
                model.train()
            logits = model(x)
    except Exception as error:
        # The network is the user's code: it may raise anything.
        if out_of_memory(error):
            raise
        size = "x".join(map(str, pixels.shape[1:]))
        raise InputError(
            f"the network {kind} fails on {IMAGES} images of {size} (channels, "
            f"height, width): {type(error).__name__}: {one_line(error)[:150]}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        for buffer, kept in zip(model.buffers(), before, strict=True):
            buffer.copy_(kept)
    mode = "training" if training else "eval"
    if not isinstance(logits, Tensor):
        raise InputError(
            f"the network {kind} returns a {type(logits).__name__} in {mode} mode: "
            f"make it return the logits alone"
        )
    if logits.shape != (IMAGES, num_classes) or not logits.is_floating_point():
        raise InputError(
            f"the network {kind} returns {logits.dtype} of shape "
            f"{tuple(logits.shape)} for {IMAGES} images of {num_classes} classes: make it return "
            f"logits of shape ({IMAGES}, {num_classes})"
        )
    if logits.isnan().any():
        raise InputError(
            f"the network {kind} returns NaN for random pixels in {mode} mode: "
            f"check its weights and its running statistics"
        )
    if not torch.equal(x, pixels):
        raise InputError(
            f"the network {kind} changes its input in place: make it work on a "
            f"copy, such as x = x * 1"
        )
    return outputs
