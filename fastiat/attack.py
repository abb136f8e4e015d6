"""Adversaries: FGSM and PGD in the L-infinity and L2 balls, as functions of their arguments.

An attack changes nothing but its result: module modes come back as they were, no parameter gets
a gradient, and everything random comes from the generator it is given. Attacks work under
`torch.no_grad` and `torch.inference_mode` too.
"""

import math
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastiat import kernels
from fastiat.engine import graphs as engines
from fastiat.engine.device import autocast
from fastiat.engine.graphs import Engine
from fastiat.engine.modes import BatchNormMode, Model, Structure, attack_mode, check_mode, is_plain
from fastiat.mix import NO_LABEL, check_labels
from fastiat.models import correct, to_pixels
from fastiat.system.errors import InputError

Norm = Literal["linf", "l2"]
Loss = Literal["ce", "margin"]


def objective(logits: Tensor, y: Tensor, loss: Loss) -> Tensor:
    """Return what an attack maximises, one value per image, (B,), in fp32 at least.

    Raises `InputError` for labels outside 0..K-1 on the CPU; on CUDA they fail a device-side
    assertion.
    """
    check_labels(y, logits.shape[1])
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    if loss == "ce":
        return F.cross_entropy(logits, y, reduction="none", ignore_index=NO_LABEL)
    # Masks, as a gather's gradient is a scatter, which deterministic algorithms cannot capture.
    own = torch.arange(logits.shape[1], device=y.device) == y[:, None]
    if own.is_cuda and not torch.compiler.is_compiling():
        torch._assert_async(own.any(1).all())  # as the cross-entropy does
    wrong = logits.masked_fill(own, -torch.inf).amax(1)
    return wrong - logits.masked_fill(~own, 0).sum(1)


def input_gradient(model: Model, x: Tensor, y: Tensor, loss: Loss = "ce") -> Tensor:
    """Return the gradient, shaped like `x`, of the batch's summed objective in the input alone.

    The sum, not the mean, so that an image's gradient does not shrink with the batch.
    """
    with torch.inference_mode(False):
        # Autograd takes a tensor that was made in inference mode only as a copy.
        labels = y.clone() if y.is_inference() else y
    return gradient(lambda x: objective(model(x), labels, loss).sum(), x)


def gradient(value: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the gradient of the scalar `value(x)` in `x`, whatever the caller's grad mode."""
    with torch.inference_mode(False), torch.enable_grad():
        x = (x.clone() if x.is_inference() else x).detach().requires_grad_()
        (grad,) = torch.autograd.grad(value(x), x)
    return grad


class Starts:
    """Random starts for images that are attacked batch by batch: those of one attack on them all.

    Hand it to an attack as its generator, after `batch` has told which images come next. Restart
    number r of every batch has the same seed, and an image's place among all of them does the
    rest, so that the starts depend neither on the batch size nor on who attacks which batch.
    """

    def __init__(self, seed: int, device: torch.device | str) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)
        self._seeds: list[Tensor] = []
        self._next = self.first = 0

    def batch(self, first: int) -> None:
        """Begin with a batch whose first image is number `first` of all."""
        self.first, self._next = first, 0

    def draw(self, x: Tensor) -> Tensor:
        """Return the seed of this batch's next start, an int64 scalar on the device of `x`."""
        if self._next == len(self._seeds):
            self._seeds.append(draw_seed(x, self._generator))
        self._next += 1
        return self._seeds[self._next - 1]


def start_in_ball(
    x: Tensor,
    eps: float,
    norm: Norm,
    clip: tuple[float, float],
    generator: torch.Generator | Starts | None,
) -> Tensor:
    """Return points uniform in the ball around each image, clipped to the pixel range.

    One seed is drawn from `generator`, on the device of `x`, and the rest is
    `kernels.random_start`: a captured graph with the same seed starts at the same points.
    """
    if isinstance(generator, Starts):
        first, seed = generator.first, generator.draw(x)
    else:
        first, seed = 0, draw_seed(x, generator)
    values = x[:1].numel()
    if norm == "linf":
        return kernels.random_start(x, eps, seed, clip, first * values)
    # A uniform direction, with a radius whose d-th power is uniform.
    noise = gaussian_noise(x, seed, first)
    half = torch.full((len(x),), 0.5, dtype=noise.dtype, device=x.device)
    radius = eps * kernels.random_start(half, 0.5, seed + 1, (0.0, 1.0), first).pow(
        1 / max(values, 1)
    )
    length = torch.linalg.vector_norm(noise.flatten(1), dim=1).clamp_min(1e-12)
    return (x + (noise * per_image(radius / length, x)).to(x.dtype)).clamp_(*clip)


def gaussian_noise(x: Tensor, seed: Tensor, first: int = 0) -> Tensor:
    """Return a standard normal value for every value of `x`, in fp32 at least.

    They are the normal quantiles of `kernels.random_start`'s uniform values for that seed;
    `first` is the number of images before those of `x`.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    # The ends of the interval have no quantile.
    most = 1 - 2.0**-24
    zeros = torch.zeros_like(x, dtype=dtype)
    uniform = kernels.random_start(zeros, 1.0, seed, (-most, most), first * x[:1].numel())
    return torch.erfinv(uniform).mul_(math.sqrt(2))


def draw_seed(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw what a random start for a batch like `x` needs: an int64 scalar on its device."""
    return torch.empty((), dtype=torch.int64, device=x.device).random_(generator=generator)


def per_image(values: Tensor, x: Tensor) -> Tensor:
    """View (B,) values so that they broadcast over the images of `x`."""
    return values.view(-1, *[1] * (x.dim() - 1))


class PGDLoop:
    """One random start and all PGD steps, in fixed buffers, so that they can be captured.

    Fill `x` and `y` in place; a call returns `x_adv`, which the next call overwrites.

    x, y: buffers of the batch, (B, ...) pixels and (B,) int64 labels.
    dtype: type that the network computes in by autocast, or None.
    settings: the keyword arguments of `pgd`, all of them; `restarts` is the caller's business.
    weights: returns the network's weights; None takes the parameters as they are at every call.
    compiled, captured: whether the network is compiled, and all of it a CUDA graph.
    pool: memory pool that the graph shares with others.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        dtype: torch.dtype | None,
        settings: dict[str, Any],
        *,
        weights: Callable[[], dict[str, Tensor]] | None = None,
        compiled: bool,
        captured: bool,
        pool: Any = None,
    ) -> None:
        self.model, self.x, self.y, self.dtype, self.settings = model, x, y, dtype, settings
        self.x_adv = torch.empty_like(x)
        self.form: Structure | None = None
        """Of the model, when the climb was compiled; the caller's business."""
        self.classes: int | None = None
        """Number of classes, where it is known."""
        self.seed = torch.zeros((), dtype=torch.int64, device=x.device)
        if weights is None:
            uses = engines.Uses(model, dtype)
            with attack_mode(model, settings["bn"]):
                self.classes = uses.watch(x).shape[1]
            weights = partial(engines.detached_weights, model, dtype, uses.cast)
        self.weights = weights
        loss: Loss = settings["loss"]

        def attack_loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return objective(engines.forward(model, weights, dtype, x), y, loss).sum()

        self._attack_loss = engines.compile_once(attack_loss) if compiled else attack_loss
        self._run: Callable[[], None] = self._run_steps
        if captured:
            self._run = engines.Captured(self._run_steps, self._changed, x.device, pool)

    def __call__(self) -> Tensor:
        """Draw a start from the generator of the settings, make the steps and return `x_adv`."""
        s = self.settings
        if s["random_start"] and s["norm"] == "linf":
            self.seed.random_(generator=s["generator"])
        elif s["random_start"]:
            start = start_in_ball(self.x, s["eps"], s["norm"], s["clip"], s["generator"])
            self.x_adv.copy_(start)
        else:
            self.x_adv.copy_(self.x)
        self._run()
        return self.x_adv

    def logits(self, x: Tensor) -> Tensor:
        """Return the network's logits, (B, K), as the climb sees them."""
        return engines.forward(self.model, self.weights(), self.dtype, x)

    def _run_steps(self) -> None:
        s = self.settings
        weights = self.weights()
        sizes = s["eps"], s["alpha"], s["clip"]
        if s["random_start"] and s["norm"] == "linf":
            self.x_adv.copy_(kernels.random_start(self.x, s["eps"], self.seed, s["clip"]))
        # Autocast is on within, if at all; a compiled program must not depend on the caller's.
        with (
            attack_mode(self.model, s["bn"]),
            torch.autocast(self.x.device.type, torch.bfloat16, enabled=False),
        ):
            for _ in range(s["steps"]):
                grad = gradient(lambda x: self._attack_loss(weights, x, self.y), self.x_adv)
                if s["norm"] == "linf":
                    kernels.pgd_step_(self.x_adv, grad, self.x, *sizes)
                else:
                    self.x_adv.copy_(kernels.pgd_step_l2(self.x_adv, grad, self.x, *sizes))

    def _changed(self) -> list[Tensor]:
        return [self.x_adv, *self.model.buffers()]


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
