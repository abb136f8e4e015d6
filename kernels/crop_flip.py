"""Random crop with zero padding and horizontal flip, gathered straight from a uint8 image set.

    out[b, :, r, c] = images[index[b], r + dy[b] - pad, c' + dx[b] - pad, :]   (0 outside)

with c' = W - 1 - c where flip[b], else c. The offsets are data, so a run repeats them exactly.
"""

import torch
from torch import Tensor


def crop_flip(
    images: Tensor, index: Tensor, dy: Tensor, dx: Tensor, flip: Tensor, pad: int
) -> Tensor:
    """Return the batch `index` of `images`, each shifted by its offsets and maybe mirrored.

    `images` is (N, H, W, C) uint8, `index` (B,) int64, `dy` and `dx` (B,) int64 in [0, 2 * pad]
    (`pad` is no shift), `flip` (B,) bool. The result is (B, C, H, W) uint8, channels-last. The
    crop is taken from the padded image first and then mirrored.
    """
    _, height, width, _ = images.shape
    device = images.device
    rows = torch.arange(height, device=device) + dy[:, None] - pad
    columns = torch.arange(width, device=device).expand(len(index), width)
    columns = torch.where(flip[:, None], width - 1 - columns, columns) + dx[:, None] - pad
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[
        :, None, :
    ]
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    batch = images[index[:, None, None], rows[:, :, None], columns[:, None, :]]
    return (batch * inside[..., None]).permute(0, 3, 1, 2)
