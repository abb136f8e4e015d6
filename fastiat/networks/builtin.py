"""The networks: pre-activation ResNet-18, wide ResNets and a network of linear layers."""

import itertools

from torch import Tensor, nn
from torch.nn import functional as F

from fastiat.engine import onednn
from fastiat.networks.normalise import StandardizeImage

ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU}


class Network(nn.Module):
    """Base class: normalise the pixels, then run `stem`, the groups and `head`.

    Subclasses set the last three attributes. `fastiat.models.build` may replace `normalise`.
    """

    mix_points = ("input", "groups.0", "groups.1")
    """Names of the mix points 0, 1 and 2, see `fastiat.mix.MixPoints`."""
    stem: nn.Module
    groups: nn.ModuleList
    head: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.normalise: nn.Module = StandardizeImage()

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, (B, num_classes), for pixels `x` in [0, 1], (B, C, H, W)."""
        x = self.stem(self.normalise(x))
        for group in self.groups:
            x = group(x)
        return self.head(x)


class Shortcut(nn.Conv2d):
    """A strided 1x1 convolution, on the CPU computed as slicing and a convolution of stride 1.

    With few input channels, oneDNN's weight gradient of a strided 1x1 convolution is defective, see
    `fastiat.engine.onednn`; the slicing avoids it in any training code, also outside fastiat.
    """

    def forward(self, x: Tensor) -> Tensor:
        # torch.fx traces with proxies, which have no known device.
        known = isinstance(x, Tensor)
        if known and x.device.type == "cpu" and self.in_channels < onednn.CHANNELS:
            rows, columns = self.stride
            # `clone` keeps the memory format of `x`; vmap supports no other memory format.
            return F.conv2d(x[..., ::rows, ::columns].clone(), self.weight, self.bias)
        return super().forward(x)


class PreActBlock(nn.Module):
    """Pre-activation residual block: BN, ReLU, 3x3, BN, ReLU, 3x3 (He et al. 2016b, fig. 1b).

    `activation` names another activation than ReLU, see `ACTIVATIONS`.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, activation: str = "relu") -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = Shortcut(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.activation(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        return shortcut + self.conv2(self.activation(self.bn2(out)))


def _group(
    inputs: int,
    outputs: int,
    blocks: int,
    stride: int,
    activation: str,
    block: type[PreActBlock] = PreActBlock,
) -> nn.Sequential:
    """Return `blocks` residual blocks; the first has `stride` and changes the channels."""
    sizes = [inputs] + [outputs] * (blocks - 1)
    strides = [stride] + [1] * (blocks - 1)
    return nn.Sequential(
        *(block(n, outputs, s, activation) for n, s in zip(sizes, strides, strict=True))
    )


class AuthorsWideBlock(PreActBlock):
    """The block in wide_resnet.py of the manifold mixup code; it differs from the published block.

    The convolutions have biases, the second convolution has the stride, and the input of the
    shortcut is the input of the block, before BatchNorm and ReLU.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, activation: str = "relu") -> None:
        super().__init__(inputs, outputs, stride, activation)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride, padding=1)
        if self.shortcut is not None:
            self.shortcut = Shortcut(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        out = self.conv1(self.activation(self.bn1(x)))
        return shortcut + self.conv2(self.activation(self.bn2(out)))


class PreActResNet18(Network):
    """Pre-activation ResNet-18 (He et al. 2016b): four groups of two blocks, final BatchNorm, ReLU.

    `final_norm=False` omits the final BatchNorm and ReLU, as the manifold mixup code does. Training
    with cross-entropy at learning rate 0.1 then diverges within 20 updates (RECORDS.md). The
    initialisation is PyTorch's default, as in the published codebases.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        width: int,
        final_norm: bool = True,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.groups = nn.ModuleList(
            [_group(width, width, 2, 1, activation)]
            + [_group(n * width, 2 * n * width, 2, 2, activation) for n in (1, 2, 4)]
        )
        self.head = nn.Sequential(
            *((nn.BatchNorm2d(8 * width), ACTIVATIONS[activation]()) if final_norm else ()),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8 * width, num_classes),
        )


class WideResNet(Network):
    """Wide residual network (Zagoruyko & Komodakis 2016), depth 6n + 4, dropout 0.

    Convolutions have the normal initialisation of He et al. (fan out), as in the original code.
    `authors=True` is the network of the manifold mixup code: `AuthorsWideBlock`, biases in every
    convolution, momentum 0.9 in the last BatchNorm, PyTorch's default initialisation.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int,
        in_channels: int,
        width: int,
        authors: bool = False,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        block = AuthorsWideBlock if authors else PreActBlock
        self.stem = nn.Conv2d(in_channels, 16, 3, padding=1, bias=authors)
        self.groups = nn.ModuleList(
            [_group(16, 16 * width, blocks, 1, activation, block)]
            + [_group(n * width, 2 * n * width, blocks, 2, activation, block) for n in (16, 32)]
        )
        self.head = nn.Sequential(
            nn.BatchNorm2d(64 * width, momentum=0.9 if authors else 0.1),
            ACTIVATIONS[activation](),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64 * width, num_classes),
        )
        if authors:
            return
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)


class MLP6(Network):
    """Six linear layers with ReLU between and no BatchNorm: the network of the paper's Figure 1.

    Mix points 1 and 2 are the outputs of the first and the second hidden layer, after their ReLU.
    """

    def __init__(self, num_classes: int, in_channels: int, image_size: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Flatten()
        sizes = [in_channels * image_size**2, *[width] * 5]
        self.groups = nn.ModuleList(
            nn.Sequential(nn.Linear(n, m), nn.ReLU()) for n, m in itertools.pairwise(sizes)
        )
        self.head = nn.Linear(width, num_classes)
