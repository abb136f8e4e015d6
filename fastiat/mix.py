"""Mixing: lambda, partners and layer of one update, and the loss of mixed logits.

A `Mix` is drawn outside of the network and passed to it: `model(x, draw("manifold", len(x)))`.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastiat import kernels
from fastiat.models import MIX_POINTS, correct
from fastiat.system.errors import InputError

Kind = Literal["none", "mixup", "manifold"]
KINDS: tuple[Kind, ...] = ("none", "mixup", "manifold")
# Section 4.1 of the paper (and the README of the manifold mixup code): Beta(1, 1) and Beta(2, 2).
DEFAULT_ALPHA = {"mixup": 1.0, "manifold": 2.0}
DEFAULT_LAYERS = {"mixup": (0,), "manifold": (0, 1, 2)}

# By default PyTorch's losses skip samples with the label -100. Here that label is as wrong as any
# other below 0, so the label that is skipped is one that no data set has.
NO_LABEL = -(2**63)


@dataclass(frozen=True)
class Mix:
    """One draw: replace h, the values at mix point `layer`, by `lam * h + (1 - lam) * h[perm]`."""

    layer: int
    """Mix point: 0 is the standardised input, 1 and 2 the outputs of the first and second group."""
    perm: Tensor
    """Partner of every sample: a permutation of the batch, (B,) int64."""
    lam: Tensor
    """Weight of the sample itself in [0, 1]: a scalar, or (B,) for one per sample; fp32."""


def draw(
    kind: Kind,
    batch: int,
    alpha: float | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    *,
    layers: tuple[int, ...] | None = None,
    per_sample: bool = False,
) -> Mix | None:
    """Draw the mixing of one update: layer uniform over `layers`, lambda ~ Beta(alpha, alpha).

    kind: "none" returns None and draws nothing; "mixup" mixes at layer 0 with alpha 1, "manifold"
        at layer 0, 1 or 2 with alpha 2 (sections 3 and 4.1 of the paper).
    batch: number of images, B.
    generator: a CPU generator; None takes torch's global one.
    device: where the tensors of the result are.
    per_sample: one lambda for each image, (B,), instead of one for the batch.

    Raises `InputError` for an unknown kind, a batch below 1, an alpha that is not positive and
    finite, or layers that are not mix points.
    """
    if kind not in KINDS:
        raise InputError(f"unknown mix {kind!r}: choose from {', '.join(KINDS)}")
    if kind == "none":
        return None
    alpha = DEFAULT_ALPHA[kind] if alpha is None else alpha
    layers = DEFAULT_LAYERS[kind] if layers is None else layers
    if batch < 1:
        raise InputError(f"a batch of {batch} images cannot be mixed")
    if not 0 < alpha < float("inf"):
        raise InputError(f"mix alpha is {alpha}, but Beta(alpha, alpha) needs a positive number")
    if not layers or not set(layers) <= set(MIX_POINTS):
        raise InputError(f"mix layers are {layers}: give some of 0, 1 and 2")
    layer = layers[int(torch.randint(len(layers), (), generator=generator, device="cpu"))]
    perm = torch.randperm(batch, generator=generator, device="cpu")
    # torch.distributions.Beta takes no generator, so NumPy draws, with a seed from the generator.
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device="cpu"))
    values = np.random.default_rng(seed).beta(alpha, alpha, batch if per_sample else None)
    lam = torch.as_tensor(values, dtype=torch.float32, device="cpu")
    return Mix(layer, perm.to(device, non_blocking=True), lam.to(device, non_blocking=True))


def mixed_loss(
    logits: Tensor, y: Tensor, mix: Mix | None, loss: Literal["ce", "bce"] = "ce"
) -> Tensor:
    """Return the batch mean of lam * L(logits, y) + (1 - lam) * L(logits, y[perm]), a scalar.

    `logits` is (B, K), `y` (B,) int64; without `mix` the result is the mean of L(logits, y). `loss`
    "ce" is cross-entropy, section 3 of the paper; "bce" is the manifold mixup code's binary
    cross-entropy of the softmax against the mixed one-hot labels. The loss is computed in fp32 at
    least. Raises `InputError` for labels outside 0..K-1 on the CPU. On CUDA, where reading them
    would wait for the device, such labels give NaN or a device-side assertion.
    """
    check_labels(y, logits.shape[1])
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if loss == "bce":
        target = F.one_hot(y, logits.shape[1]).to(logits.dtype)
        if mix is not None:
            target = kernels.mix(target, mix.perm, mix.lam)
        return _binary_cross_entropy(logits, target)
    if mix is None:
        return F.cross_entropy(logits, y, ignore_index=NO_LABEL)
    return kernels.mixed_cross_entropy(logits, y, y[mix.perm], mix.lam)


def _binary_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean over B and K of -t log p - (1 - t) log(1 - p), p = softmax(logits), (B, K).

    Computed from the logits, not from p: 1 - p of a confident prediction rounds to 0 in fp32, and
    `F.binary_cross_entropy` replaces its logarithm by -100.
    """
    log_p = F.log_softmax(logits, 1)
    top = F.one_hot(logits.argmax(1), logits.shape[1]).bool()
    # Only the largest p can be close to 1, where 1 - p would cancel: there 1 - p is the sum of the
    # others.
    others = logits.masked_fill(top, -torch.inf).logsumexp(1, keepdim=True)
    log_rest = others - logits.logsumexp(1, keepdim=True)
    log_q = torch.where(top, log_rest, torch.log1p(-log_p.masked_fill(top, -torch.inf).exp()))
    return -(target * log_p + (1 - target) * log_q).mean()


def chance_loss(classes: int, loss: Literal["ce", "bce"] = "ce") -> float:
    """Return the loss of a prediction that gives each of the `classes` the same probability."""
    if loss == "ce":
        return math.log(classes)
    right, wrong = math.log(classes), -(classes - 1) * math.log1p(-1 / classes)
    return (right + wrong) / classes


def check_labels(y: Tensor, classes: int) -> None:
    """Raise `InputError` unless the labels `y`, (B,) int64, are in 0..`classes`-1.

    Labels on CUDA are not checked, as reading them would wait for the device, and neither are
    labels of traced code.
    """
    if torch.compiler.is_compiling() or type(y) is not Tensor or not y.numel():
        return
    # A tensor inside of a torch.func transform has no values that could be read.
    if y.device.type != "cpu" or torch._C._functorch.is_functorch_wrapped_tensor(y):
        return
    low, high = (int(value) for value in y.aminmax())
    if low < 0 or high >= classes:
        raise InputError(
            f"labels run from {low} to {high}, and the network has the classes 0 to "
            f"{classes - 1}: remove the images of other classes, or number the classes from 0"
        )


def mixed_correct(logits: Tensor, y: Tensor, mix: Mix | None) -> Tensor:
    """Return how many images of a batch are classified correctly: a scalar in [0, B] on the device.

    Under mixing, a prediction counts with the weight of the label that it equals.
    """
    hits = correct(logits, y).float()
    if mix is not None:
        hits = mix.lam * hits + (1 - mix.lam) * correct(logits, y[mix.perm]).float()
    return hits.sum()
