"""Attacks on images that were normalised by a mean and a standard deviation for each channel."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from fastiat.engine.modes import Model
from fastiat.system.errors import InputError

Normalise = tuple[Sequence[float] | Tensor, Sequence[float] | Tensor]
"""Mean and standard deviation of each channel."""


class NormalisePixels(nn.Module):
    """The normalisation (pixels - mean) / std of each channel, and its inverse.

    normalise: (mean, std), each a sequence of C numbers or a tensor of shape (C,), (C, 1, 1) or
        (1, C, 1, 1).

    Raises `InputError` for other shapes, for numbers that are not finite and for a standard
    deviation that is not above 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, normalise: Normalise) -> None:
        super().__init__()
        try:
            # Not inference tensors, which autograd could not save; float64 is rounded once, to the
            # dtype in which a batch is computed.
            with torch.inference_mode(False):
                mean, std = (
                    torch.as_tensor(part, dtype=torch.float64, device="cpu").detach().clone()
                    for part in normalise
                )
        except (TypeError, ValueError):
            raise InputError(
                "normalise is not (mean, std): give two sequences with a number for each channel"
            ) from None
        shapes = tuple(mean.shape), tuple(std.shape)
        if mean.numel() != std.numel() or any(max(s, default=0) != mean.numel() for s in shapes):
            raise InputError(
                f"normalise has a mean of shape {shapes[0]} and a std of shape {shapes[1]}: give a "
                f"number for each channel, (C,) and (C,)"
            )
        if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
            raise InputError(
                f"normalise has mean {mean.flatten().tolist()} and std {std.flatten().tolist()}: "
                f"give finite numbers, and standard deviations above 0"
            )
        self.register_buffer("mean", mean.flatten())
        self.register_buffer("std", std.flatten())

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the images, (B, C, ...), of `pixels`, in their dtype, on the device of `self`."""
        mean, std, wide = self._over(pixels)
        return ((wide - mean) / std).to(pixels.dtype)

    def pixels(self, x: Tensor) -> Tensor:
        """Return the pixels from which `x`, (B, C, ...), was normalised; move `self` to `x`."""
        if x.dim() < 2 or x.shape[1] != len(self.mean):
            raise InputError(
                f"normalise is for {len(self.mean)} channels, but x has shape {tuple(x.shape)}: "
                f"give a mean and a std for each channel, x.shape[1]"
            )
        with torch.inference_mode(False):
            self.to(x.device)
        mean, std, wide = self._over(x)
        return (wide * std + mean).to(x.dtype)

    def before(self, model: Model) -> Model:
        """Return the network of pixels: this normalisation, then `model`."""
        if isinstance(model, nn.Module):
            return nn.Sequential(self, model)
        # Not a module: the modules of a function are found in the arguments of a `partial`.
        return partial(_call, self, model)

    def _over(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean and std as they broadcast over `x`, and `x`, all at least in fp32."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        shape = (-1, *[1] * (x.dim() - 2))
        mean, std = (part.to(dtype).view(shape) for part in (self.mean, self.std))
        return mean, std, x.to(dtype)


def _call(normalise: NormalisePixels, model: Model, pixels: Tensor) -> Tensor:
    return model(normalise(pixels))
