"""Networks: preact18, wrn28_10, wrn34_10 and mlp6, with per-image standardisation and mix points.

Every network is called as `logits = model(x, mix=None)` on pixels in [0, 1]. The network
standardises its input itself, so that an attack on the network is an attack on pixels. `mix` (a
`fastiat.mix.Mix`) interpolates the batch at mix point 0 (after standardisation), 1 (after group 1)
or 2 (after group 2).
"""

import difflib
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastiat import kernels
from fastiat.engine import onednn
from fastiat.engine.device import own_defaults
from fastiat.system.errors import InputError

MIX_POINTS = (0, 1, 2)


class Network(nn.Module):
    """Base class: standardise the pixels, run `stem`, the groups and `head`, and mix between them.

    Mix point 0 is before `stem`, 1 after `groups[0]` and 2 after `groups[1]`. Subclasses set the
    three attributes.
    """

    stem: nn.Module
    groups: nn.ModuleList
    head: nn.Module

    def forward(self, x: Tensor, mix: Any = None) -> Tensor:
        """Return logits, (B, num_classes), for pixels `x` in [0, 1], (B, C, H, W).

        `mix` is an object with `layer`, `perm` and `lam`, such as a `fastiat.mix.Mix`, or None.
        Raises `InputError` for a layer that is not in `MIX_POINTS`.
        """
        if mix is not None and mix.layer not in MIX_POINTS:
            raise InputError(f"mix layer is {mix.layer}: give 0, 1 or 2")
        x = kernels.standardize(x)
        if mix is not None and mix.layer == 0:
            x = kernels.mix(x, mix.perm, mix.lam)
        x = self.stem(x)
        for point, group in enumerate(self.groups, start=1):
            x = group(x)
            if mix is not None and mix.layer == point:
                x = kernels.mix(x, mix.perm, mix.lam)
        return self.head(x)


class Shortcut(nn.Conv2d):
    """A strided 1x1 convolution, computed on the CPU as slicing and a convolution of stride 1.

    The result is the same. With few input channels, oneDNN's weight gradient of a strided 1x1
    convolution is defective. The slicing avoids that gradient in any training code, also outside
    fastiat: see `fastiat.engine.onednn`.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and self.in_channels < onednn.CHANNELS:
            rows, columns = self.stride
            # `clone` keeps the memory format of `x`; vmap supports no other memory format.
            return F.conv2d(x[..., ::rows, ::columns].clone(), self.weight, self.bias)
        return super().forward(x)


class PreActBlock(nn.Module):
    """Pre-activation residual block: BN, ReLU, 3x3, BN, ReLU, 3x3 (He et al. 2016b, fig. 1b)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = Shortcut(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        return shortcut + self.conv2(F.relu(self.bn2(out)))


def _group(
    inputs: int, outputs: int, blocks: int, stride: int, block: type[PreActBlock] = PreActBlock
) -> nn.Sequential:
    """Return `blocks` residual blocks; the first has `stride` and changes the channels."""
    sizes = [inputs] + [outputs] * (blocks - 1)
    return nn.Sequential(*(block(n, outputs, stride if i == 0 else 1) for i, n in enumerate(sizes)))


class AuthorsWideBlock(PreActBlock):
    """The block in wide_resnet.py of the manifold mixup code; it differs from the published block.

    The convolutions have biases, the second convolution has the stride, and the input of the
    shortcut is the input of the block, before BatchNorm and ReLU.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(inputs, outputs, stride)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride, padding=1)
        if self.shortcut is not None:
            self.shortcut = Shortcut(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        out = self.conv1(F.relu(self.bn1(x)))
        return shortcut + self.conv2(F.relu(self.bn2(out)))


class PreActResNet18(Network):
    """Pre-activation ResNet-18 (He et al. 2016b): four groups of two blocks, final BatchNorm, ReLU.

    `final_norm=False` omits the final BatchNorm and ReLU, as the manifold mixup code does. Training
    with cross-entropy at learning rate 0.1 then diverges within 20 updates (RECORDS.md). The
    initialisation is PyTorch's default, as in the published codebases.
    """

    def __init__(
        self, num_classes: int, in_channels: int, width: int, final_norm: bool = True
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.groups = nn.ModuleList(
            [_group(width, width, 2, 1)]
            + [_group(n * width, 2 * n * width, 2, 2) for n in (1, 2, 4)]
        )
        self.head = nn.Sequential(
            *((nn.BatchNorm2d(8 * width), nn.ReLU()) if final_norm else ()),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8 * width, num_classes),
        )


class WideResNet(Network):
    """Wide residual network (Zagoruyko & Komodakis 2016), depth 6n + 4, dropout 0.

    Convolutions have the normal initialisation of He et al. (fan out), as in the original code.
    `authors=True` is the network of the manifold mixup code: `AuthorsWideBlock`, biases in every
    convolution, momentum 0.9 in the last BatchNorm, PyTorch's default initialisation.
    """

    def __init__(
        self, depth: int, num_classes: int, in_channels: int, width: int, authors: bool = False
    ) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        block = AuthorsWideBlock if authors else PreActBlock
        self.stem = nn.Conv2d(in_channels, 16, 3, padding=1, bias=authors)
        self.groups = nn.ModuleList(
            [_group(16, 16 * width, blocks, 1, block)]
            + [_group(n * width, 2 * n * width, blocks, 2, block) for n in (16, 32)]
        )
        self.head = nn.Sequential(
            nn.BatchNorm2d(64 * width, momentum=0.9 if authors else 0.1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64 * width, num_classes),
        )
        if authors:
            return
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)


class MLP6(Network):
    """Six linear layers with ReLU between and no BatchNorm: the network of the paper's Figure 1.

    Mix points 1 and 2 are the outputs of the first and the second hidden layer, after their ReLU.
    """

    def __init__(self, num_classes: int, in_channels: int, image_size: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Flatten()
        sizes = [in_channels * image_size**2, *[width] * 5]
        self.groups = nn.ModuleList(
            nn.Sequential(nn.Linear(n, m), nn.ReLU()) for n, m in itertools.pairwise(sizes)
        )
        self.head = nn.Linear(width, num_classes)


ARCHS = ("preact18", "wrn28_10", "wrn34_10", "mlp6")
VARIANTS = ("standard", "authors")
DEFAULT_WIDTH = {"preact18": 64, "wrn28_10": 10, "wrn34_10": 10, "mlp6": 512}


@own_defaults(keep_device=True)
def build(
    name: str,
    num_classes: int = 10,
    in_channels: int = 3,
    image_size: int = 32,
    width: int | None = None,
    *,
    variant: str = "standard",
) -> Network:
    """Return a freshly initialised network in training mode, in fp32.

    name: one of `ARCHS`.
    num_classes: number of logits, at least 2.
    in_channels: channels of the images, at least 1.
    image_size: side of the square images in pixels, at least 8.
    width: number of channels of the first group (preact18: 64), widening factor (wrn: 10) or number
        of hidden units (mlp6: 512), at least 1. None uses the number in brackets.
    variant: "standard" is the network as published; "authors" is the network of the manifold mixup
        code (preact18: no final BatchNorm and ReLU; wrn: see `WideResNet`; mlp6: no difference).

    Raises `InputError` (a `ValueError`) for other values.
    """
    if name not in ARCHS:
        close = difflib.get_close_matches(name, ARCHS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise InputError(f"unknown arch {name!r}: choose from {', '.join(ARCHS)}{hint}")
    if variant not in VARIANTS:
        raise InputError(f"unknown variant {variant!r}: choose from {', '.join(VARIANTS)}")
    width = DEFAULT_WIDTH[name] if width is None else width
    limits = {
        "num_classes": (num_classes, 2),
        "in_channels": (in_channels, 1),
        "image_size": (image_size, 8),
        "width": (width, 1),
    }
    for what, (value, least) in limits.items():
        if value < least:
            raise InputError(f"{what} is {value}, but {name} needs at least {least}")
    if name == "preact18":
        return PreActResNet18(num_classes, in_channels, width, final_norm=variant == "standard")
    if name == "mlp6":
        return MLP6(num_classes, in_channels, image_size, width)
    depth = 28 if name == "wrn28_10" else 34
    return WideResNet(depth, num_classes, in_channels, width, authors=variant == "authors")


@dataclass(frozen=True)
class ModelCard:
    """The arguments of `build` that rebuild a saved network, and the names of its classes."""

    arch: str
    width: int
    num_classes: int
    in_channels: int
    """Channels of the images."""
    image_size: int
    """Side of the images, in pixels."""
    classes: tuple[str, ...]
    """Name of each class, in the order of the logits."""
    variant: str = "standard"

    def build(self) -> Network:
        """Return a freshly initialised network with these arguments."""
        return build(
            self.arch,
            self.num_classes,
            self.in_channels,
            self.image_size,
            self.width,
            variant=self.variant,
        )


def normalisation_layers(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Return the BatchNorm layers of `model`, of any dimension, in the order of its modules."""
    batch_norm = nn.modules.batchnorm._BatchNorm
    return [module for module in model.modules() if isinstance(module, batch_norm)]


def count_parameters(model: nn.Module) -> int:
    """Return the number of values in the parameters of `model` that require a gradient."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def correct(logits: Tensor, y: Tensor) -> Tensor:
    """Return which images are classified correctly, (B,) bool, for logits (B, K) and labels (B,).

    A row of logits that contains a NaN, or only -inf, predicts no class and counts as wrong.
    """
    # The maximum of a row with a NaN is NaN.
    return (logits.argmax(1) == y) & (logits.amax(1) > -torch.inf)


def to_pixels(images: Tensor) -> Tensor:
    """Return images of values 0..255, usually uint8, as fp32 pixels in [0, 1].

    Shape and memory format stay the same.
    """
    return images.to(torch.float32) / 255
