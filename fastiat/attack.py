"""Adversaries: FGSM and PGD in the L-infinity and L2 balls, as functions of their arguments.

An attack changes nothing but its result: module modes come back as they were, no parameter gets
a gradient, and everything random comes from the generator it is given. Attacks work under
`torch.no_grad` and `torch.inference_mode` too.
"""

import math
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastiat import kernels
from fastiat.ascent import (
    Loss,
    Norm,
    PGDLoop,
    Starts,
    gradient,
    input_gradient,
    objective,
    per_image,
    start_in_ball,
)
from fastiat.engine import graphs as engines
from fastiat.engine.device import autocast
from fastiat.engine.graphs import Engine
from fastiat.engine.modes import BatchNormMode, Model, Structure, attack_mode, check_mode, is_plain
from fastiat.mix import check_labels
from fastiat.models import correct, to_pixels
from fastiat.system.errors import InputError

__all__ = [
    "PGD",
    "BatchNormMode",
    "attack_mode",
    "count_errors",
    "fgsm",
    "gradient",
    "input_gradient",
    "objective",
    "pgd",
    "start_in_ball",
]


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
    generator: torch.Generator | Starts | None = None,
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
        "update" too and lets them move the running ones. Everything else is in eval mode. For
        functions, TorchScript, `torch.fx` and exported programs only "eval": their layers may be
        out of sight.
    generator: source of the random starts, on the device of `x`; None takes torch's global one;
        `Starts` for a batch that is a part of more images.
    clip: allowed range of a pixel.

    A NaN gradient moves nothing. Raises `InputError` (a `ValueError`) for settings outside these
    ranges, `TypeError` for tensors of the wrong dtype and, on the CPU, `InputError` for labels
    outside 0..K-1; on CUDA, where looking would wait, these fail a device-side assertion.
    """
    _check_settings(
        eps=eps, alpha=alpha, steps=steps, random_start=random_start, norm=norm, loss=loss,
        restarts=restarts, bn=bn, clip=clip,
    )  # fmt: skip
    _check_batch(x, y)
    x = x.detach()
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module  # its forward waits for the other ranks
    if eps == 0:
        return x.clone()
    step = kernels.pgd_step if norm == "linf" else kernels.pgd_step_l2

    def climb() -> Tensor:
        x_adv = start_in_ball(x, eps, norm, clip, generator) if random_start else x.clone()
        for _ in range(steps):
            x_adv = step(x_adv, input_gradient(model, x_adv, y, loss), x, eps, alpha, clip)
        return x_adv

    with attack_mode(model, bn):
        return _worst(restarts, climb, lambda x_adv: _outcome(model(x_adv), y, loss))


class PGD:
    """`pgd` made ready once: `attack = PGD(model, eps=8 / 255)`, then `attack(x, y)` many times.

    Takes the keyword arguments of `pgd`; wrong ones are refused here, before there is a batch.

    engine: "eager" is `pgd` itself; "compile" compiles the network for every shape of batch that
        comes, with no gradient but the input's; "graph" also captures the start and all steps as
        one CUDA graph, and replays it. "auto" takes "eager" for all but a plain `nn.Module`, else
        "graph" on CUDA, else "compile" where there is a compiler, else "eager".
    precision: arithmetic of the network, "bf16" or "fp32"; the iterate and the loss stay in the
        type of `x`. None follows the caller's autocast, as `pgd` does.

    The weights are read anew at every call, so the model may be trained in between; where its
    layers, hooks or `forward`s have changed, it is compiled anew. The same generator gives the same
    random starts under every engine. An attack belongs to one thread.
    """

    def __init__(
        self,
        model: Model,
        *,
        engine: Engine = "auto",
        precision: Literal["bf16", "fp32"] | None = None,
        **settings: Any,
    ) -> None:
        defaults: dict[str, Any] = pgd.__kwdefaults__ or {}
        unknown = settings.keys() - defaults.keys()
        if unknown:
            raise TypeError(f"PGD has no setting {', '.join(sorted(unknown))}")
        if engine not in get_args(Engine):
            raise InputError(
                f"unknown engine {engine!r}: choose from {', '.join(get_args(Engine))}"
            )
        if precision not in (None, "bf16", "fp32"):
            raise InputError(f"unknown precision {precision!r}: choose from bf16, fp32")
        # Functions of the weights cannot go through the wrappers of several GPUs, and need not.
        wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
        self.model = model.module if isinstance(model, wrappers) else model
        if engine in ("compile", "graph") and not is_plain(self.model):
            raise InputError(
                f"engine {engine!r} needs an nn.Module, to know the weights by, and a "
                f"{type(model).__name__} is or has no plain nn.Module: use the engine eager"
            )
        self.engine, self.precision = engine, precision
        self.settings = {**defaults, **settings}
        _check_settings(**{k: v for k, v in self.settings.items() if k != "generator"})
        check_mode(self.model, self.settings["bn"])
        self._climbs: dict[Hashable, PGDLoop] = {}

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the adversarial examples of pixels `x`, (B, ...), with true labels `y`, (B,)."""
        engine = self._engine(x.device)
        if engine == "eager" or self.settings["eps"] == 0:
            if self.precision is None:
                return pgd(self.model, x, y, **self.settings)
            with autocast(x.device, self.precision):
                return pgd(self.model, x, y, **self.settings)
        assert isinstance(self.model, nn.Module)
        _check_batch(x, y)
        # Buffers that are made in inference mode could not be used outside of it.
        with torch.inference_mode(False), torch.no_grad():
            climb = self._climb(self.model, x, y, captured=engine == "graph")
            if climb.classes is not None:
                check_labels(y, climb.classes)
            climb.x.copy_(x)
            climb.y.copy_(y)

            def outcome(x_adv: Tensor) -> tuple[Tensor, Tensor]:
                return _outcome(climb.logits(x_adv), climb.y, self.settings["loss"])

            with attack_mode(self.model, self.settings["bn"]):
                found = _worst(self.settings["restarts"], lambda: climb().clone(), outcome)
            if climb.form is None:
                # After the first call, which may have moved what modules count.
                climb.form = Structure(self.model, captured=engine == "graph")
            return found

    def _engine(self, device: torch.device) -> str:
        if self.engine != "auto":
            return engines.pick_engine(self.engine, device)
        if not is_plain(self.model):
            return "eager"
        if device.type == "cuda":
            return "graph"
        return "compile" if engines.has_compiler(device) else "eager"

    def _climb(self, model: nn.Module, x: Tensor, y: Tensor, captured: bool) -> PGDLoop:
        """Return the climb for batches like this one, made at the first of them."""
        dtype = {None: _autocast_dtype(x.device), "fp32": None, "bf16": torch.bfloat16}[
            self.precision
        ]
        key = (x.shape, x.stride(), x.dtype, x.device, dtype)
        climb = self._climbs.get(key)
        # A climb holds as long as the model is what it was compiled, or captured, of.
        if climb is not None and climb.form == Structure(model, captured):
            return climb
        self._climbs.pop(key, None)
        self._climbs[key] = PGDLoop(
            model,
            torch.zeros_like(x),
            torch.zeros_like(y),
            dtype,
            self.settings,
            compiled=True,
            captured=captured,
        )
        return self._climbs[key]


def count_errors(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    attack: Callable[[Tensor, Tensor], Tensor] | None = None,
    advance: Callable[[int], object] = lambda images: None,
) -> int:
    """Return how many images `model`, in eval mode and fp32, gets wrong after `attack`.

    `batches` yields uint8 images (B, C, H, W) and labels (B,); `attack(x, y)` attacks pixels, None
    leaves them as they are; `advance` is told the number of images after every batch.
    """
    wrong: Tensor | int = 0
    with attack_mode(model, "eval"):
        for images, y in batches:
            x = to_pixels(images)
            if attack is not None:
                x = attack(x, y)
            with torch.no_grad():
                wrong = wrong + (~correct(model(x), y)).sum()
            advance(len(y))
    return int(wrong)


def _worst(
    restarts: int,
    climb: Callable[[], Tensor],
    outcome: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> Tensor:
    """Attack `restarts` times; return each image's worst: fooled first, then the larger loss."""
    best = climb()
    if restarts == 1:
        return best
    with torch.no_grad():
        fooled, height = outcome(best)
        for _ in range(restarts - 1):
            x_adv = climb()
            now_fooled, now_height = outcome(x_adv)
            worse = (now_fooled & ~fooled) | ((now_fooled == fooled) & (now_height > height))
            best = torch.where(per_image(worse, best), x_adv, best)
            fooled, height = fooled | now_fooled, torch.where(worse, now_height, height)
    return best


def _outcome(logits: Tensor, y: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """Return which images are predicted wrong, (B,) bool, and their objective, (B,)."""
    return ~correct(logits, y), objective(logits, y, loss)


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the type that the caller's autocast computes in on `device`, or None."""
    on = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None


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
