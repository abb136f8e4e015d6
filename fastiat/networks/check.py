"""Check, before a training or a measurement, that a network is one that fastiat can work with."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
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
    """Return the modules whose outputs can be mixed, by their names in `named_modules`.

    In a `Normalised` network the names are relative to the network itself.
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
            names = choose_module(name, known)
            raise InputError(f"{asked} {name}: the network has no module of this name: {names}")
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


def _refusal(model: nn.Module, fault: str) -> InputError:
    return InputError(f"the network {type(inner(model)).__name__} {fault}")


def _check_trainable(model: nn.Module) -> None:
    """Raise `InputError` for a network that has nothing to train or cannot be saved."""
    if isinstance(model, torch.jit.ScriptModule):
        raise _refusal(model, "is TorchScript: give the nn.Module it was made from")
    if not any(p.requires_grad for p in model.parameters()):
        raise _refusal(model, "has no parameter that requires a gradient: nothing can be trained")
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise _refusal(
                model,
                f"has {key} in its state_dict, a {type(value).__name__}: keep only tensors there, "
                f"as a run saves only tensors",
            )


def _check_gradients(model: nn.Module, pixels: Tensor, trained: bool) -> None:
    """Raise `InputError` unless the logits have gradients: of the pixels, and of a parameter."""
    name = type(inner(model)).__name__
    x = pixels.clone().requires_grad_()
    asked = [p for p in model.parameters() if p.requires_grad] if trained else []
    with _running(model, x, "fails in its backward pass"), torch.enable_grad():
        logits = model(x)
        grads: Sequence[Tensor | None] = [None]
        if logits.requires_grad:
            grads = torch.autograd.grad(logits.sum(), [x, *asked], allow_unused=True)
    missing = f"the logits of the network {name} have no gradient with respect to"
    if grads[0] is None:
        raise InputError(
            f"{missing} its pixels, which an attack needs: remove detach() and no_grad() from its "
            f"forward pass"
        )
    if asked and all(grad is None for grad in grads[1:]):
        raise InputError(f"{missing} its parameters: there is nothing to train")


@contextmanager
def _running(model: nn.Module, x: Tensor, fault: str) -> Iterator[None]:
    """Run the block with `model` in eval mode; restore its flags and the random numbers.

    An error, of any type as the network is the user's code, becomes `InputError` with `fault`.
    """
    devices = [x.device] if x.is_cuda else []
    try:
        with torch.random.fork_rng(devices), attack_mode(model, "eval"):
            yield
    except Exception as error:
        if out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {one_line(error)[:150]}"
        raise _refusal(model, f"{fault}: {reason}") from error


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
    outputs: dict[str, list[Any]] = {name: [] for name in known}
    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: outputs[name].append(output))
        for name, module in known.items()
    ]
    x = pixels.clone()
    before = [buffer.clone() for buffer in model.buffers()]
    size = "x".join(map(str, pixels.shape[1:]))
    fault = f"fails on {IMAGES} images of {size} (channels, height, width)"
    try:
        with _running(model, x, fault), torch.no_grad():
            if training:
                model.train()
            logits = model(x)
    finally:
        for hook in hooks:
            hook.remove()
        for buffer, kept in zip(model.buffers(), before, strict=True):
            buffer.copy_(kept)
    mode = "training" if training else "eval"
    if not isinstance(logits, Tensor):
        kind = type(logits).__name__
        raise _refusal(model, f"returns a {kind} in {mode} mode: make it return the logits alone")
    if logits.shape != (IMAGES, num_classes) or not logits.is_floating_point():
        raise _refusal(
            model,
            f"returns {logits.dtype} of shape {tuple(logits.shape)} for {IMAGES} images of "
            f"{num_classes} classes: make it return logits of shape ({IMAGES}, {num_classes})",
        )
    if logits.isnan().any():
        fault = f"returns NaN for random pixels in {mode} mode"
        raise _refusal(model, f"{fault}: check its weights and its running statistics")
    if not torch.equal(x, pixels):
        raise _refusal(
            model, "changes its input in place: make it work on a copy, such as x = x * 1"
        )
    return outputs
