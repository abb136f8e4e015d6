"""Every network that fastiat cannot work with is refused in one line, and left as it was."""

import pytest
import torch
from torch import nn

from fastiat.mix import MixPoints
from fastiat.networks.check import check_batch_of_one, check_network
from fastiat.networks.normalise import Normalised
from fastiat.system.errors import InputError

SHAPE, CLASSES = (3, 8, 8), 5


class Net(nn.Module):
    """Calls `body` and then `tail` on its output."""

    def __init__(self, body: nn.Module, tail: nn.Module) -> None:
        super().__init__()
        self.body, self.tail = body, tail

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tail(self.body(x))


class Twice(nn.Module):
    """Calls one module twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.out = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(192, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.shared(self.shared(x)).flatten(1))


class Pair(nn.Module):
    """Returns a tuple."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x


class First(nn.Module):
    """Returns the first of two."""

    def forward(self, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return pair[0]


class InPlace(nn.Module):
    """Changes its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(2)


class NotANumber(nn.Module):
    """Returns NaN in place of the first value."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.index_fill(1, torch.tensor([0]), torch.nan)


class Cut(nn.Module):
    """Passes no gradient on."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach()


class NoBackward(torch.autograd.Function):
    """The identity, with a backward pass that fails."""

    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        raise ValueError("not\nwritten")


class Fails(nn.Module):
    """Fails in its backward pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return NoBackward.apply(x)


def network(*layers: nn.Module, classes: int = CLASSES) -> nn.Module:
    """Return a network of a convolution, the layers, and a linear layer."""
    conv = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    return Net(nn.Sequential(conv, *layers), nn.Sequential(nn.Flatten(), nn.Linear(256, classes)))


def test_a_network_is_accepted_and_left_as_it_was():
    model = network(nn.Dropout(0.5))
    model.body[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    check_network(model, SHAPE, CLASSES, ("input", "body.0", "body"))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("model", "points", "words"),
    [
        (lambda: nn.Flatten(), (), "no parameter that requires a gradient: nothing can be trained"),
        (lambda: network().requires_grad_(False), (), "no parameter that requires a gradient"),
        (lambda: network(classes=4), (), "returns torch.float32 of shape (2, 4) for 2 images of 5"),
        (lambda: nn.Sequential(network(), Pair()), (), "returns a tuple in training mode: make it"),
        (lambda: nn.Sequential(InPlace(), network()), (), "changes its input in place"),
        (lambda: nn.Sequential(network(), NotANumber()), (), "returns NaN for random pixels"),
        (lambda: network().half(), (), "is torch.float16: give a network in float32"),
        (lambda: network().double(), (), "is torch.float64: give a network in float32"),
        (lambda: nn.Sequential(nn.LazyConv2d(4, 3)), (), "call the network on a batch of images"),
        (lambda: network(nn.MaxPool2d(16)), (), "fails on 2 images of 3x8x8 (channels, height"),
        (lambda: nn.Sequential(Cut(), network()), (), "no gradient with respect to its pixels"),
        (lambda: nn.Sequential(network(), Cut()), (), "no gradient with respect to its pixels"),
        (lambda: network(Fails()), (), r"backward pass: ValueError: not\nwritten"),
        (lambda: network(), ("body.O",), "--mix-at body.O: the network has no module of this name"),
        (lambda: network(), ("layer1",), "choose input or a module such as body, tail, body.0"),
        (lambda: Twice(), ("shared",), "--mix-at shared: this module runs 2 times in a pass"),
        (lambda: network(Pair(), First()), ("body.1",), "returns a tuple, so its output cannot be"),
    ],
)
def test_a_network_that_cannot_be_used_is_refused_in_one_line(model, points, words):
    with pytest.raises(InputError) as raised:
        check_network(model(), SHAPE, CLASSES, points)
    assert words in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: network(classes=4), "the network Net returns torch.float32 of shape (2, 4)"),
        (lambda: network(nn.MaxPool2d(16)), "the network Net fails on 2 images of 3x8x8"),
        (lambda: Net(InPlace(), network()), "the network Net changes its input in place"),
        (lambda: network().double(), "the network's body.0.0.weight is torch.float64"),
        (lambda: network().requires_grad_(False), "the network Net has no parameter"),
        (lambda: network(Fails()), "the network Net fails in its backward pass"),
        (lambda: network(), "--mix-at no: the network has no module of this name: choose input"),
    ],
)
def test_a_message_names_the_network_of_the_user_not_what_fastiat_puts_it_into(make, words):
    with pytest.raises(InputError) as raised:
        points = ("input", "no") if words.startswith("--mix-at") else ()
        check_network(Normalised(make(), nn.Identity()), SHAPE, CLASSES, points)
    assert words in str(raised.value)


def test_modules_to_choose_from_exclude_those_that_cannot_be_mixed():
    with pytest.raises(InputError, match=r"choose input or a module such as out$"):
        check_network(Twice(), SHAPE, CLASSES, ("shared",))


def test_refused_mix_points_leave_no_hook():
    model = network()
    with pytest.raises(InputError, match="the network has no module nope"):
        MixPoints(model, ["input", "body.0", "nope"])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class OnItsDevice(nn.Module):
    """Adds a tensor that is no buffer, and reads a value, which the meta device cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.ones(4, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.shift if float(x.mean()) < 10 else x


def test_a_batch_of_one_image_is_tried_on_the_device_itself():
    model = network(OnItsDevice())
    random = torch.get_rng_state()
    check_batch_of_one(model, (1, *SHAPE), 1)
    assert (
        torch.equal(torch.get_rng_state(), random)
        and int(model.body[0][1].num_batches_tracked) == 0
    )
    small = nn.Sequential(nn.Conv2d(3, 4, 8), OnItsDevice(), nn.BatchNorm2d(4), nn.Flatten())
    with pytest.raises(InputError, match="--batch-size 2 is one image per process"):
        check_batch_of_one(small, (1, *SHAPE), 2)
