import numpy as np
import pytest
import torch
from kernel_cases import INTERPRETED, reference_only
from torch.nn import functional as F

from fastiat.kernels import crop_flip


def plain(images, index, dy, dx, flip, pad):
    """Pad, cut out and mirror, image by image."""
    out = []
    for i, y, x, f in zip(index, dy, dx, flip, strict=True):
        image = F.pad(images[i].permute(2, 0, 1), (pad,) * 4)
        height, width = images.shape[1:3]
        image = image[:, y : y + height, x : x + width]
        out.append(image.flip(2) if f else image)
    return torch.stack(out)


def make(shape=(9, 5, 7, 3), batch=6, pad=2, device="cpu"):
    torch.manual_seed(0)
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    dy, dx = torch.randint(2 * pad + 1, (2, batch))
    dy[0], dx[0] = 0, 2 * pad
    flip = torch.arange(batch) % 2 == 0
    tensors = (images, torch.randint(shape[0], (batch,)), dy, dx, flip)
    return (*(t.to(device) for t in tensors), pad)


# CIFAR; one channel; four; one value over a block of 2048; padding wider than the image.
@pytest.mark.parametrize(
    ("shape", "pad"),
    [
        ((9, 32, 32, 3), 4),
        ((9, 5, 7, 1), 2),
        ((9, 6, 6, 4), 0),
        ((2, 683, 1, 3), 1),
        ((1, 1, 1, 1), 1),
        ((3, 2, 3, 3), 4),
    ],
)
def test_every_pixel_is_that_of_pad_crop_flip(shape, pad, device):
    args = make(shape, 4, pad, device)
    out = crop_flip(*args)
    assert torch.equal(out.cpu(), plain(*(t.cpu() for t in args[:-1]), pad))
    assert out.dtype == torch.uint8
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_strided_image_sets(layout, device):
    images, *rest = make(device=device)
    images = {
        "transposed": images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        "sliced": images.repeat(2, 1, 2, 1)[::2, :, ::2],
        "expanded": images[:1].expand_as(images),
    }[layout]
    expected = plain(images.cpu(), *(t.cpu() for t in rest[:-1]), rest[-1])
    assert torch.equal(crop_flip(images, *rest).cpu(), expected)


def test_an_image_set_of_more_than_two_to_the_31_bytes(device):
    count = 2**31 // (32 * 32 * 3) + 5
    images = torch.from_numpy(np.zeros((count, 32, 32, 3), np.uint8))  # pages untouched stay free
    images[-2:] = torch.randint(1, 256, (2, 32, 32, 3), dtype=torch.uint8)
    index = torch.tensor([count - 1, count - 2])
    args = (images, index, torch.tensor([2, 0]), torch.tensor([2, 3]), torch.tensor([False, True]))
    out = crop_flip(*(t.to(device) for t in args), 2)
    assert torch.equal(out.cpu(), plain(*args, 2))


def test_empty_batch(device):
    images, *rest = make(device=device)
    assert crop_flip(images, *(t[:0] for t in rest[:-1]), 2).shape == (0, 3, 5, 7)


@pytest.mark.parametrize(
    ("position", "value", "kind", "message"),
    [
        (0, torch.zeros(9, 5, 7, 3), TypeError, "images must be a uint8"),
        (0, torch.zeros(5, 7, 3, dtype=torch.uint8), ValueError, "images must be"),
        (1, torch.zeros(6), TypeError, "index must be torch.int64"),
        (1, [0] * 6, ValueError, "index must be"),
        (2, torch.zeros(5, dtype=torch.int64), ValueError, "dy must have shape"),
        (3, torch.zeros(6, dtype=torch.int32), TypeError, "dx must be torch.int64"),
        (3, torch.zeros(6, dtype=torch.int64, device="meta"), ValueError, "dx is on meta"),
        (4, torch.zeros(6, dtype=torch.int64), TypeError, "flip must be torch.bool"),
        (5, -1, ValueError, "pad must be"),
        (5, 1.5, ValueError, "pad must be"),
    ],
)
def test_wrong_arguments_are_named(position, value, kind, message):
    args = list(make())
    args[position] = value
    with pytest.raises(kind, match=message):
        crop_flip(*args)


@reference_only
@pytest.mark.parametrize(("position", "value"), [(1, 9), (1, -1), (2, 5), (2, -1), (3, 5)])
def test_values_out_of_range_are_refused_on_the_cpu(position, value):
    args = list(make())
    args[position][2] = value
    with pytest.raises(ValueError, match="must be in"):
        crop_flip(*args)


@pytest.mark.kernel_only
def test_index_outside_the_set_gives_a_black_image_in_the_kernel():
    args = list(make(device="cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"))
    args[0] = args[0] | 1
    args[1][:2] = torch.tensor([9, -1])
    black = (crop_flip(*args) == 0).flatten(1).all(1)
    assert black.tolist() == [True, True, False, False, False, False]


@reference_only
def test_opcheck(device):
    torch.library.opcheck(torch.ops.fastiat.crop_flip.default, make(device=device))


@reference_only
def test_compiles_without_a_graph_break(device):
    def load(*args):
        return crop_flip(*args).float() / 255

    args = make(device=device)
    assert torch.equal(torch.compile(load, fullgraph=True, backend="aot_eager")(*args), load(*args))
