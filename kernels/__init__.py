"""Ops of adversarial training with mixing, usable without the rest of fastiat.

Use: `from fastiat.kernels import pgd_step, mix`. No module of this package imports the rest of
fastiat.
"""

# `import kernels` in the root of a repository checkout would register every op a second time.
if __name__ != "fastiat.kernels":
    raise ImportError("import fastiat.kernels, not kernels")

from .crop_flip import crop_flip
from .mix import mix
from .mixed_cross_entropy import mixed_cross_entropy
from .pgd_step import pgd_step, pgd_step_
from .pgd_step_l2 import pgd_step_l2
from .random_start import random_start
from .standardize import standardize

__all__ = [
    "crop_flip",
    "mix",
    "mixed_cross_entropy",
    "pgd_step",
    "pgd_step_",
    "pgd_step_l2",
    "random_start",
    "standardize",
]
