"""The L-infinity PGD step: sign step, projection onto the ball, clamp to the pixel range.

    x_adv <- clip(x_adv + alpha * sign(grad), max(x - eps, c0), min(x + eps, c1))

(Madry et al. 2018, eq. 2.9; section 4.1 of the IAT paper.) A NaN gradient moves nothing.
"""

import torch
from torch import Tensor


def pgd_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    eps: float,
    alpha: float,
    clip: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Return the next iterate of L-infinity PGD.

    `x_adv`, `grad` and `x` share one shape; `eps`, `alpha` and `clip` are in the units of `x`.
    """
    return pgd_step_(x_adv.clone(), grad, x, eps, alpha, clip)


def pgd_step_(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    eps: float,
    alpha: float,
    clip: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """`pgd_step`, writing into `x_adv` and returning it."""
    x_adv.add_(torch.sign(grad), alpha=alpha)
    x_adv.clamp_(x - eps, x + eps)
    return x_adv.clamp_(*clip)
