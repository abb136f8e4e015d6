"""What one update computes: Loss(f, Mix, x, y) of a batch, and the figures that are shown of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastiat import kernels
from fastiat.mix import Mix, mixed_correct, mixed_loss


class Update(NamedTuple):
    """The figures of one update: scalars that stay on the device, so that nothing waits for it."""

    clean_loss: Tensor
    adv_loss: Tensor
    """Zero where the update has no adversarial batch."""
    clean_correct: Tensor
    """Images of the clean batch predicted right, in [0, B]; see `fastiat.mix.mixed_correct`."""
    adv_correct: Tensor

    @classmethod
    def of_means(cls, means: Tensor, ranks: int) -> "Update":
        """Return the figures of a batch from the means, (4,), of those of its `ranks` parts.

        A loss of the batch is the mean of its parts' losses, a count the sum of their counts.
        """
        clean_loss, adv_loss, clean_correct, adv_correct = means.unbind()
        return cls(clean_loss, adv_loss, ranks * clean_correct, ranks * adv_correct)


def mixed_pass(
    forward: Callable[[Tensor, Mix | None], Tensor],
    x: Tensor,
    y: Tensor,
    mix: Mix | None,
    loss: Any,
    mix_pixels: bool,
) -> tuple[Tensor, Tensor]:
    """Return Loss(f, Mix, x, y) of section 3 and how much of the batch is predicted right, scalars.

    `x` is (B, C, H, W) pixels in [0, 1], `y` (B,) int64. `mix_pixels` mixes at mix point 0 before
    the standardisation.
    """
    inner = mix
    if mix is not None and mix.layer == 0 and mix_pixels:
        x, inner = kernels.mix(x, mix.perm, mix.lam), None
    logits = forward(x, inner)
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    return mixed_loss(logits, y, mix, loss), mixed_correct(logits.detach(), y, mix)
