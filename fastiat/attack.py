"""Adversarial attacks: FGSM and PGD in the L-infinity and the L2 ball, as functions.

An attack returns adversarial examples and has no other effect: it restores the training flags of
the modules, gives no parameter a gradient, and draws random numbers from the generator that is
passed in. Attacks also work under `torch.no_grad` and `torch.inference_mode`.

`PGD` is the compiled or captured attack. `fastiat.attacks.loop` has the loss that is maximised, its
gradient with respect to the input, and the steps.
"""

import logging
from collections.abc import Callable, Hashable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastiat.attacks.checks import (
    Loss,
    check_batch,
    check_choice,
    check_settings,
    check_soft,
    is_soft,
)
from fastiat.attacks.loop import (
    PGDLoop,
    attack_loss,
    input_gradient,
    prediction,
    run_steps,
    target_gradient,
)
from fastiat.attacks.normalised import Normalise, NormalisePixels
from fastiat.attacks.starts import (
    Noise,
    Norm,
    Starts,
    per_image,
    start_in_ball,
)
from fastiat.engine import graphs
from fastiat.engine.device import autocast
from fastiat.engine.graphs import Engine
from fastiat.engine.modes import BatchNormMode, Model, attack_mode, check_mode, is_plain, structure
from fastiat.mix import check_labels
from fastiat.models import correct, to_pixels
from fastiat.networks.normalise import inner
from fastiat.system.errors import InputError
from fastiat.system.settings import norm_name

log = logging.getLogger(__name__)


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
    normalise: Normalise | None = None,
    target: Tensor | None = None,
) -> Tensor:
    """Return adversarial examples of the fast gradient sign method: one step of length `eps`.

    The step starts at `x` (Goodfellow et al. 2015). With `norm` "l2" the step is along the gradient
    instead of its sign. Arguments and errors are those of `pgd`.
    """
    return pgd(
        model, x, y, eps=eps, alpha=eps, steps=1, random_start=False, norm=norm, loss=loss, bn=bn,
        clip=clip, normalise=normalise, target=target,
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
    start_noise: Noise = "uniform",
    start_size: float | None = None,
    normalise: Normalise | None = None,
    target: Tensor | None = None,
) -> Tensor:
    """Return adversarial examples of `x` by projected gradient descent.

    The attack is that of Madry et al. 2018. Section 4.1 of the IAT paper gives the defaults of
    `eps`, `alpha` and `steps`: 0.03, 0.0075 and 7.

    model: returns logits (B, K) for pixels; the caller's autocast applies to it.
    x: (B, ...) floating-point pixels inside `clip`; the result has the dtype and memory format of
        `x`.
    y: (B,) int64 true labels, or (B, K) class probabilities for the loss "ce".
    eps, alpha: radius of the ball and length of a step, in the units of `x`.
    steps: gradient steps from each start, at least 1.
    random_start: start at a random point (then clipped) instead of at `x`.
    norm: "linf" or "l2", also spelled such as "Linf"; the L2 norm is that of each image.
    loss: the loss that is maximised; see `attack_loss`. For "kl", the class probabilities are the
        predictions for `x`, as in TRADES (Zhang et al. 2019), and `y` is not used.
    restarts: number of independent starts; above 1, `random_start` must be True. Each image keeps
        its worst example: a misclassified example is worse than a correctly classified one, and
        among equals the one with the larger loss is worse.
    bn: mode of the BatchNorm layers during the attack. "eval" uses the running statistics, "batch"
        the statistics of the batch, "update" the statistics of the batch and updates the running
        statistics. All other layers are in eval mode. Functions, TorchScript, `torch.fx` and
        exported programs may hide their layers, so "eval" is the only mode for them.
    generator: source of the random starts, on the device of `x`. None uses PyTorch's global
        generator. Use `Starts` for a set of images that is attacked in batches.
    clip: lowest and highest value of a pixel.
    start_noise, start_size: distribution of the random start: "uniform" in the ball of radius
        `start_size`, or "normal" with this standard deviation in every value. None is `eps`.
    normalise: (mean, std) of each channel, if `x` and what `model` takes are normalised images,
        (pixels - mean) / std, of shape (B, C, ...); the result is normalised too. Each of the two
        is a sequence of C numbers or a tensor of shape (C,), (C, 1, 1) or (1, C, 1, 1), its
        standard deviations above 0. The attack is on the pixels: `eps`, `alpha`, `clip` and
        `start_size` are in the units of pixels, as they are in torchattacks after
        `set_normalization_used`. Not for a network that normalises its input itself.
    target: class that each image shall be classified as, (B,) int64. The attack lowers the loss of
        these classes instead of raising that of the true ones; among the examples of several
        restarts, one that is classified as its target is the worst. None: untargeted.

    A pixel whose gradient is NaN does not move. Settings outside these ranges raise `InputError` (a
    `ValueError`), and tensors of the wrong dtype raise `TypeError`. Labels outside 0..K-1 raise
    `InputError` on the CPU. On CUDA, reading labels would synchronize with the GPU, so wrong labels
    fail a device-side assertion instead.
    """
    norm = norm_name(norm)
    settings: dict[str, Any] = dict(
        eps=eps, alpha=alpha, steps=steps, random_start=random_start, norm=norm, loss=loss,
        restarts=restarts, bn=bn, clip=clip, start_noise=start_noise, start_size=start_size,
    )  # fmt: skip
    check_settings(settings)
    layer = None if normalise is None else NormalisePixels(normalise)
    check_batch(x, y)
    if is_soft(y):
        check_soft(settings, target)
    if target is not None:
        check_batch(x, target)
    x = x.detach()
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module  # the forward pass of the wrapper would wait for the other ranks
    if layer is not None:
        pixels = layer.pixels(x)
        return layer(
            pgd(layer.before(model), pixels, y, generator=generator, target=target, **settings)
        )
    if eps == 0:
        return x.clone()

    labels = y if target is None else target
    ascent = input_gradient if target is None else target_gradient
    size = eps if start_size is None else start_size

    def attack() -> Tensor:
        x_adv = start_in_ball(x, size, norm, clip, generator, start_noise) if random_start else x
        goal = prediction(model, x) if loss == "kl" else labels
        return run_steps(x_adv, x, lambda x_adv: ascent(model, x_adv, goal, loss), settings)

    with attack_mode(model, bn):
        return _worst(restarts, attack, model, labels, loss, targeted=target is not None)


class PGD:
    """`pgd`, prepared once and called many times: `attack = PGD(model, eps=0.03); attack(x, y)`.

    The constructor takes the keyword arguments of `pgd` and raises the errors of `pgd` for wrong
    settings.

    engine: "eager" calls `pgd`. "compile" compiles the network once for each shape of a batch, and
        computes the gradient of the input only. "graph" also captures the start and all steps as
        one CUDA graph, and replays the graph. "auto" uses "graph" for a plain `nn.Module` on CUDA,
        else "eager": on the CPU, compiling takes a minute and gains nothing. A compilation is
        logged at the level INFO.
    precision: precision of the network, "bf16" or "fp32"; examples and loss keep the dtype of `x`.
        None uses the caller's autocast, as `pgd` does.

    Every call reads the current weights, so the model may be trained between calls. If layers,
    hooks or `forward` methods have changed, the next call recompiles. The same generator gives the
    same random starts under every engine. Use an instance from one thread only.
    """

    def __init__(
        self,
        model: Model,
        *,
        engine: Engine = "auto",
        precision: Literal["bf16", "fp32"] | None = None,
        **settings: Any,
    ) -> None:
        defaults = attack_defaults()
        unknown = settings.keys() - defaults.keys()
        if unknown:
            raise TypeError(
                f"PGD has no setting {', '.join(sorted(unknown))}: choose from "
                f"{', '.join(defaults)}, engine, precision"
            )
        check_choice("engine", engine, get_args(Engine))
        if precision is not None:
            check_choice("precision", precision, ("bf16", "fp32"))
        # `functional_call` cannot replace weights through these wrappers, and an attack does not
        # need the wrappers.
        wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
        self.model = model.module if isinstance(model, wrappers) else model
        if engine in ("compile", "graph") and not is_plain(self.model):
            raise InputError(
                f"engine {engine!r} needs a plain nn.Module, and this model is not one or contains "
                f"a module that is not: use engine='eager'"
            )
        self.engine, self.precision = engine, precision
        self.settings = {**defaults, **settings}
        self.settings["norm"] = norm_name(self.settings["norm"])
        check_settings(self.settings)
        check_mode(self.model, self.settings["bn"])
        normalise = self.settings.pop("normalise")
        self._normalise = None if normalise is None else NormalisePixels(normalise)
        if self._normalise is not None:
            self.model = self._normalise.before(self.model)
        self._loops: dict[Hashable, _Ready] = {}

    def __call__(self, x: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the adversarial examples of pixels `x`, (B, ...), with true labels `y`, (B,).

        `target`, (B,), makes the attack a targeted one, see `pgd`.
        """
        if self._normalise is None:
            return self._attack(x, y, target)
        check_batch(x, y)
        with torch.no_grad():
            pixels = self._normalise.pixels(x)
            return self._normalise(self._attack(pixels, y, target))

    def _attack(self, x: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
        engine = self._engine(x.device)
        if engine == "eager" or self.settings["eps"] == 0:
            with autocast(x.device, self.precision) if self.precision else nullcontext():
                return pgd(self.model, x, y, target=target, **self.settings)
        assert isinstance(self.model, nn.Module)
        check_batch(x, y)
        if is_soft(y):
            check_soft(self.settings, target)
        targeted = target is not None
        labels = y if target is None else target
        check_batch(x, labels)
        settings, captured = self.settings, engine == "graph"
        # Buffers created in inference mode could not be written to outside inference mode.
        with torch.inference_mode(False), torch.no_grad():
            ready = self._ready(self.model, x, y, captured, targeted)
            # Compiled code cannot raise for wrong labels.
            if not is_soft(labels):
                check_labels(labels, len(y), ready.classes)
            loop = ready.loop
            loop.x.copy_(x)
            loop.y.copy_(labels)
            with attack_mode(self.model, settings["bn"]):
                found = _worst(
                    settings["restarts"], lambda: loop().clone(), loop.logits, loop.y,
                    settings["loss"], targeted=targeted,
                )  # fmt: skip
            if ready.structure is None:
                # Read after the first call, which runs the network's Python code: that code may
                # change attributes of the modules.
                ready.structure = ready.read_structure()
            return found

    def _engine(self, device: torch.device) -> str:
        if self.engine == "auto" and not is_plain(self.model):
            return "eager"
        return graphs.pick_engine(self.engine, device)

    def _ready(
        self, model: nn.Module, x: Tensor, y: Tensor, captured: bool, targeted: bool
    ) -> "_Ready":
        """Return the loop for batches like `x`; build it if it is missing or the model changed."""
        dtype = torch.bfloat16 if self.precision == "bf16" else None
        if self.precision is None and torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        key = (x.shape, x.stride(), x.dtype, x.device, dtype, targeted, y.shape, y.dtype)
        ready = self._loops.pop(key, None)
        if ready is None or ready.structure != ready.read_structure():
            ready = None  # frees the memory of the old graph before the new graph is captured
            log.info(
                "compiling the attack on %s for batches of shape %s, which takes up to minutes",
                type(inner(model)).__name__, tuple(x.shape),
            )  # fmt: skip
            castable = graphs.CastableWeights(model, dtype)
            with attack_mode(model, self.settings["bn"]):
                classes = castable.observe(x).shape[1]
            weights = partial(graphs.detached_weights, model, dtype, castable.names)
            loop = PGDLoop(
                model, torch.zeros_like(x), torch.zeros_like(y), dtype, self.settings,
                weights=weights, compiled=True, captured=captured, targeted=targeted,
            )  # fmt: skip
            # A graph holds constants and addresses. Which weights can be cast may depend on
            # constants too; what else is compiled is guarded by Dynamo.
            read = partial(
                structure, model, constants=captured or dtype is not None, addresses=captured
            )
            ready = _Ready(loop, classes, read)
        self._loops[key] = ready
        return ready


@dataclass
class _Ready:
    """The loop that `PGD` keeps for batches of one shape, and what it was compiled for."""

    loop: PGDLoop
    classes: int
    """Number of classes, K."""
    read_structure: Callable[[], tuple[Any, ...]]
    """Returns the present `structure` of the model."""
    structure: tuple[Any, ...] | None = None
    """`structure` of the model that the loop was compiled for; None until the first call ends."""


def count_errors(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    attack: Callable[[Tensor, Tensor], Tensor] | None = None,
    advance: Callable[[int], object] = lambda images: None,
) -> int:
    """Return how many images `model`, in eval mode and fp32, misclassifies after `attack`.

    batches: yields uint8 images (B, C, H, W) and labels (B,).
    attack: `attack(x, y)` returns examples of the pixels `x`; None leaves the pixels unchanged.
    advance: called after each batch with its number of images.
    """
    wrong: Tensor | int = 0
    with attack_mode(model, "eval"):
        for images, y in batches:
            x = to_pixels(images)
            if attack is not None:
                x = attack(x, y)
            with torch.no_grad():
                # Summed on the device: reading the count of each batch would synchronize.
                wrong = wrong + (~correct(model(x), y)).sum()
            advance(len(y))
    return int(wrong)


def attack_defaults() -> dict[str, Any]:
    """Return the keyword arguments of `pgd` that are settings, with their defaults."""
    return {k: v for k, v in (pgd.__kwdefaults__ or {}).items() if k != "target"}


def _worst(
    restarts: int,
    attack: Callable[[], Tensor],
    logits: Model,
    labels: Tensor,
    loss: Loss,
    *,
    targeted: bool,
) -> Tensor:
    """Call `attack` `restarts` times and return the worst example of each image, see `pgd`.

    `labels` are the true classes, or the target classes of a `targeted` attack.
    """
    best = attack()
    if restarts == 1:
        return best

    def outcome(x_adv: Tensor) -> tuple[Tensor, Tensor]:
        """Return for which images the attack succeeds, (B,) bool, and its height, (B,)."""
        given = logits(x_adv)
        hits, value = correct(given, labels), attack_loss(given, labels, loss)
        return (hits, -value) if targeted else (~hits, value)

    with torch.no_grad():
        wrong, value = outcome(best)
        for _ in range(restarts - 1):
            x_adv = attack()
            now_wrong, now_value = outcome(x_adv)
            worse = (now_wrong & ~wrong) | ((now_wrong == wrong) & (now_value > value))
            best = torch.where(per_image(worse, best), x_adv, best)
            wrong, value = wrong | now_wrong, torch.where(worse, now_value, value)
    return best
