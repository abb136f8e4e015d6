"""The first layer of a network: its values, its gradient, and what `--normalise` accepts."""

import pytest
import torch
from torch import nn

from fastiat import kernels, models
from fastiat.networks.normalise import IMAGENET, Normalised, StandardizeImage, make_normalise
from fastiat.system.errors import InputError

X = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_imagenet_is_torchvisions_normalisation():
    from torchvision.transforms.v2.functional import normalize

    expected = normalize(X, list(IMAGENET[:3]), list(IMAGENET[3:]))
    layer = make_normalise(("imagenet",), 3).double()
    torch.testing.assert_close(layer(X), expected, rtol=1e-6, atol=1e-6)
    assert torch.autograd.gradcheck(layer, (X.clone().requires_grad_(),))


def test_numbers_are_means_and_then_standard_deviations():
    layer = make_normalise(("0.1", "0.2", "0.3", "0.5", "1", "2"), 3).double()
    for channel, (mean, std) in enumerate([(0.1, 0.5), (0.2, 1), (0.3, 2)]):
        torch.testing.assert_close(
            layer(X)[:, channel], (X[:, channel] - mean) / std, rtol=1e-6, atol=1e-6
        )


def test_image_standardises_and_none_changes_nothing():
    torch.testing.assert_close(make_normalise(("image",), 3)(X), kernels.standardize(X))
    assert make_normalise(("none",), 3)(X) is X


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("imagenett",), "choose image, imagenet, none, or give a mean"),
        (("0.5", "0.5"), "is for 1 channels, but the images have 3"),
        (("0",) * 6, "standard deviations above 0"),
        (("nan", "0", "0", "1", "1", "1"), "finite means"),
        (("image", "none"), "choose image"),
    ],
)
def test_other_words_are_refused(words, message):
    with pytest.raises(InputError, match=message):
        make_normalise(words, 3)


@pytest.mark.parametrize("words", [("imagenet",), ("none",), ("image",)])
def test_a_built_network_normalises_and_keeps_the_numbers_in_its_state(words):
    torch.manual_seed(0)
    model = models.build("preact18", 4, 3, 8, width=2, normalise=words).double().eval()
    plain = models.build("preact18", 4, 3, 8, width=2, normalise=("none",)).double().eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    first = make_normalise(words, 3).double()
    torch.testing.assert_close(model(X), plain(first(X)))
    assert ("normalise.mean" in model.state_dict()) == (words == ("imagenet",))


def test_a_network_of_the_user_is_put_behind_its_normalisation():
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).double()
    torch.testing.assert_close(
        Normalised(network, StandardizeImage())(X), network(kernels.standardize(X))
    )


def test_traced_programs_standardise_as_the_kernel_does():
    flat = torch.full((1, 3, 8, 8), 0.3, dtype=torch.float64)
    layer = StandardizeImage()
    for x in (X, flat, X.float(), X.bfloat16()):
        traced = torch.fx.symbolic_trace(layer)
        torch.testing.assert_close(traced(x), kernels.standardize(x), rtol=1e-4, atol=1e-4)
