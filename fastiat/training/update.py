"""The loss of a batch, Loss(f, Mix, x, y) of the paper, and the figures that an update reports."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastiat.mix import Mix, mixed_correct, mixed_loss


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
