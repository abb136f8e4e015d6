"""Networks by name, the card that rebuilds a saved network, and functions of logits and pixels.

Every network is called as `logits = model(x)` on pixels in [0, 1]. The network normalises its input
itself, so that an attack on the network is an attack on pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastiat.config import TrainConfig
from fastiat.engine.device import own_defaults
from fastiat.networks import sources
from fastiat.networks.builtin import (
    ACTIVATIONS,
    MLP6,
    Network,
    PreActResNet18,
    Shortcut,
    WideResNet,
)
from fastiat.networks.check import check_network
from fastiat.networks.normalise import Normalised, make_normalise
from fastiat.system.errors import InputError
from fastiat.system.settings import ARCHS, did_you_mean, is_own_arch

__all__ = [
    "ARCHS",
    "DEFAULT_WIDTH",
    "VARIANTS",
    "ModelCard",
    "Network",
    "Normalised",
    "Shortcut",
    "build",
    "card_of",
    "correct",
    "count_parameters",
    "normalisation_layers",
    "running_statistics",
    "to_pixels",
]

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
    activation: str = "relu",
    normalise: Sequence[str] = ("image",),
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
    activation: "relu" or "silu"; mlp6 has "relu" only.
    normalise: the first layer, see `fastiat.networks.normalise.make_normalise`.

    Raises `InputError` (a `ValueError`) for other values.
    """
    if name not in ARCHS:
        raise InputError(
            f"unknown arch {name!r}: choose from {', '.join(ARCHS)}{did_you_mean(name, ARCHS)}"
        )
    if variant not in VARIANTS:
        raise InputError(f"unknown variant {variant!r}: choose from {', '.join(VARIANTS)}")
    if activation not in ACTIVATIONS or (name == "mlp6" and activation != "relu"):
        raise InputError(f"unknown activation {activation!r} of {name}: choose relu or silu")
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
    first = make_normalise(normalise, in_channels)
    model: Network
    if name == "preact18":
        final_norm = variant == "standard"
        model = PreActResNet18(num_classes, in_channels, width, final_norm, activation)
    elif name == "mlp6":
        model = MLP6(num_classes, in_channels, image_size, width)
    else:
        depth = 28 if name == "wrn28_10" else 34
        authors = variant == "authors"
        model = WideResNet(depth, num_classes, in_channels, width, authors, activation)
    model.normalise = first
    return model


@dataclass(frozen=True)
class ModelCard:
    """The arguments of `build` that rebuild a saved network, and the names of its classes."""

    arch: str
    width: int | None
    """None for a network that is not one of `ARCHS`."""
    num_classes: int
    in_channels: int
    """Channels of the images."""
    image_size: int
    """Side of the images, in pixels."""
    classes: tuple[str, ...]
    """Name of each class, in the order of the logits."""
    variant: str = "standard"
    activation: str = "relu"
    normalise: tuple[str, ...] = ("image",)
    """First layer of the network, see `fastiat.networks.normalise.make_normalise`."""

    @property
    def wraps(self) -> bool:
        """Whether the network is a `Normalised`, whose tensors have the prefix "network."."""
        if self.arch in ARCHS:
            return False
        return not is_own_arch(self.arch) or self.normalise != ("none",)

    def build(self, *, pretrained: bool = False) -> nn.Module:
        """Return a freshly initialised network; `pretrained` loads a library's own weights.

        Raises `InputError` for a network of the user's own, which no file can build.
        """
        if self.arch in ARCHS:
            return build(
                self.arch,
                self.num_classes,
                self.in_channels,
                self.image_size,
                self.width,
                variant=self.variant,
                activation=self.activation,
                normalise=self.normalise,
            )
        if is_own_arch(self.arch):
            raise InputError(
                f"it holds a network of your own, {self.arch}: give it with --arch "
                f"MODULE:FUNCTION, or in Python with fastiat.load(path, model=network)"
            )
        network = sources.from_library(
            self.arch, self.num_classes, self.in_channels, pretrained=pretrained
        )
        model = Normalised(network, make_normalise(self.normalise, self.in_channels))
        model.mix_points = sources.library_points(network)
        return model

    def own(self, arch: str) -> nn.Module:
        """Return the network of the user's function `arch`, MODULE:FUNCTION, for this card."""
        network = sources.own_network(arch, self.num_classes, self.in_channels, self.image_size)
        return self.behind_normalisation(network)

    def behind_normalisation(self, network: nn.Module) -> nn.Module:
        """Return the user's `network` behind this card's normalisation, if there is any."""
        if not self.wraps:
            return network
        return Normalised(network, make_normalise(self.normalise, self.in_channels))

    def check(self, model: nn.Module) -> None:
        """Raise `InputError` unless `model` takes this card's images and returns its logits."""
        shape = (self.in_channels, self.image_size, self.image_size)
        check_network(model, shape, self.num_classes, trained=False, attacked=False)


def card_of(
    config: TrainConfig, classes: tuple[str, ...], shape: tuple[int, int, int]
) -> ModelCard:
    """Return the card of the network that `config` trains on images of `shape`, (C, H, W)."""
    channels, size, _ = shape
    builtin, normalise = config.arch in ARCHS, config.normalise
    if normalise is None and builtin:
        normalise = ("image",)
    elif normalise is None:
        own = is_own_arch(config.arch)
        normalise = ("none",) if own else sources.library_normalise(config.arch, channels)
    width = DEFAULT_WIDTH[config.arch] if builtin and config.width is None else config.width
    return ModelCard(
        arch=config.arch,
        width=width,
        num_classes=len(classes),
        in_channels=channels,
        image_size=size,
        classes=classes,
        variant=config.variant,
        activation=config.activation,
        normalise=normalise,
    )


def normalisation_layers(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Return the BatchNorm layers of `model`, of any dimension, in the order of its modules."""
    batch_norm = nn.modules.batchnorm._BatchNorm
    return [module for module in model.modules() if isinstance(module, batch_norm)]


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Return BatchNorm's running means and variances, which every training pass changes."""
    return [
        buffer
        for layer in normalisation_layers(model)
        for buffer in layer.buffers(recurse=False)
        if buffer.is_floating_point()
    ]


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
