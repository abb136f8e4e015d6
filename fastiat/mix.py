"""Mixing: lambda, permutation and layer of one update, and the loss of mixed logits.

A `Mix` is drawn outside the network. `MixPoints` interpolates the output of one of the network's
modules with it, so that networks take pixels only:

    points = MixPoints(model, ["input", "layer1", "layer2"])
    mix = draw("manifold", len(x))
    with points.applied(mix):
        mixed_loss(model(x), y, mix).backward()
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastiat import kernels
from fastiat.models import Network, Normalised, correct
from fastiat.networks.check import choose_module, named_points
from fastiat.system.errors import InputError

Kind = Literal["none", "mixup", "manifold", "cutmix"]
KINDS: tuple[Kind, ...] = ("none", "mixup", "manifold", "cutmix")
# Section 4.1 of the paper (and the README of the manifold mixup code): Beta(1, 1) and Beta(2, 2).
# Section 3.1 of Yun et al. 2019: Beta(1, 1).
DEFAULT_ALPHA = {"mixup": 1.0, "manifold": 2.0, "cutmix": 1.0}
DEFAULT_LAYERS = {"mixup": (0,), "manifold": (0, 1, 2), "cutmix": (0,)}

# PyTorch's losses skip samples with the label `ignore_index`, by default -100. Here -100 is as
# wrong as any other negative label, so `ignore_index` is set to a label that no data set has.
NO_LABEL = -(2**63)


@dataclass(frozen=True)
class Mix:
    """One draw: h, the values at mix point `layer`, become `lam * h + (1 - lam) * h[perm]`."""

    layer: int
    """Number of the mix point, counted from 0; by default 0 is the input of the network, after its
    normalisation, 1 and 2 are the outputs of its first and second group of layers."""
    perm: Tensor
    """Index of the sample that each sample is mixed with: a permutation of 0..B-1, (B,) int64."""
    lam: Tensor
    """Weight of the sample itself, fp32 in [0, 1]: a scalar, or (B,) with a value per sample."""
    box: Tensor | None = None
    """CutMix: top, left, bottom and right of the box that is pasted from `h[perm]`, without the
    last row and column, int64 (4,), or (B, 4) with a box per sample. `lam` is the share of the area
    outside of the box. None: `h` is interpolated instead."""

    def blend(self, h: Tensor) -> Tensor:
        """Return `h`, (B, ...), mixed as this draw says; a box needs images, (B, C, H, W)."""
        if self.box is None:
            return kernels.mix(h, self.perm, self.lam)
        return paste(h, self.perm, self.box)


def paste(x: Tensor, perm: Tensor, box: Tensor) -> Tensor:
    """Return images `x`, (B, C, H, W), with the box from `x[perm]` (Yun et al. 2019, eq. 1).

    perm, box: see `Mix`.
    """
    # Comparisons, not slices: the bounds are values on the device, which a captured CUDA graph
    # reads anew at every replay.
    top, left, bottom, right = (bound[..., None] for bound in box.unbind(-1))
    rows, columns = (torch.arange(side, device=x.device) for side in x.shape[2:])
    in_rows, in_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    inside = in_rows[..., :, None] & in_columns[..., None, :]  # (H, W) or (B, H, W)
    return torch.where(inside.unsqueeze(-3), x[perm], x)


class MixPoints:
    """The mix points of a network: forward hooks that interpolate the outputs of named modules.

    model: the network.
    names: the mix points 0, 1, ... by name: "input" is the input of the network, after its own
        normalisation; any other name is a module of the network, as in `named_modules`, whose
        output is mixed. None uses `model.mix_points` or, for a network without that attribute,
        "input".
    pixels: whether "input" is before the normalisation instead of after it.

    The hooks do nothing outside of `applied`. Raises `InputError` for a module that the network
    does not have.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str] | None = None, *, pixels: bool = False
    ) -> None:
        self.names = tuple(default_points(model) if names is None else names)
        self.mix: Mix | None = None
        known = named_points(model)
        for name in self.names:
            if name != "input" and name not in known:
                raise InputError(f"the network has no module {name}: {choose_module(name, known)}")
        first = model.normalise if isinstance(model, Network | Normalised) and not pixels else None
        self._hooks = []
        for layer, name in enumerate(self.names):
            mix_output = partial(self._mix_output, layer)
            if name != "input":
                hook = known[name].register_forward_hook(mix_output)
            elif isinstance(first, nn.Module):
                hook = first.register_forward_hook(mix_output)
            else:
                hook = model.register_forward_pre_hook(partial(self._mix_input, layer))
            self._hooks.append(hook)

    @contextmanager
    def applied(self, mix: Mix | None) -> Iterator[None]:
        """Mix the passes of the network in this context; None mixes nothing.

        Backward passes belong in the context too: a network with activation checkpointing repeats
        its forward pass in them. Raises `InputError` for a layer that is not a mix point.
        """
        if mix is not None and not 0 <= mix.layer < len(self.names):
            raise InputError(
                f"mix layer is {mix.layer}: give 0 to {len(self.names) - 1}, the numbers of "
                f"{', '.join(self.names)}"
            )
        before, self.mix = self.mix, mix
        try:
            yield
        finally:
            self.mix = before

    def remove(self) -> None:
        """Remove the hooks from the network."""
        for hook in self._hooks:
            hook.remove()

    def _mix_output(self, layer: int, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        mix = self.mix
        if mix is None or mix.layer != layer:
            return output
        return mix.blend(output)

    def _mix_input(self, layer: int, module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        return (self._mix_output(layer, module, None, inputs[0]), *inputs[1:])


def default_points(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a network's own mix points; "input" alone for a network without any."""
    points = getattr(model, "mix_points", None)
    # A network of the user's own may have an attribute of this name for something else.
    if isinstance(points, tuple | list) and all(isinstance(name, str) for name in points):
        return tuple(points)
    return ("input",)


def point_names(model: nn.Module, kind: Kind, given: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of the mix points of a training.

    given: names of modules, "input", or numbers of the network's own mix points (0 is "input").
        None means "input" alone for mixup and all of the network's own mix points for manifold
        mixup.

    Raises `InputError` for a number that the network has no mix point for, and for a mix point that
    is given twice: it would be drawn twice as often.
    """
    own = default_points(model)
    if given is None:
        return own if kind == "manifold" else ("input",)
    names = ["input" if name == "0" else name for name in given]
    for name in names:
        if name.isdecimal() and name not in named_points(model) and int(name) >= len(own):
            numbers = ", ".join(f"{number} ({point})" for number, point in enumerate(own))
            raise InputError(
                f"--mix-at {name}: this network has the mix points {numbers}; give one of them or "
                f"the name of a module"
            )
    numbered = dict(zip(map(str, range(len(own))), own, strict=True))
    names = [numbered.get(name, name) for name in names]
    for name, word in zip(names, given, strict=True):
        if names.count(name) > 1:
            raise InputError(f"--mix-at {word} names {name} twice: name different mix points")
    return tuple(names)


def draw(
    kind: Kind,
    batch: int,
    alpha: float | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    *,
    layers: tuple[int, ...] | None = None,
    per_sample: bool = False,
    size: tuple[int, int] | None = None,
) -> Mix | None:
    """Draw the mixing of one update: layer uniform over `layers`, lambda ~ Beta(alpha, alpha).

    kind: "none" returns None and draws nothing; "mixup" mixes at layer 0 with alpha 1, "manifold"
        at layer 0, 1 or 2 with alpha 2 (sections 3 and 4.1 of the paper); "cutmix" pastes a box
        of another image, at layer 0 with alpha 1 (Yun et al. 2019).
    batch: number of images, B.
    alpha: parameter of the Beta distribution, positive and finite; None uses the default of `kind`.
    generator: a CPU generator; None uses PyTorch's global generator.
    device: device of the returned tensors; None is the CPU.
    layers: numbers of the mix points to draw from; None uses the default of `kind`.
    per_sample: draw a lambda for each image, (B,), instead of one lambda for the batch.
    size: height and width of the images, which "cutmix" needs.

    Raises `InputError` for an unknown kind, a batch below 1, an alpha that is not positive and
    finite, or layers that are empty or negative.
    """
    if kind not in KINDS:
        raise InputError(f"unknown mix {kind!r}: choose from {', '.join(KINDS)}")
    if kind == "none":
        return None
    alpha = DEFAULT_ALPHA[kind] if alpha is None else alpha
    layers = DEFAULT_LAYERS[kind] if layers is None else layers
    if batch < 1:
        raise InputError(f"a batch of {batch} images cannot be mixed: give at least 1 image")
    if not 0 < alpha < float("inf"):
        raise InputError(f"mix alpha is {alpha}, but Beta(alpha, alpha) needs a positive number")
    if not layers or min(layers) < 0:
        raise InputError(f"mix layers are {layers}: give numbers of mix points, such as 0, 1, 2")
    layer = layers[int(torch.randint(len(layers), (), generator=generator, device="cpu"))]
    perm = torch.randperm(batch, generator=generator, device="cpu")
    # `torch.distributions.Beta` takes no generator, so NumPy draws lambda, with a seed from
    # `generator`.
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device="cpu"))
    random = np.random.default_rng(seed)
    values, box = random.beta(alpha, alpha, batch if per_sample else None), None
    if kind == "cutmix":
        if size is None:
            raise InputError("cutmix needs the size of the images: give size=(height, width)")
        bounds, values = draw_boxes(values, size, random)
        box = torch.as_tensor(bounds, device="cpu").to(device, non_blocking=True)
    lam = torch.as_tensor(values, dtype=torch.float32, device="cpu")
    return Mix(layer, perm.to(device, non_blocking=True), lam.to(device, non_blocking=True), box)


def draw_boxes(lam: Any, size: tuple[int, int], random: np.random.Generator) -> tuple[Any, Any]:
    """Return the boxes of CutMix, int64 (..., 4), see `Mix.box`, and the lambdas of their areas.

    A box has the share 1 - `lam`, (...), of the area of an image of `size`, and its centre is
    uniform. The part that lies outside of the image is cut off, so the lambda of what remains is
    larger (Yun et al. 2019, section 3.1, and their published code).
    """
    sides = np.asarray(size)
    lengths = (sides * np.sqrt(1 - np.asarray(lam))[..., None]).astype(np.int64)
    centres = random.integers(sides, size=lengths.shape)
    first = np.clip(centres - lengths // 2, 0, sides)
    last = np.clip(centres + lengths // 2, 0, sides)
    areas = (last - first).prod(-1)
    return np.concatenate([first, last], -1), 1 - areas / sides.prod()


def soft_labels(y: Tensor, mix: Mix, classes: int) -> Tensor:
    """Return the labels of a mixed batch as class probabilities, (B, K) fp32.

    They are lam onehot(y) + (1 - lam) onehot(y[perm]), the expected labels of `mixed_loss`.
    """
    return kernels.mix(F.one_hot(y, classes).float(), mix.perm, mix.lam)


def mixed_loss(
    logits: Tensor,
    y: Tensor,
    mix: Mix | None,
    loss: Literal["ce", "bce"] = "ce",
    smoothing: float = 0.0,
) -> Tensor:
    """Return the batch mean of lam * L(logits, y) + (1 - lam) * L(logits, y[perm]), a scalar.

    logits: (B, K).
    y: labels, (B,) int64.
    mix: the mixing that the network was called with; None returns the mean of L(logits, y).
    loss: "ce" is cross-entropy (section 3 of the paper). "bce" is the loss of the manifold mixup
        code: binary cross-entropy of the softmax against the mixed one-hot labels.
    smoothing: s in [0, 1]; a label, a distribution over the K classes, becomes
        (1 - s) label + s / K (Szegedy et al. 2016, section 7).

    The loss is computed at least in fp32. Labels outside 0..K-1 raise `InputError` on the CPU. On
    CUDA, reading labels would synchronize with the GPU, so wrong labels give NaN or a device-side
    assertion instead.
    """
    check_labels(y, logits.shape[0], logits.shape[1])
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if loss == "bce":
        target = F.one_hot(y, logits.shape[1]).to(logits.dtype)
        if mix is not None:
            target = kernels.mix(target, mix.perm, mix.lam)
        if smoothing:
            target = (1 - smoothing) * target + smoothing / logits.shape[1]
        return _binary_cross_entropy(logits, target)
    if mix is None:
        hard = F.cross_entropy(logits, y, ignore_index=NO_LABEL)
    else:
        hard = kernels.mixed_cross_entropy(logits, y, y[mix.perm], mix.lam)
    if not smoothing:
        return hard
    # The uniform part of the labels is the same for both images of a pair.
    return (1 - smoothing) * hard - smoothing * F.log_softmax(logits, 1).mean()


def _binary_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean over B and K of -t log p - (1 - t) log(1 - p), p = softmax(logits), (B, K).

    The result is computed from the logits, not from p: if a prediction is confident, 1 - p rounds
    to 0 in fp32, and `F.binary_cross_entropy` clamps log(1 - p) to -100.
    """
    log_p = F.log_softmax(logits, 1)
    top = F.one_hot(logits.argmax(1), logits.shape[1]).bool()
    # Only the largest p can be close to 1, where 1 - p would lose its digits. For this class, 1 - p
    # is computed as the sum of the other probabilities.
    others = logits.masked_fill(top, -torch.inf).logsumexp(1, keepdim=True)
    log_rest = others - logits.logsumexp(1, keepdim=True)
    log_q = torch.where(top, log_rest, torch.log1p(-log_p.masked_fill(top, -torch.inf).exp()))
    return -(target * log_p + (1 - target) * log_q).mean()


def chance_loss(classes: int, loss: Literal["ce", "bce"] = "ce") -> float:
    """Return the loss of a prediction that gives all `classes` the same probability."""
    if loss == "ce":
        return math.log(classes)
    right, wrong = math.log(classes), -(classes - 1) * math.log1p(-1 / classes)
    return (right + wrong) / classes


def check_label_type(y: object) -> None:
    """Raise `TypeError` unless `y` is an int64 tensor."""
    if not isinstance(y, Tensor) or y.dtype != torch.int64:
        given = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"y is {given}: give class labels as an int64 tensor, such as y.long()")


def check_labels(y: Tensor, batch: int, classes: int) -> None:
    """Raise `InputError` unless `y` has `batch` labels, (B,), in 0..`classes`-1.

    Labels that are no int64 tensor raise `TypeError`. The values of labels on CUDA are not checked,
    because reading them would synchronize with the GPU. Values in code that PyTorch compiles or
    traces are not checked either.
    """
    check_label_type(y)
    if y.shape != (batch,):
        raise InputError(
            f"y has shape {tuple(y.shape)}: give one label for each of the {batch} rows of logits"
        )
    if torch.compiler.is_compiling() or type(y) is not Tensor or not y.numel():
        return
    # The values of a tensor inside a torch.func transform cannot be read.
    if y.device.type != "cpu" or torch._C._functorch.is_functorch_wrapped_tensor(y):
        return
    low, high = (int(value) for value in y.aminmax())
    if low < 0 or high >= classes:
        raise InputError(
            f"labels run from {low} to {high}, but the network has the classes 0 to "
            f"{classes - 1}: remove the images of other classes, or number the classes from 0"
        )


def mixed_correct(logits: Tensor, y: Tensor, mix: Mix | None) -> Tensor:
    """Return how many images of a batch are classified correctly: a scalar in [0, B] on the device.

    With `mix`, a prediction counts `lam` if it equals the image's own label, 1 - `lam` if it equals
    the label of the image that it is mixed with, and 1 if it equals both.
    """
    hits = correct(logits, y).float()
    if mix is not None:
        hits = mix.lam * hits + (1 - mix.lam) * correct(logits, y[mix.perm]).float()
    return hits.sum()
