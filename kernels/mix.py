"""Pairwise interpolation of a batch: out[i] = lam * x[i] + (1 - lam) * x[perm[i]].

(Zhang et al. 2018, eq. 1; section 3 of the IAT paper.)
"""

from torch import Tensor


def mix(x: Tensor, perm: Tensor, lam: Tensor | float) -> Tensor:
    """Return `lam * x + (1 - lam) * x[perm]`.

    `x` is (B, ...) floating point, `perm` a permutation of the batch, (B,) int64, and `lam` a
    number, a scalar tensor or one value per sample, (B,), in [0, 1].
    """
    if isinstance(lam, Tensor):
        lam = lam.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1)) if lam.dim() else lam.to(x.dtype)
    return lam * x + (1 - lam) * x[perm]
