"""Random resized crops of a batch on its device (Szegedy et al. 2015), with scale 0.25 to 1.

As in torchvision's `RandomResizedCrop`, a crop's share of the area and the logarithm of its ratio
of width to height are uniform; but the smallest share is not 0.08: attacks need recognisable
images.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

SCALE = (0.25, 1.0)
RATIO = (3 / 4, 4 / 3)
TRIES = 10
"""Draws of a box; if none of them fits into the image, the box is the whole image."""


def draw_boxes(
    count: int, height: int, width: int, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """Draw `count` boxes in images of `height` x `width` pixels: (count, 4) int64 on `device`.

    A box is (top, left, height, width) in pixels. The draws do not wait for the device.
    """
    area, ratio, top, left = torch.rand(4, TRIES, count, generator=generator, device=device)
    area = height * width * (SCALE[0] + (SCALE[1] - SCALE[0]) * area)
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    ratio = torch.exp(low + (high - low) * ratio)
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (w > 0) & (h > 0) & (w <= width) & (h <= height)
    whole = torch.ones_like(fits[:1])
    # The first try that fits; behind the tries is the whole image.
    first = torch.cat([fits, whole]).int().argmax(0, keepdim=True)

    def chosen(values: Tensor, otherwise: float) -> Tensor:
        values = torch.cat([values, torch.full_like(values[:1], otherwise)])
        return values.gather(0, first)[0]

    h, w = chosen(h, height), chosen(w, width)
    top = (chosen(top, 0.0) * (height - h + 1)).floor()
    left = (chosen(left, 0.0) * (width - w + 1)).floor()
    return torch.stack([top, left, h, w], 1).long()


def crop(images: Tensor, index: Tensor, boxes: Tensor, flip: Tensor, side: int) -> Tensor:
    """Cut boxes out of images, resize them to squares and flip some of them.

    images: (M, H, W, C) uint8. index: (B,) int64, the image of each box. boxes: (B, 4), see
    `draw_boxes`. flip: (B,) bool. side: height and width of the result, in pixels.

    Returns (B, C, side, side) uint8, channels-last. The interpolation is bilinear, without
    antialiasing: a crop has at most 8/7 of the pixels of the result on a side, so that aliasing is
    invisible. The values are those of torchvision's `resized_crop(antialias=False)`.
    """
    _, height, width, _ = images.shape
    picked = images[index].permute(0, 3, 1, 2).float()
    top, left, h, w = (value[:, None].float() for value in boxes.unbind(1))
    centres = (torch.arange(side, device=images.device) + 0.5) / side
    across = torch.where(flip[:, None], centres.flip(0), centres)
    # Clamped to the box: pixels beside it must not blend in.
    y = torch.minimum(torch.maximum(top + h * centres - 0.5, top), top + h - 1)
    x = torch.minimum(torch.maximum(left + w * across - 0.5, left), left + w - 1)
    grid = torch.stack(
        torch.broadcast_tensors(
            ((2 * x + 1) / width - 1)[:, None, :], ((2 * y + 1) / height - 1)[:, :, None]
        ),
        -1,
    )
    cut = F.grid_sample(picked, grid, mode="bilinear", align_corners=False)
    return cut.round().clamp(0, 255).to(torch.uint8).contiguous(memory_format=torch.channels_last)
