"""One update of each method, written plainly: Algorithm 1 of the paper and the later methods.

`fastiat.training.step` has the same updates in fixed buffers, for the engines that compile.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastiat import mix as mixing
from fastiat.mix import Mix, MixPoints
from fastiat.training.awp import WeightPerturbation
from fastiat.training.update import JointPass, Update, joint_pass, mixed_pass

Attack = Callable[[Tensor, Tensor], Tensor]
"""Returns adversarial examples, (B, C, H, W), for pixels (B, C, H, W) and true labels (B,)."""


def algorithm1(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Attack | None,
    draw: Callable[[], Mix | None],
    points: MixPoints,
    *,
    clean_weight: float = 0.5,
    loss: Any = "ce",
    smoothing: float = 0.0,
    shared_mix: bool = False,
    awp: WeightPerturbation | None = None,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Update:
    """Add the gradient of the loss L of Algorithm 1 to the `.grad` of `model`'s parameters.

        L_c = Loss(f, Mix, x, y)
        L_a = Loss(f, Mix, attack(x, y), y)
        L = w L_c + (1 - w) L_a,  w = `clean_weight`, 1/2 in the paper

    x, y: (B, C, H, W) pixels in [0, 1], (B,) int64 true labels.
    attack: attacks the un-mixed batch with its true labels; None means L = L_c.
    draw: returns a draw of Mix; called for L_c and again for L_a, or once with `shared_mix`.
    points: the mix points of `model`.
    loss, smoothing: see `fastiat.mix.mixed_loss`.
    awp: perturbs the weights, by one ascent step of L_a, while the gradient of L_a is computed.
    precision: returns the context manager for forward passes; losses are computed outside of it.

    Returns the two losses and the numbers of correct images.
    """

    forward = _forward(model, precision)
    # Autocast caches its copies of the weights until the outermost autocast context ends. A
    # disabled context around all passes keeps the cache, so that each weight is cast once.
    with torch.autocast(x.device.type, torch.bfloat16, enabled=False):
        mix = draw()
        with points.applied(mix):
            clean_loss, clean_correct = mixed_pass(forward, x, y, mix, loss, smoothing)
            # `backward` changes no weight, so the clean half of L can be backpropagated before the
            # attack. The activations of only one half are in memory at a time.
            ((clean_weight if attack else 1.0) * clean_loss).backward()
        clean_loss = clean_loss.detach()
        if attack is None:
            zero = torch.zeros_like(clean_loss)
            return Update(clean_loss, zero, clean_correct, zero)
        with precision():
            x_adv = attack(x, y)
        mix = mix if shared_mix else draw()

        def adversarial_pass() -> tuple[Tensor, Tensor]:
            return mixed_pass(forward, x_adv, y, mix, loss, smoothing)

        with points.applied(mix), _perturbed(awp, model, lambda: adversarial_pass()[0]):
            adv_loss, adv_correct = adversarial_pass()
            ((1 - clean_weight) * adv_loss).backward()
        return Update(clean_loss, adv_loss.detach(), clean_correct, adv_correct)


def joint_update(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Attack,
    draw: Callable[[], Mix | None],
    points: MixPoints,
    *,
    objective: str,
    beta: float,
    loss: Any = "ce",
    smoothing: float = 0.0,
    awp: WeightPerturbation | None = None,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Update:
    """Add the gradient of the loss of TRADES or MART to the `.grad` of `model`'s parameters.

        x_adv = attack(x, y)
        L = Loss(f, Mix, x, y) + beta mean KL(f(Mix(x)) || f(Mix(x_adv)))         "trades"
        L = mean of lam l(y) + (1 - lam) l(y[perm]), l of f(Mix(x)), f(Mix(x_adv))  "mart"

    l is the loss of MART, see `fastiat.training.update.mart_loss`. Both batches are mixed by one
    draw of Mix, because the divergence compares the predictions for an image and for its
    adversarial example. Without mixing, these are the losses of Zhang et al. 2019, eq. 5, and Wang
    et al. 2020, eq. 11. The attack of TRADES maximises the divergence ("kl", see `pgd`).

    awp: perturbs the weights, by one ascent step of L, while the gradient of L is computed.

    The other arguments, and the result, are those of `algorithm1`.
    """

    forward = _forward(model, precision)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=False):
        with precision():
            x_adv = attack(x, y)
        mix = draw()

        def both() -> JointPass:
            return joint_pass(forward, x, x_adv, y, mix, objective, beta, loss, smoothing)

        with points.applied(mix), _perturbed(awp, model, lambda: both().loss):
            found = both()
            found.loss.backward()
        return found.figures


def mixed_attack_update(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Attack,
    draw: Callable[[], Mix | None],
    *,
    classes: int,
    loss: Any = "ce",
    smoothing: float = 0.0,
    awp: WeightPerturbation | None = None,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Update:
    """Add the gradient of the loss of an attacked mixed batch to the `.grad` of the parameters.

        x_mix, y_mix = Mix(x, y),  y_mix = lam onehot(y) + (1 - lam) onehot(y[perm])
        L = Loss(f, attack(x_mix, y_mix), y_mix)

    The pixels are mixed first, and the attack maximises the cross-entropy of the mixed labels. The
    loss has no clean batch. This is the order of EasyRobust's and ARES's recipes for ImageNet;
    Algorithm 1 mixes adversarial examples instead.

    classes: number of classes, K.

    The other arguments, and the result, are those of `algorithm1`.
    """

    forward = _forward(model, precision)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=False):
        mix = draw()
        assert mix is not None
        with precision():
            x_adv = attack(mix.blend(x), mixing.soft_labels(y, mix, classes))

        def adversarial_pass() -> tuple[Tensor, Tensor]:
            return mixed_pass(forward, x_adv, y, mix, loss, smoothing)

        with _perturbed(awp, model, lambda: adversarial_pass()[0]):
            adv_loss, adv_correct = adversarial_pass()
            adv_loss.backward()
        zero = torch.zeros_like(adv_correct)
        return Update(zero, adv_loss.detach(), zero, adv_correct)


def _forward(
    model: nn.Module, precision: Callable[[], AbstractContextManager[Any]]
) -> Callable[[Tensor], Tensor]:
    """Return the forward pass of `model` inside the context that `precision` returns."""

    def forward(x: Tensor) -> Tensor:
        with precision():
            return model(x)

    return forward


def _perturbed(
    awp: WeightPerturbation | None, model: nn.Module, loss: Callable[[], Tensor]
) -> AbstractContextManager[None]:
    return nullcontext() if awp is None else awp.applied(model, loss)
