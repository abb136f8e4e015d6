"""Random crop with zero padding and horizontal flip of a batch of a uint8 image set.

    out[b, :, r, c] = images[index[b], r + dy[b] - pad, c' + dx[b] - pad, :]   (0 outside)

with c' = W - 1 - c where flip[b], else c' = c. The op does not draw the offsets: they are
arguments, so that a run repeats them exactly and a captured CUDA graph reads new offsets at every
replay.
"""

# Kernel arguments are Triton values, for which there are no annotations.
# mypy: disable-error-code="no-untyped-def"

import torch
from torch import Tensor

from ._common import (
    blocks,
    check_device,
    check_vector,
    on_device_of,
    register,
    tl,
    triton,
)

# Values of one Triton program. A value is a byte here: 2048 values are 16 bytes for each of 128
# threads.
_BLOCK = 2048


def crop_flip_reference(
    images: Tensor, index: Tensor, dy: Tensor, dx: Tensor, flip: Tensor, pad: int
) -> Tensor:
    """The formula in PyTorch: the CPU implementation, and the reference of the tests."""
    if not images.is_contiguous():  # copy only the batch, not the whole set
        images, index = images[index].contiguous(), torch.arange(len(index), device=index.device)
    _, height, width, channels = images.shape
    rows = torch.arange(height, device=images.device) + (dy[:, None] - pad)
    columns = torch.arange(width, device=images.device)
    columns = torch.where(flip[:, None], width - 1 - columns, columns) + (dx[:, None] - pad)
    inside = ((rows >= 0) & (rows < height))[:, :, None]
    inside = inside & ((columns >= 0) & (columns < width))[:, None, :]
    # Each pixel is selected by its index in the flattened set: twice as fast as indexing three
    # dimensions.
    pixel = (index[:, None] * height + rows)[:, :, None] * width + columns[:, None, :]
    pixel = torch.where(inside, pixel, 0).view(-1)
    batch = images.view(-1, channels).index_select(0, pixel)
    batch = batch.view(len(index), height, width, channels).mul_(inside[..., None])
    return batch.permute(0, 3, 1, 2)


def _cpu(images: Tensor, index: Tensor, dy: Tensor, dx: Tensor, flip: Tensor, pad: int) -> Tensor:
    _check_range("index", index, len(images) - 1)
    _check_range("dy", dy, 2 * pad)
    _check_range("dx", dx, 2 * pad)
    if images[:1].numel() == 0:
        return _fake(images, index)
    return crop_flip_reference(images, index, dy, dx, flip, pad)


def _check_range(name: str, x: Tensor, last: int) -> None:
    low, high = x.aminmax() if x.numel() else (0, 0)
    if x.numel() and not 0 <= low <= high <= last:
        raise ValueError(f"{name} must be in [0, {last}], not {int(low)}..{int(high)}")


@triton.jit
def _crop_flip_kernel(
    images,
    index,
    dy,
    dx,
    flip,
    out,
    count,
    image_stride,
    row_stride,
    column_stride,
    channel_stride,
    pad,
    blocks_per_image,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    b = program // blocks_per_image
    # The offset in the image is int32, because divisions are several times slower in int64. The
    # addresses below are int64, because a set may have more than 2^31 bytes.
    offset = (program % blocks_per_image).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < HEIGHT * WIDTH * CHANNELS
    # Neighbouring lanes have neighbouring channels of (H, W, C) images, so reads and writes are
    # contiguous except at the ends of rows. The sizes are constants, so the compiler replaces the
    # divisions.
    channel = offset % CHANNELS
    column = offset // CHANNELS % WIDTH
    row = offset // (CHANNELS * WIDTH) + (tl.load(dy + b) - pad)
    mirrored = tl.load(flip + b) != 0
    column = tl.where(mirrored, WIDTH - 1 - column, column) + (tl.load(dx + b) - pad)
    i = tl.load(index + b)
    # A wrong index gives a black image instead of a read outside the set: `first` and `last` then
    # exclude every row.
    first = tl.where((i >= 0) & (i < count), 0, HEIGHT)
    last = tl.where((i >= 0) & (i < count), HEIGHT, 0)
    inside = mask & (row >= first) & (row < last) & (column >= 0) & (column < WIDTH)
    source = i * image_stride + row * row_stride + column * column_stride
    value = tl.load(images + source + channel * channel_stride, inside, other=0)
    tl.store(out + b * (HEIGHT * WIDTH * CHANNELS) + offset, value, mask)


def _crop_flip_triton(
    images: Tensor, index: Tensor, dy: Tensor, dx: Tensor, flip: Tensor, pad: int
) -> Tensor:
    count, height, width, channels = images.shape
    out = _fake(images, index)
    if out.numel():
        per_image = blocks(height * width * channels, _BLOCK)
        with on_device_of(images):
            _crop_flip_kernel[(len(index) * per_image,)](
                images, index.contiguous(), dy.contiguous(), dx.contiguous(), flip.contiguous(),
                out, count, *images.stride(), pad, per_image,
                HEIGHT=height, WIDTH=width, CHANNELS=channels, BLOCK=_BLOCK, enable_fp_fusion=False,
            )  # fmt: skip
    return out


def _fake(images: Tensor, index: Tensor, *rest: object) -> Tensor:
    _, height, width, channels = images.shape
    # The memory is (B, H, W, C), like the set; the permuted view is a channels-last batch.
    return images.new_empty((index.shape[0], height, width, channels)).permute(0, 3, 1, 2)


_op = register("crop_flip", _crop_flip_triton, cpu=_cpu, fake=_fake)


def crop_flip(
    images: Tensor, index: Tensor, dy: Tensor, dx: Tensor, flip: Tensor, pad: int
) -> Tensor:
    """Return the images of `index`, each cropped at its offsets, then mirrored if `flip` is True.

    images: (N, H, W, C) uint8.
    index: indices of the batch's images in the set, (B,) int64 in [0, N - 1].
    dy, dx: offsets of the crop in the image with `pad` rows and columns of zeros on every side,
        (B,) int64 in [0, 2 * pad]; the offset `pad` shifts nothing.
    flip: which images are mirrored, (B,) bool.
    pad: rows and columns of zeros on every side, 0 or more.

    All tensors are on one device; the result is (B, C, H, W) uint8, channels-last. Raises
    `ValueError` or `TypeError` for wrong arguments. The values of `index`, `dy` and `dx` are
    checked on the CPU only. On CUDA, reading them would synchronize with the GPU, so an index
    outside the set gives a black image, and an offset outside its range a larger shift.
    """
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        raise TypeError(f"images must be a uint8 tensor, not {getattr(images, 'dtype', images)}")
    check_device("images", images)
    if images.dim() != 4:
        raise ValueError(f"images must be (N, H, W, C), not {tuple(images.shape)}")
    if not isinstance(index, Tensor) or index.dim() != 1:
        raise ValueError("index must be a tensor of shape (B,)")
    batch = index.shape[0]
    check_vector("index", index, batch, torch.int64, "images", images)
    check_vector("dy", dy, batch, torch.int64, "images", images)
    check_vector("dx", dx, batch, torch.int64, "images", images)
    check_vector("flip", flip, batch, torch.bool, "images", images)
    if isinstance(pad, bool) or not isinstance(pad, int) or pad < 0:
        raise ValueError(f"pad must be a whole number, zero or more, not {pad!r}")
    return _op(images, index, dy, dx, flip, pad)
