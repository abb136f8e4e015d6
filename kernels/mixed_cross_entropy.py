"""Two-label cross-entropy: mean of lam * CE(logits, y_a) + (1 - lam) * CE(logits, y_b).

(Zhang et al. 2018, section 2; the loss of section 3 of the IAT paper.)
"""

from torch import Tensor
from torch.nn import functional as F


def mixed_cross_entropy(logits: Tensor, y_a: Tensor, y_b: Tensor, lam: Tensor | float) -> Tensor:
    """Return the batch mean, a scalar, of the lambda-weighted two-label cross-entropy.

    `logits` is (B, K) floating point, `y_a` and `y_b` are (B,) int64 class numbers and `lam` a
    number, a scalar tensor or (B,) values in [0, 1].
    """
    loss_a = F.cross_entropy(logits, y_a, reduction="none")
    loss_b = F.cross_entropy(logits, y_b, reduction="none")
    if isinstance(lam, Tensor):
        lam = lam.to(loss_a.dtype)
    return (lam * loss_a + (1 - lam) * loss_b).mean()
