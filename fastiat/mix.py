"""Mixing: the lambda, the pairing and the layer of an update, and the loss on mixed logits.

Mixing is data, drawn outside the model: `logits = model(x, draw("manifold", len(x)))`.
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

# torch leaves samples with the label -100 out; here that is as wrong as any other such label.
NO_LABEL = -(2**63)


@dataclass(frozen=True)
class Mix:
    """One draw: interpolate `lam * h + (1 - lam) * h[perm]` at mix point `layer`."""

    layer: int
    """Mix point: 0 is the standardised input, 1 and 2 follow the first and second group."""
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

    `kind` "none" gives None and draws nothing, "mixup" mixes at layer 0 with alpha 1, "manifold"
    at layer 0, 1 or 2 with alpha 2 (sections 3 and 4.1 of the paper). `generator` is a CPU
    generator; `device` is where the tensors end up. Raises `InputError` for an unknown kind, a
    batch below 1, an alpha that is not positive and finite, or layers that are no mix points.
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
    # torch has no Beta that takes a generator: numpy draws it, seeded from the generator.
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device="cpu"))
    values = np.random.default_rng(seed).beta(alpha, alpha, batch if per_sample else None)
    lam = torch.as_tensor(values, dtype=torch.float32, device="cpu")
    return Mix(layer, perm.to(device, non_blocking=True), lam.to(device, non_blocking=True))


def mixed_loss(
    logits: Tensor, y: Tensor, mix: Mix | None, loss: Literal["ce", "bce"] = "ce"
) -> Tensor:
    """Return the batch mean of lam * L(logits, y) + (1 - lam) * L(logits, y[perm]), a scalar.

    `logits` is (B, K), `y` (B,) int64; without `mix` it is plain L. `loss` "ce" is cross-entropy,
    section 3 of the paper; "bce" is the manifold mixup code's binary cross-entropy of the softmax
    against the mixed one-hot labels. Logits in half precision are calculated in fp32, as is the
    loss. Raises `InputError` for labels outside 0..K-1 on the CPU; on CUDA, where looking would
    wait for the device, they give NaN or a device-side assertion.
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

    The logarithms are taken of the logits: 1 - p of a confident prediction is 0 in fp32, and
    `F.binary_cross_entropy` then puts -100 for its logarithm.
    """
    log_p = F.log_softmax(logits, 1)
    top = F.one_hot(logits.argmax(1), logits.shape[1]).bool()
    # Only the largest p can be close to 1: its complement is the sum of the others.
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

    They are looked at where that needs no wait: on the CPU, and not while code is traced.
    """
    if torch.compiler.is_compiling() or type(y) is not Tensor or not y.numel():
        return
    # A tensor that a transform of torch.func batches has no values to look at.
    if y.device.type != "cpu" or torch._C._functorch.is_functorch_wrapped_tensor(y):
        return
    low, high = (int(value) for value in y.aminmax())
    if low < 0 or high >= classes:
        raise InputError(
            f"labels run from {low} to {high}, and the network has the classes 0 to "
            f"{classes - 1}: remove the images of other classes, or number the classes from 0"
        )


def mixed_correct(logits: Tensor, y: Tensor, mix: Mix | None) -> Tensor:
    """Return how much of a batch is predicted right, a scalar in [0, B], without a host sync.

    Under mixing a prediction counts with the weight of the label it hits.
    """
    hits = correct(logits, y).float()
    if mix is not None:
        hits = mix.lam * hits + (1 - mix.lam) * correct(logits, y[mix.perm]).float()
    return hits.sum()
