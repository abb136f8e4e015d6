"""Normalisation of pixels as the first layer of a network, so that an attack is on the pixels."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastiat import kernels
from fastiat.system.errors import InputError

IMAGENET = (0.485, 0.456, 0.406, 0.229, 0.224, 0.225)
"""Mean, then standard deviation, of ImageNet's three channels, as torchvision's weights need."""

_EXPORTING_KNOWN = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)


class StandardizeImage(nn.Module):
    """Standardise every image over all of its pixels, see `fastiat.kernels.standardize`."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`, (B, C, H, W), with mean 0 and standard deviation 1 in every image."""
        # A traced or exported program must run where fastiat's operators are not installed, so it
        # gets PyTorch's own. torch.fx traces with proxies, which are no tensors.
        if not isinstance(x, Tensor) or _exporting() or torch.jit.is_tracing():
            return _standardize(x)
        return kernels.standardize(x)


def _exporting() -> bool:
    """Return whether `torch.export` runs this code."""
    # Dynamo of torch 2.11 takes `is_exporting` for true in every program that it compiles.
    known = _EXPORTING_KNOWN or not torch.compiler.is_dynamo_compiling()
    return known and torch.compiler.is_exporting()


def _standardize(x: Tensor) -> Tensor:
    """Return what `kernels.standardize` returns, by operators of PyTorch, which compute in fp32."""
    rows = x.flatten(1).float()
    rows = rows - rows.mean(1, keepdim=True)
    variance = rows.square().mean(1, keepdim=True)
    floor = 1 / (255.0**2 * rows.shape[1])
    return (rows * torch.rsqrt(variance.clamp_min(floor))).reshape(x.shape).to(x.dtype)


class NormalizeChannels(nn.Module):
    """Subtract a mean from every channel and divide the channel by a standard deviation.

    mean, std: one number for each channel; standard deviations are above 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32)[:, None, None])
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised pixels, shaped like `x`, (B, C, H, W)."""
        return (x - self.mean) / self.std


class Normalised(nn.Module):
    """A network behind a layer that normalises its input: `network(normalise(x))`.

    network: a network of another library or of the user, from normalised pixels to logits.
    normalise: see `make_normalise`.
    """

    def __init__(self, network: nn.Module, normalise: nn.Module) -> None:
        super().__init__()
        self.normalise, self.network = normalise, network
        self.mix_points: tuple[str, ...] = getattr(network, "mix_points", ("input",))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, (B, num_classes), for pixels `x` in [0, 1], (B, C, H, W)."""
        logits: Tensor = self.network(self.normalise(x))
        return logits


def inner(model: nn.Module) -> nn.Module:
    """Return the network behind a normalisation, the one that the user knows; else `model`."""
    return model.network if isinstance(model, Normalised) else model


def make_normalise(words: Sequence[str], channels: int) -> nn.Module:
    """Return the layer that `--normalise` describes, for images of `channels` channels.

    words: ("image",) is `StandardizeImage` (section 4.1 of the paper), ("imagenet",) subtracts the
        mean of ImageNet's channels and divides by their standard deviations, ("none",) changes
        nothing. Otherwise the words are numbers: a mean for each channel, then a standard deviation
        for each.

    Raises `InputError` for other words, for numbers that do not fit `channels`, and for standard
    deviations that are not above 0.
    """
    if tuple(words) == ("none",):
        return nn.Identity()
    if tuple(words) == ("image",):
        return StandardizeImage()
    imagenet = tuple(words) == ("imagenet",)
    try:
        numbers = list(IMAGENET) if imagenet else [float(word) for word in words]
    except ValueError:
        raise InputError(
            f"--normalise {' '.join(words)[:50]}: choose image, imagenet, none, or give a mean and "
            f"then a standard deviation for each channel"
        ) from None
    mean, std = numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]
    if len(numbers) != 2 * channels:
        raise InputError(
            f"--normalise {' '.join(words)} is for {len(mean)} channels, but the images have "
            f"{channels}: give {channels} means, then {channels} standard deviations"
        )
    if not all(map(math.isfinite, numbers)) or min(std) <= 0:
        raise InputError(
            f"--normalise {' '.join(words)}: give finite means and standard deviations above 0"
        )
    return NormalizeChannels(mean, std)
