"""Per-image standardisation: (x - mean) / max(std, 1 / (255 sqrt(N))) over an image's N values.

The formula of `tf.image.per_image_standardization`, which Madry et al.'s CIFAR-10 challenge uses
on pixels in 0..255 with the floor 1/sqrt(N); on pixels in [0, 1] the floor is 255 times smaller.
std is the population standard deviation. The floor makes a constant image map to zeros.
"""

import torch
from torch import Tensor


def standardize(x: Tensor) -> Tensor:
    """Standardise every image of a float batch (B, C, H, W) with pixels in [0, 1] by itself.

    Differentiable, also at a constant image, where the output and the gradient stay finite.
    """
    n = x[0].numel()
    centred = x - x.mean((1, 2, 3), keepdim=True)
    # Clamping the variance, not its root, keeps the derivative finite at a constant image.
    variance = centred.square().mean((1, 2, 3), keepdim=True)
    return centred * torch.rsqrt(variance.clamp_min(1.0 / (255.0**2 * n)))
