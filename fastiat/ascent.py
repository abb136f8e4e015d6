"""Ascent: what every attack is made of, and the climb of PGD in buffers that can be captured.

The objective, its gradient in the input alone, and the random start.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastiat import kernels
from fastiat.engine import graphs as engines
from fastiat.engine.modes import Model, Structure, attack_mode
from fastiat.mix import NO_LABEL, check_labels

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
