"""Adversaries: FGSM and PGD in the L-infinity and L2 balls, as functions of their arguments.

An attack changes nothing but its result: module modes come back as they were, no parameter gets
a gradient, and everything random comes from the generator it is given. Attacks work under
`torch.no_grad` and `torch.inference_mode` too.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastiat import kernels
from fastiat.errors import InputError
from fastiat.models import normalisation_layers, to_pixels

Norm = Literal["linf", "l2"]
Loss = Literal["ce", "margin"]
BatchNormMode = Literal["eval", "batch", "update"]
Model = Callable[[Tensor], Tensor]


def fgsm(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float = 0.03,
    clip: tuple[float, float] = (0.0, 1.0),
    norm: Norm = "linf",
    loss: Loss = "ce",
    bn: BatchNormMode = "eval",
) -> Tensor:
    """Return the fast gradient sign examples of `x`: one step of length `eps` from `x` itself.

    (Goodfellow et al. 2015; with `norm` "l2" the step is along the gradient.) Arguments and errors
    as for `pgd`.
    """
    return pgd(
        model, x, y, eps=eps, alpha=eps, steps=1, random_start=False, norm=norm, loss=loss, bn=bn,
        clip=clip,
    )  # fmt: skip


def pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float = 0.03,
    alpha: float = 0.0075,
    steps: int = 7,
    random_start: bool = True,
    norm: Norm = "linf",
    loss: Loss = "ce",
    restarts: int = 1,
    bn: BatchNormMode = "eval",
    generator: torch.Generator | None = None,
    clip: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Return untargeted adversarial examples of `x` by projected gradient descent.

    (Madry et al. 2018; section 4.1 of the IAT paper gives eps 0.03, alpha 0.0075, 7 steps.)

    model: returns logits (B, K) for pixels; used under the caller's autocast, if any.
    x: (B, ...) floating-point pixels inside `clip`; the result has its dtype and memory format.
    y: (B,) int64 true labels.
    eps, alpha: radius of the ball and length of a step, in the units of `x`.
    steps: gradient steps from each start, at least 1.
    random_start: start uniformly in the ball (then clipped) instead of at `x`.
    norm: "linf", or "l2" with the norm taken over each image.
    loss: what is maximised: "ce", cross-entropy, or "margin", the best wrong logit minus the true
        one (Carlini & Wagner 2017).
    restarts: independent starts; each image keeps its worst: fooled before not, then the larger
        loss. Needs `random_start` when above 1.
    bn: BatchNorm while crafting: "eval" uses the running statistics, "batch" the batch's own,
        "update" too and lets them move the running ones. Everything else is in eval mode.
    generator: source of the random starts, on the device of `x`; None takes torch's global one.
    clip: allowed range of a pixel.

    A NaN gradient moves nothing. Raises `InputError` (a `ValueError`) for settings outside these
    ranges and `TypeError` for tensors of the wrong dtype; neither looks at tensor values.
    """
    _check_settings(
        eps=eps, alpha=alpha, steps=steps, random_start=random_start, norm=norm, loss=loss,
        restarts=restarts, bn=bn, clip=clip,
    )  # fmt: skip
    _check_batch(x, y)
    x = x.detach()
    if eps == 0:
        return x.clone()
    step = kernels.pgd_step if norm == "linf" else kernels.pgd_step_l2
    with crafting(model, bn):
        best = fooled = height = None
        for _ in range(restarts):
            x_adv = start_in_ball(x, eps, norm, clip, generator) if random_start else x.clone()
            for _ in range(steps):
                x_adv = step(x_adv, input_gradient(model, x_adv, y, loss), x, eps, alpha, clip)
            if restarts == 1:
                return x_adv
            now_fooled, now_height = _outcome(model, x_adv, y, loss)
            if best is None or fooled is None or height is None:
                best, fooled, height = x_adv, now_fooled, now_height
                continue
            worse = (now_fooled & ~fooled) | ((now_fooled == fooled) & (now_height > height))
            best = torch.where(_per_image(worse, x), x_adv, best)
            fooled, height = fooled | now_fooled, torch.where(worse, now_height, height)
    assert best is not None
    return best


class PGD:
    """`pgd` with its settings fixed: `attack = PGD(model, eps=8 / 255)`, then `attack(x, y)`.

    Takes the keyword arguments of `pgd`; wrong ones are refused here, before there is a batch.
    """

    def __init__(self, model: Model, **settings: Any) -> None:
        defaults: dict[str, Any] = pgd.__kwdefaults__ or {}
        unknown = settings.keys() - defaults.keys()
        if unknown:
            raise TypeError(f"PGD has no setting {', '.join(sorted(unknown))}")
        self.model = model
        self.settings = {**defaults, **settings}
        _check_settings(**{k: v for k, v in self.settings.items() if k != "generator"})

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the adversarial examples of pixels `x`, (B, ...), with true labels `y`, (B,)."""
        return pgd(self.model, x, y, **self.settings)


@contextmanager
def crafting(model: Model, bn: BatchNormMode) -> Iterator[None]:
    """Put `model` in eval mode with its BatchNorm layers in mode `bn`; restore every flag after."""
    if not isinstance(model, nn.Module):
        yield
        return
    before = [(module, module.training) for module in model.modules()]
    layers = normalisation_layers(model)
    tracking = [layer.track_running_stats for layer in layers]
    for module, _ in before:
        module.training = False
    for layer in layers if bn != "eval" else ():
        layer.training = True
        if bn == "batch":
            # A training BatchNorm that tracks nothing normalises by the batch and keeps its buffers
            layer.track_running_stats = False
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
        for layer, tracked in zip(layers, tracking, strict=True):
            layer.track_running_stats = tracked


def count_errors(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    craft: Callable[[Tensor, Tensor], Tensor] | None = None,
    advance: Callable[[int], object] = lambda images: None,
) -> int:
    """Return how many images `model`, in eval mode and fp32, gets wrong after `craft`.

    `batches` yields uint8 images (B, C, H, W) and labels (B,); `craft(x, y)` attacks pixels, None
    leaves them as they are; `advance` is told the number of images after every batch.
    """
    wrong: Tensor | int = 0
    with crafting(model, "eval"):
        for images, y in batches:
            x = to_pixels(images)
            if craft is not None:
                x = craft(x, y)
            with torch.no_grad():
                wrong = wrong + (model(x).argmax(1) != y).sum()
            advance(len(y))
    return int(wrong)


def objective(logits: Tensor, y: Tensor, loss: Loss) -> Tensor:
    """Return what an attack maximises, one value per image, (B,), in fp32 at least."""
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    if loss == "ce":
        return F.cross_entropy(logits, y, reduction="none")
    label = y[:, None]
    wrong = logits.scatter(1, label, -torch.inf).amax(1)
    return wrong - logits.gather(1, label).squeeze(1)


def input_gradient(model: Model, x: Tensor, y: Tensor, loss: Loss = "ce") -> Tensor:
    """Return the gradient, shaped like `x`, of the batch's summed objective in the input alone.

    The sum, not the mean, so that an image's gradient does not shrink with the batch.
    """
    with torch.inference_mode(False), torch.enable_grad():
        # Autograd takes a tensor that was made in inference mode only as a copy.
        x, y = (t.clone() if t.is_inference() else t for t in (x, y))
        x = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(objective(model(x), y, loss).sum(), x)
    return grad


def start_in_ball(
    x: Tensor,
    eps: float,
    norm: Norm,
    clip: tuple[float, float],
    generator: torch.Generator | None,
) -> Tensor:
    """Return points uniform in the ball around each image, clipped to the pixel range.

    In the L-infinity ball one seed is drawn from `generator`, on the device of `x`, and the rest
    is `kernels.random_start`, so that a captured graph with the same seed starts at the same points.
    """
    if norm == "linf":
        seed = torch.empty((), dtype=torch.int64, device=x.device).random_(generator=generator)
        return kernels.random_start(x, eps, seed, clip)
    # A uniform direction, with a radius whose d-th power is uniform.
    noise = torch.empty_like(x).normal_(generator=generator)
    radius = torch.rand(len(x), dtype=x.dtype, device=x.device, generator=generator)
    radius = eps * radius.pow(len(x) / max(x.numel(), 1))
    length = torch.linalg.vector_norm(noise.flatten(1), dim=1).clamp_min(1e-12)
    return (x + noise * _per_image(radius / length, x)).clamp_(*clip)


def _per_image(values: Tensor, x: Tensor) -> Tensor:
    """View (B,) values so that they broadcast over the images of `x`."""
    return values.view(-1, *[1] * (x.dim() - 1))


@torch.no_grad()
def _outcome(model: Model, x: Tensor, y: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """Return which images the model gets wrong, (B,) bool, and their objective, (B,)."""
    logits = model(x)
    return logits.argmax(1) != y, objective(logits, y, loss)


def _check_settings(
    *,
    eps: float,
    alpha: float,
    steps: int,
    random_start: bool,
    norm: str,
    loss: str,
    restarts: int,
    bn: str,
    clip: tuple[float, float],
) -> None:
    for name, value in (("eps", eps), ("alpha", alpha)):
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"{name} is {value}: give a finite number, at least 0, in pixel units")
    for name, count in (("steps", steps), ("restarts", restarts)):
        if count < 1:
            raise InputError(f"{name} is {count}: give at least 1")
    if not clip[0] < clip[1]:
        raise InputError(f"clip is {clip}: give the lowest pixel value, then the highest")
    choices = {
        "norm": (norm, ("linf", "l2")),
        "loss": (loss, ("ce", "margin")),
        "bn": (bn, ("eval", "batch", "update")),
    }
    for name, (given, allowed) in choices.items():
        if given not in allowed:
            raise InputError(f"unknown {name} {given!r}: choose from {', '.join(allowed)}")
    if restarts > 1 and not random_start:
        raise InputError(f"{restarts} restarts without a random start would all be the same")


def _check_batch(x: Tensor, y: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}: an attack needs floating-point pixels, such as x / 255")
    if y.dtype != torch.int64:
        raise TypeError(f"y is {y.dtype}: class labels are int64")
    if x.dim() < 2 or y.shape != x.shape[:1]:
        raise InputError(f"x is {tuple(x.shape)} and y {tuple(y.shape)}: give (B, ...) and (B,)")
