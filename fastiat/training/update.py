"""The loss of a batch, Loss(f, Mix, x, y) of the paper, and the figures that an update reports."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastiat.mix import Mix, check_labels, mixed_correct, mixed_loss


class Update(NamedTuple):
    """The figures of one update: scalar tensors on the device, so that the CPU need not wait."""

    clean_loss: Tensor
    adv_loss: Tensor
    """Zero if the update has no adversarial batch."""
    clean_correct: Tensor
    """Correctly predicted images of the clean batch, in [0, B]; see `fastiat.mix.mixed_correct`."""
    adv_correct: Tensor
    """The same for the adversarial batch; zero without one."""

    @classmethod
    def of_means(cls, means: Tensor, ranks: int) -> "Update":
        """Return the figures of a whole batch; `means`, (4,), are the means over its `ranks` parts.

        The loss of the batch is the mean of the losses of its parts; a count is the sum of the
        counts.
        """
        clean_loss, adv_loss, clean_correct, adv_correct = means.unbind()
        return cls(clean_loss, adv_loss, ranks * clean_correct, ranks * adv_correct)


def mixed_pass(
    forward: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    mix: Mix | None,
    loss: Any,
    smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return two scalars: Loss(f, Mix, x, y) of section 3 of the paper, and the correct images.

    forward: returns logits (B, K) of pixels. `mix` is applied to the network already, see
        `fastiat.mix.MixPoints`.
    x, y: (B, C, H, W) pixels in [0, 1], (B,) int64 labels.
    loss, smoothing: see `fastiat.mix.mixed_loss`.

    The number of correct images, in [0, B], has no gradient.
    """
    logits = forward(x)
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    return mixed_loss(logits, y, mix, loss, smoothing), mixed_correct(logits.detach(), y, mix)


class JointPass(NamedTuple):
    """The result of one pass of the clean and one of the adversarial batch: scalars."""

    loss: Tensor
    """The loss that is minimised."""
    figures: Update
    """The figures that are reported, without gradient."""


def joint_pass(
    forward: Callable[[Tensor], Tensor],
    x: Tensor,
    x_adv: Tensor,
    y: Tensor,
    mix: Mix | None,
    objective: str,
    beta: float,
    loss: Any = "ce",
    smoothing: float = 0.0,
) -> JointPass:
    """Return the loss of TRADES or MART, whose terms need the clean and the adversarial logits.

    x, x_adv: (B, C, H, W) pixels and their adversarial examples.
    objective: "trades" or "mart"; see `trades_terms` and `mart_loss`.
    The other arguments are those of `mixed_pass`.

    The reported losses of TRADES are its two terms; those of MART are the cross-entropy of the
    clean batch, which is no part of its loss, and its loss.
    """
    clean, adv = forward(x), forward(x_adv)
    if clean.dtype == torch.bfloat16:
        clean, adv = clean.float(), adv.float()
    if objective == "trades":
        clean_loss, adv_loss = trades_terms(clean, adv, y, mix, beta, loss, smoothing)
        total = clean_loss + adv_loss
    else:
        clean_loss = mixed_loss(clean.detach(), y, mix, loss, smoothing)
        total = adv_loss = mart_loss(clean, adv, y, mix, beta)
    correct = (mixed_correct(logits.detach(), y, mix) for logits in (clean, adv))
    return JointPass(total, Update(clean_loss.detach(), adv_loss.detach(), *correct))


def trades_terms(
    clean: Tensor,
    adv: Tensor,
    y: Tensor,
    mix: Mix | None,
    beta: float,
    loss: Any = "ce",
    smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return the two terms of TRADES (Zhang et al. 2019, eq. 5) for logits (B, K), two scalars:

        Loss(f, Mix, x, y)  and  beta mean KL(softmax f(x) || softmax f(x_adv))

    With `mix`, `clean` and `adv` are the logits of batches that were mixed by the same draw.
    """
    log_p, log_q = F.log_softmax(clean, 1), F.log_softmax(adv, 1)
    divergence = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return mixed_loss(clean, y, mix, loss, smoothing), beta * divergence


def mart_loss(clean: Tensor, adv: Tensor, y: Tensor, mix: Mix | None, beta: float) -> Tensor:
    """Return the loss of MART (Wang et al. 2020, eq. 11) for logits (B, K), a scalar.

    It is the mean of l(y), with p = softmax(clean) and q = softmax(adv):

        l(y) = -log q_y - log(1 - max_{k != y} q_k) + beta KL(p || q) (1 - p_y)

    With `mix` it is the mean of lam l(y) + (1 - lam) l(y[perm]), for logits of batches that were
    mixed by the same draw.
    """
    log_p, q = F.log_softmax(clean, 1), adv.softmax(1)
    p = log_p.exp()
    # The constants 1.0001, 1e-12 and 1.0000001 are those of the authors' published code. They bound
    # the logarithms. `log_p` is finite where p is 0, so the gradient is, too.
    divergence = (p * (log_p - (q + 1e-12).log())).sum(1)

    def values(y: Tensor) -> Tensor:
        check_labels(y, *clean.shape)
        # A mask, not `gather`, whose backward pass is a scatter; see `fastiat.attack.attack_loss`.
        own = torch.arange(clean.shape[1], device=y.device) == y[:, None]
        wrong = q.masked_fill(own, 0).amax(1)
        boosted = F.cross_entropy(adv, y, reduction="none") - (1.0001 - wrong + 1e-12).log()
        return boosted + beta * divergence * (1.0000001 - p.masked_fill(~own, 0).sum(1))

    if mix is None:
        return values(y).mean()
    return (mix.lam * values(y) + (1 - mix.lam) * values(y[mix.perm])).mean()
