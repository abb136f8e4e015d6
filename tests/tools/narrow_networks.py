"""Short trainings of every narrow network: `test_onednn.py` runs this under malloc's own checks.

Prints one line for each training, and ends with a status other than 0 where a gradient is wrong.
"""

import copy
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from fastiat import data, models
from fastiat.config import TrainConfig
from fastiat.engine import graphs
from fastiat.train import Trainer

NETWORKS = [
    *(("preact18", width, size) for width in range(1, 9) for size in (8, 13)),
    *(("preact18", width, 32) for width in (1, 3, 7)),
    # The code for AVX-512 needs 48 pixels to leave its workspace.
    *(("preact18", width, 64) for width in (2, 4)),
    *(("wrn28_10", 1, 8), ("wrn34_10", 1, 9), ("mlp6", 8, 8), ("mlp6", 8, 13)),
]


class Foreign(nn.Module):
    """A network that is not ours, of layers whose weight gradient oneDNN gets wrong."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, channels, 1, 2)
        self.wide = nn.Conv2d(channels, 2 * channels, 1, (1, 2))
        self.weight = nn.Parameter(torch.randn(24, 2 * channels, 1, 1) / 8)
        self.up = nn.ConvTranspose2d(24, channels, 1, 2, output_padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.conv2d(F.relu(self.wide(F.relu(self.down(x)))), self.weight, stride=(2, 1))
        return self.up(F.relu(x)).mean((2, 3))


def train(arch: str, width: int, size: int) -> None:
    """Make three updates of Algorithm 1 on noise."""
    generator = torch.Generator().manual_seed(size)
    images = torch.randint(0, 256, (48, size, size, 3), dtype=torch.uint8, generator=generator)
    split = data.Split(images, torch.arange(48) % 4)
    dataset = data.Dataset("noise", ("a", "b", "c", "d"), split, split, flip=True)
    config = TrainConfig(
        dataset="folder", arch=arch, width=width, batch_size=16, holdout=0, steps=1, pad=1,
        device="cpu", engine="eager", precision="fp32", loader="resident",
    )  # fmt: skip
    trainer = Trainer(config, dataset)
    assert sum(1 for _ in trainer.epoch_updates()) == 3
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Return the gradients of a sum of squares in the parameters."""
    return list(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))


class Comparison:
    """A network whose gradients are to be those of float64, which oneDNN has no part in.

    Made before anything replaces a kernel of PyTorch's. `plain` computes the same by its layers.
    """

    def __init__(self, model: nn.Module, plain: nn.Module, x: torch.Tensor) -> None:
        self.x = x.to(memory_format=torch.channels_last)
        self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.expected = gradients(copy.deepcopy(plain).double(), x.double())

    def check(self) -> None:
        """Raise unless 20 gradients in a row are right."""
        bound = 0.03 if self.x.dtype == torch.bfloat16 else 1e-4
        for found in [gradients(self.model, self.x) for _ in range(20)]:
            for one, other in zip(found, self.expected, strict=True):
                error = (one.double() - other).abs().max() / other.abs().max()
                assert error < bound, f"gradient off by {error:.1e} of its size"
        print("compared", tuple(self.x.shape), flush=True)


def shortcut(channels: int, size: int) -> Comparison:
    """Return the comparison of a shortcut with the layer it stands for."""
    plain = nn.Conv2d(channels, 8, 1, 2, bias=False)
    ours = models.Shortcut(channels, 8, 1, 2, bias=False)
    ours.load_state_dict(plain.state_dict())
    return Comparison(ours, plain, torch.rand(8, channels, size, size))


def foreign(model: nn.Module, x: torch.Tensor) -> Comparison:
    """Return the comparison of a network that is not ours with itself."""
    return Comparison(model, model, x)


if __name__ == "__main__":
    # A check that is not loaded finds nothing.
    assert "libc_malloc_debug" in Path("/proc/self/maps").read_text()
    torch.manual_seed(0)
    narrow = [shortcut(*shape) for shape in ((2, 8), (4, 16), (7, 32), (12, 64))]
    users = [
        foreign(Foreign(channels), torch.rand(4, 3, size, size))
        for channels, size in ((2, 8), (4, 16), (7, 32), (6, 128))
    ]
    users.append(foreign(nn.Conv2d(4, 8, 1, 2).bfloat16(), torch.rand(4, 4, 96, 96).bfloat16()))
    # A network of ours in a loop that is not ours: before anything is set up for a training.
    for comparison in narrow:
        comparison.check()
    graphs.prepare(torch.device("cpu"), deterministic=False)
    for comparison in users:
        comparison.check()
    for arch, width, size in NETWORKS:
        train(arch, width, size)
        print("trained", arch, width, size, flush=True)
