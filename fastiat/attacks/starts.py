"""Random starts of attacks: points in the eps ball that depend on a seed and an image's index."""

import math
from typing import Literal

import torch
from torch import Tensor

from fastiat import kernels

Norm = Literal["linf", "l2"]
Noise = Literal["uniform", "normal"]
"""Distribution of a random start: uniform in a ball, or normal in every value."""


class Starts:
    """Random starts for images that are attacked batch by batch, the same for every batch size.

    Pass a `Starts` to an attack as its generator, and call `batch` before each batch. Restart
    number r has the same seed in every batch, and an image's random numbers depend on that seed and
    on the index of the image among all images. So the starts depend neither on the batch size nor
    on which rank attacks a batch.
    """

    def __init__(self, seed: int, device: torch.device | str) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)
        self._seeds: list[Tensor] = []
        self._next = self.first = 0

    def batch(self, first: int) -> None:
        """Begin a batch whose first image is number `first` of all images."""
        self.first, self._next = first, 0

    def draw(self, x: Tensor) -> Tensor:
        """Return the seed of this batch's next start, an int64 scalar on the device of `x`."""
        if self._next == len(self._seeds):
            self._seeds.append(draw_seed(x, self._generator))
        self._next += 1
        return self._seeds[self._next - 1]


def draw_seed(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw the seed of one random start: an int64 scalar on the device of `x`."""
    return torch.empty((), dtype=torch.int64, device=x.device).random_(generator=generator)


def start_in_ball(
    x: Tensor,
    eps: float,
    norm: Norm,
    clip: tuple[float, float],
    generator: torch.Generator | Starts | None,
    noise: Noise = "uniform",
) -> Tensor:
    """Return random points around each image, clipped to `clip`; see `start_from_seed`.

    One seed is drawn from `generator`, which must be on the device of `x`.
    """
    if isinstance(generator, Starts):
        seed, first = generator.draw(x), generator.first
    else:
        seed, first = draw_seed(x, generator), 0
    return start_from_seed(x, eps, norm, clip, seed, first, noise)


def start_from_seed(
    x: Tensor,
    eps: float,
    norm: Norm,
    clip: tuple[float, float],
    seed: Tensor,
    first: int = 0,
    noise: Noise = "uniform",
) -> Tensor:
    """Return the random start that `seed` determines, shaped like `x` and clipped to `clip`.

    With `noise` "uniform", the points are uniform in the ball of radius `eps` around each image.
    With "normal", noise of standard deviation `eps` is added to every value.

    `seed` is an int64 scalar on the device of `x`: a tensor, so that a captured CUDA graph reads a
    new seed at every replay. If `x` is a part of a larger set, `first` is the number of images
    before `x`.
    """
    if noise == "normal":
        return (x + (eps * gaussian_noise(x, seed, first)).to(x.dtype)).clamp_(*clip)
    values = x[:1].numel()
    if norm == "linf":
        return kernels.random_start(x, eps, seed, clip, first * values)
    # Uniform in a ball of d dimensions: a uniform direction, and a radius whose d-th power is
    # uniform in [0, eps^d].
    direction = gaussian_noise(x, seed, first)
    half = torch.full((len(x),), 0.5, dtype=direction.dtype, device=x.device)
    uniform = kernels.random_start(half, 0.5, seed + 1, (0.0, 1.0), first)
    radius = eps * uniform.pow(1 / max(values, 1))
    length = torch.linalg.vector_norm(direction.flatten(1), dim=1).clamp_min(1e-12)
    return (x + (direction * per_image(radius / length, x)).to(x.dtype)).clamp_(*clip)


def gaussian_noise(x: Tensor, seed: Tensor, first: int = 0) -> Tensor:
    """Return standard normal noise shaped like `x`, at least in fp32.

    The noise is the normal quantile of the uniform values that `kernels.random_start` draws from
    `seed`. `first` has the meaning that it has in `start_from_seed`.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    most = 1 - 2.0**-24  # the quantiles of -1 and 1 are infinite
    zeros = torch.zeros_like(x, dtype=dtype)
    uniform = kernels.random_start(zeros, 1.0, seed, (-most, most), first * x[:1].numel())
    return torch.erfinv(uniform).mul_(math.sqrt(2))


def per_image(values: Tensor, x: Tensor) -> Tensor:
    """Return a view of `values`, (B,), that broadcasts over the images of `x`, (B, ...)."""
    return values.view(-1, *[1] * (x.dim() - 1))
