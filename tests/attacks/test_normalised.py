"""`normalise=(mean, std)`: the attack on the pixels of images that are normalised already."""

import pytest
import torch
import torchattacks
from torch import nn

from fastiat.attack import PGD, fgsm, input_gradient, pgd
from fastiat.engine import graphs
from fastiat.system.errors import InputError

EPS, ALPHA = 8 / 255, 2 / 255
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
NORMALISE = (MEAN, STD)
COLUMN_MEAN, COLUMN_STD = (torch.tensor(part).view(3, 1, 1) for part in NORMALISE)


class Wrapped(nn.Module):
    """The network of pixels whose attack is the truth."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, pixels):
        mean, std = (part.to(pixels.dtype) for part in (COLUMN_MEAN, COLUMN_STD))
        return self.net((pixels - mean) / std)


@pytest.fixture
def net():
    """Smooth, so that few values of the gradient vanish."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    return nn.Sequential(*layers).eval()


@pytest.fixture
def batch():
    torch.manual_seed(1)
    pixels = torch.rand(8, 3, 8, 8)
    return pixels, (pixels - COLUMN_MEAN) / COLUMN_STD, torch.arange(8) % 5


def assert_same(found, pixels_adv, net, pixels, y):
    """Equal to rounding, but for pixels where the sign of the gradient is a matter of rounding."""
    slope = input_gradient(Wrapped(net).double(), pixels.double(), y)
    net.float()
    sure = slope.abs() > 1e-4 * slope.abs().amax((1, 2, 3), keepdim=True)
    assert sure.float().mean() > 0.99
    expected = (pixels_adv - COLUMN_MEAN) / COLUMN_STD
    assert ((found - expected).abs() < 3e-6)[sure].all()


SETTINGS = [
    {"eps": EPS, "alpha": ALPHA, "steps": 3, "random_start": False},
    {"eps": EPS, "alpha": ALPHA, "steps": 3},
    {"eps": EPS, "alpha": ALPHA, "steps": 2, "restarts": 2, "start_size": EPS / 2},
    {"eps": 0.5, "alpha": 0.2, "steps": 3, "norm": "l2"},
    {"eps": EPS, "alpha": ALPHA, "steps": 2, "loss": "kl", "clip": (0.1, 0.9)},
    {"eps": EPS, "alpha": ALPHA, "steps": 2, "bn": "batch", "random_start": False},
    {"eps": 0.0},
]


@pytest.mark.parametrize(
    ("engine", "settings"),
    [
        *(("pgd", settings) for settings in SETTINGS),
        *((engine, SETTINGS[i]) for engine in ("eager", "compile") for i in (1, 4)),
    ],
)
def test_result_is_that_of_the_wrapped_network_on_pixels(settings, engine, net, batch, monkeypatch):
    monkeypatch.setattr(graphs, "BACKEND", "aot_eager")
    pixels, x, y = batch

    def attack(model, x, **more):
        more |= {"generator": torch.Generator().manual_seed(3), **settings}
        if engine == "pgd":
            return pgd(model, x, y, **more)
        return PGD(model, engine=engine, **more)(x, y)

    found = attack(net, x, normalise=NORMALISE)
    assert found.dtype == x.dtype and not found.requires_grad
    assert_same(found, attack(Wrapped(net), pixels), net, pixels, y)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_result_is_that_of_torchattacks(norm, net, batch):
    pixels, x, y = batch
    eps, alpha = (EPS, ALPHA) if norm == "linf" else (0.5, 0.2)
    peer = torchattacks.PGD if norm == "linf" else torchattacks.PGDL2
    attack = peer(net, eps=eps, alpha=alpha, steps=4, random_start=False)
    attack.set_normalization_used(mean=MEAN, std=STD)
    theirs = attack(x, y)
    settings = {"eps": eps, "alpha": alpha, "steps": 4, "random_start": False, "norm": norm}
    ours = pgd(net, x, y, normalise=NORMALISE, **settings)
    assert_same(ours, theirs * COLUMN_STD + COLUMN_MEAN, net, pixels, y)
    assert (ours - x).abs().max() > 0.05


def test_fgsm_and_targets(net, batch):
    pixels, x, y = batch
    target = (y + 1) % 5
    for chosen in (None, target):
        found = fgsm(net, x, y, eps=EPS, normalise=NORMALISE, target=chosen)
        expected = fgsm(Wrapped(net), pixels, y, eps=EPS, target=chosen)
        assert_same(found, expected, net, pixels, y if chosen is None else target)


def test_a_prepared_attack_follows_the_training_of_the_network(net, batch, monkeypatch):
    monkeypatch.setattr(graphs, "BACKEND", "aot_eager")
    pixels, x, y = batch
    settings = {"eps": EPS, "alpha": ALPHA, "steps": 2, "random_start": False}
    attack = PGD(net, engine="compile", normalise=NORMALISE, **settings)
    attack(x, y)
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(-weight.roll(1, 0))
    assert_same(attack(x, y), pgd(Wrapped(net), pixels, y, **settings), net, pixels, y)


@pytest.mark.parametrize("form", [torch.Size([3]), torch.Size([3, 1, 1]), torch.Size([1, 3, 1, 1])])
def test_tensors_of_every_usual_shape(form, net, batch):
    _, x, y = batch
    parts = tuple(torch.tensor(part).view(form) for part in NORMALISE)
    expected = fgsm(net, x, y, normalise=NORMALISE)
    assert torch.equal(fgsm(net, x, y, normalise=parts), expected)
    attack = PGD(net, engine="eager", steps=1, alpha=0.03, random_start=False, normalise=parts)
    assert torch.equal(attack(x, y), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_dtype_layout_and_gradient_mode(dtype, mode, net, batch):
    _, x, y = batch
    net.to(dtype)
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    with mode():
        found = pgd(net, x, y, eps=EPS, normalise=NORMALISE)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    moved = ((found - x).double() * COLUMN_STD.double()).abs().amax().item()
    assert moved == pytest.approx(EPS, rel=1e-6 if dtype == torch.float64 else 0.4)


def test_a_function_as_model(net, batch):
    pixels, x, y = batch
    net.train()
    found = fgsm(lambda images: net(images), x, y, eps=EPS, normalise=NORMALISE)
    assert net.training
    expected = fgsm(Wrapped(net.eval()), pixels, y, eps=EPS)
    assert_same(found, expected, net, pixels, y)


@pytest.mark.parametrize(
    ("normalise", "message"),
    [
        ((MEAN, STD[:2]), r"mean of shape \(3,\) and a std of shape \(2,\)"),
        ((torch.rand(3, 3), torch.rand(3, 3)), "mean of shape"),
        ((MEAN, (0.2, 0.0, 0.2)), "standard deviations above 0"),
        ((MEAN, (0.2, -0.1, 0.2)), "standard deviations above 0"),
        ((MEAN, (0.2, float("nan"), 0.2)), "finite"),
        (((0.5, float("inf"), 0.5), STD), "finite"),
        ((MEAN,), r"not \(mean, std\)"),
        (0.5, r"not \(mean, std\)"),
        (("imagenet", STD), r"not \(mean, std\)"),
    ],
)
def test_wrong_arguments_are_refused_by_name(normalise, message, net, batch):
    _, x, y = batch
    for attack in (pgd, fgsm):
        with pytest.raises(ValueError, match=message):
            attack(net, x, y, normalise=normalise)
    with pytest.raises(InputError, match=message):
        PGD(net, normalise=normalise)


def test_wrong_number_of_channels_is_refused(net, batch):
    _, x, y = batch
    for attack in (lambda **s: pgd(net, x, y, **s), lambda **s: PGD(net, **s)(x, y)):
        with pytest.raises(ValueError, match="normalise is for 1 channels, but x has shape"):
            attack(normalise=([0.5], [0.5]))
