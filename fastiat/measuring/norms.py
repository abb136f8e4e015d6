"""Norms of weight matrices (the paper's Figure 1), and norms.json in a run directory."""

import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastiat.measuring.rows import read_rows

NORMS = "norms.json"


@dataclass(frozen=True)
class WeightNorms:
    """The norms of one weight, taken as a matrix; norms.json is a list of these."""

    name: str
    """Name of the parameter, such as "groups.0.0.conv1.weight"."""
    shape: tuple[int, ...]
    """(out, in) of a linear layer, (out, in, kh, kw) of a convolution."""
    frobenius: float
    """Root of the sum of squares."""
    spectral: float
    """Largest singular value."""

    @property
    def matrix(self) -> tuple[int, int]:
        """Shape of the matrix: (out, in), or (out, in * kh * kw) of a convolution."""
        return self.shape[0], math.prod(self.shape[1:])


def weight_norms(model: nn.Module) -> list[WeightNorms]:
    """Return the Frobenius and spectral norm of every weight of `model` with two or more axes.

    The weight (out, in, kh, kw) of a convolution counts as the matrix (out, in * kh * kw), which
    multiplies one patch. Its norm is not the norm of the whole linear map over an image. Biases and
    BatchNorm weights are vectors and are left out. (Section 4.4 of the IAT paper, after Bartlett et
    al. 2017.)
    """
    layers = []
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            continue
        matrix = weight.detach().flatten(1).double()
        frobenius = float(torch.linalg.matrix_norm(matrix))
        layers.append(WeightNorms(name, tuple(weight.shape), frobenius, spectral_norm(matrix)))
    return layers


def spectral_norm(matrix: Tensor) -> float:
    """Return the largest singular value of `matrix`, (M, N); NaN if `matrix` is not finite.

    The result is the square root of the largest eigenvalue of the smaller Gram matrix, in float64.
    Squaring loses digits of the small singular values, not of the largest. The smaller side of the
    weights here is at most 640, so this takes milliseconds, while a full SVD takes a second.
    """
    matrix = matrix.double()
    if not matrix.isfinite().all():
        return math.nan
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return math.sqrt(max(float(torch.linalg.eigvalsh(gram)[-1]), 0.0))


def read_norms(run_dir: str | os.PathLike[str]) -> list[WeightNorms]:
    """Return the norms that `fastiat norms` has written for a run, or [] if there are none.

    Raises `InputError` for a damaged norms.json.
    """
    return read_rows(run_dir, NORMS, WeightNorms)
