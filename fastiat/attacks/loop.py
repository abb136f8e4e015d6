"""The steps of PGD: the loss that they raise, its gradient with respect to the input, the loop."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastiat import kernels
from fastiat.attacks.checks import (
    Loss,
    is_soft,
)
from fastiat.attacks.starts import (
    start_from_seed,
)
from fastiat.engine import graphs
from fastiat.engine.modes import Model, attack_mode
from fastiat.mix import NO_LABEL, check_labels
from fastiat.system.errors import InputError


def attack_loss(logits: Tensor, y: Tensor, loss: Loss) -> Tensor:
    """Return the loss that an attack maximises: one value for each image, (B,), at least in fp32.

    `logits` is (B, K). "ce" is the cross-entropy of the labels `y`, (B,) int64, or of the class
    probabilities `y`, (B, K). "margin" is the largest logit of a wrong class minus the logit of the
    true class (Carlini & Wagner 2017). "kl" is the Kullback-Leibler divergence of the prediction
    from the class probabilities `y` (Zhang et al. 2019, eq. 5). On the CPU, labels outside 0..K-1
    raise `InputError`; on CUDA, they fail a device-side assertion.
    """
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    if is_soft(y):
        if y.shape != logits.shape:
            raise InputError(
                f"y has shape {tuple(y.shape)}: give a probability for each of the logits, "
                f"{tuple(logits.shape)}"
            )
        log_p = F.log_softmax(logits, 1)
        return F.kl_div(log_p, y, reduction="none").sum(1) if loss == "kl" else -(y * log_p).sum(1)
    check_labels(y, logits.shape[0], logits.shape[1])
    if loss == "ce":
        return F.cross_entropy(logits, y, reduction="none", ignore_index=NO_LABEL)
    # Masks, not `gather`: the backward pass of `gather` is a scatter, whose deterministic version
    # synchronizes with the GPU, so that a CUDA graph cannot capture it.
    own = torch.arange(logits.shape[1], device=y.device) == y[:, None]
    if own.is_cuda and not torch.compiler.is_compiling():
        torch._assert_async(own.any(1).all())  # cross-entropy has the same assertion
    wrong = logits.masked_fill(own, -torch.inf).amax(1)
    return wrong - logits.masked_fill(~own, 0).sum(1)


def input_gradient(model: Model, x: Tensor, y: Tensor, loss: Loss = "ce") -> Tensor:
    """Return the gradient of the batch's summed attack loss with respect to `x`, shaped like `x`.

    The loss is summed, not averaged: an image's gradient must not depend on the batch size.
    """
    with torch.inference_mode(False):
        # Autograd cannot save an inference tensor; its clone outside inference mode is a normal
        # tensor.
        labels = y.clone() if y.is_inference() else y
    return gradient(lambda x: attack_loss(model(x), labels, loss).sum(), x)


def gradient(value: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the gradient of the scalar `value(x)` with respect to `x`, in any grad mode.

    `torch.autograd.grad` computes the gradient of `x` alone and leaves every `Parameter.grad` as
    it was.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x = (x.clone() if x.is_inference() else x).detach().requires_grad_()
        (grad,) = torch.autograd.grad(value(x), x)
    return grad


def prediction(model: Model, x: Tensor) -> Tensor:
    """Return the class probabilities of pixels `x`, (B, K), at least in fp32, without gradient."""
    with torch.no_grad():
        logits = model(x)
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        return logits.softmax(1)


def target_gradient(model: Model, x: Tensor, target: Tensor, loss: Loss = "ce") -> Tensor:
    """Return the gradient of minus the attack loss of the classes `target`, shaped like `x`.

    A step along it makes the prediction of the target class more likely.
    """
    return -input_gradient(model, x, target, loss)


def run_steps(
    x_adv: Tensor,
    x: Tensor,
    grad: Callable[[Tensor], Tensor],
    settings: dict[str, Any],
    *,
    in_place: bool = False,
) -> Tensor:
    """Return the last iterate of PGD from `x_adv` around `x`; each step is along `grad(x_adv)`.

    `settings` has the keys norm, eps, alpha, steps and clip. `in_place` writes every iterate into
    `x_adv`.
    """
    step = kernels.pgd_step if settings["norm"] == "linf" else kernels.pgd_step_l2
    if in_place and settings["norm"] == "linf":
        step = kernels.pgd_step_
    sizes = settings["eps"], settings["alpha"], settings["clip"]
    for _ in range(settings["steps"]):
        found = step(x_adv, grad(x_adv), x, *sizes)
        x_adv = x_adv.copy_(found) if in_place and found is not x_adv else found
    return x_adv


class PGDLoop:
    """One random start and all PGD steps in fixed buffers, so that a CUDA graph can capture them.

    Fill `x` and `y` in place, then call the loop. A call returns `x_adv`, which the next call
    overwrites.

    x, y: buffers of the batch, (B, ...) pixels and (B,) int64 labels.
    dtype: dtype of the network's autocast; None disables autocast.
    settings: all keyword arguments of `pgd`. `restarts` is ignored: the caller repeats the call.
    weights: returns the network's weights, as `graphs.detached_weights` does.
    compiled: compile the network. captured: capture the whole loop as a CUDA graph.
    pool: memory pool that the graph shares with other graphs, or None.
    targeted: `y` holds target classes, whose loss the steps lower.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        dtype: torch.dtype | None,
        settings: dict[str, Any],
        *,
        weights: Callable[[], dict[str, Tensor]],
        compiled: bool,
        captured: bool,
        pool: Any = None,
        targeted: bool = False,
    ) -> None:
        self.model, self.x, self.y, self.dtype, self.settings = model, x, y, dtype, settings
        self.weights = weights
        self.x_adv = torch.empty_like(x)
        # The seed is a buffer that `__call__` fills outside the graph: a replay of the graph would
        # not advance the generator.
        self.seed = torch.zeros((), dtype=torch.int64, device=x.device)

        def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            logits = graphs.forward(model, weights, dtype, x)
            total = attack_loss(logits, y, settings["loss"]).sum()
            return -total if targeted else total

        def reference(weights: dict[str, Tensor], x: Tensor) -> Tensor:
            return prediction(lambda x: graphs.forward(model, weights, dtype, x), x)

        self._loss = graphs.compile_once(loss) if compiled else loss
        self._reference = graphs.compile_once(reference) if compiled else reference
        self._run: Callable[[], None] = self._run_steps
        if captured:
            self._run = graphs.Captured(self._run_steps, self._changed, x.device, pool)

    def __call__(self) -> Tensor:
        """Draw a start from the generator of the settings, run all steps and return `x_adv`."""
        if self.settings["random_start"]:
            self.seed.random_(generator=self.settings["generator"])
        self._run()
        return self.x_adv

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits, (B, K), of the network with the weights that the loop uses."""
        return graphs.forward(self.model, self.weights(), self.dtype, x)

    def _run_steps(self) -> None:
        s, start = self.settings, self.x
        # Read inside the graph, so that every replay uses the current weights.
        weights = self.weights()
        if s["random_start"]:
            size = s["eps"] if s["start_size"] is None else s["start_size"]
            start = start_from_seed(
                self.x, size, s["norm"], s["clip"], self.seed, noise=s["start_noise"]
            )
        self.x_adv.copy_(start)
        # `forward` enables autocast where `dtype` asks for it. The caller's autocast is disabled
        # here, because Dynamo recompiles when the autocast state changes.
        with (
            attack_mode(self.model, s["bn"]),
            torch.autocast(self.x.device.type, torch.bfloat16, enabled=False),
        ):
            y = self._reference(weights, self.x) if s["loss"] == "kl" else self.y

            def grad(x_adv: Tensor) -> Tensor:
                return gradient(lambda x: self._loss(weights, x, y), x_adv)

            # In place: a new tensor may have other strides, for which Dynamo recompiles.
            run_steps(self.x_adv, self.x, grad, s, in_place=True)

    def _changed(self) -> list[Tensor]:
        """Return the tensors that a run changes: `x_adv` and the buffers of the model."""
        return [self.x_adv, *self.model.buffers()]
