"""Networks against constructions written independently of `fastiat.models`."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastiat import kernels, models
from fastiat.mix import Mix, MixPoints
from fastiat.system.errors import InputError


@pytest.mark.parametrize(
    ("name", "millions"),
    [("preact18", 11.17), ("wrn28_10", 36.48), ("wrn34_10", 46.16), ("mlp6", 2.63)],
)
def test_parameter_count_is_the_published_one(name, millions):
    with torch.device("meta"):
        model = models.build(name)
    assert round(models.count_parameters(model) / 1e6, 2) == millions


def test_preact18_has_the_parameters_of_robust_overfittings_network():
    # locuslab/robust_overfitting's PreActResNet18, counted; its final BatchNorm has 2 * 512.
    counts = {"standard": 11_172_170, "authors": 11_172_170 - 2 * 512}
    for variant, expected in counts.items():
        with torch.device("meta"):
            model = models.build("preact18", variant=variant)
        assert models.count_parameters(model) == expected


ACTIVATIONS = {"relu": lambda x: x.clamp_min(0), "silu": lambda x: x / (1 + (-x).exp())}


def _norm_act(x, p, name, act):
    """BatchNorm by the batch's own statistics, then the activation."""
    mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    x = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
    weight, bias = p[f"{name}.weight"], p[f"{name}.bias"]
    return act(x * weight[:, None, None] + bias[:, None, None])


def _block(x, p, prefix, stride, act):
    """A pre-activation block from its weights, in functional form (He et al. 2016b)."""
    out = _norm_act(x, p, f"{prefix}.bn1", act)
    down = p.get(f"{prefix}.shortcut.weight")
    shortcut = x if down is None else F.conv2d(out, down, stride=stride)
    out = F.conv2d(out, p[f"{prefix}.conv1.weight"], stride=stride, padding=1)
    out = _norm_act(out, p, f"{prefix}.bn2", act)
    return shortcut + F.conv2d(out, p[f"{prefix}.conv2.weight"], padding=1)


def _authors_block(x, p, prefix, stride, act):
    """The manifold mixup code's wide_basic: biases, the stride last, the shortcut of the input."""

    def conv(x, name, **options):
        return F.conv2d(x, p[f"{prefix}.{name}.weight"], p[f"{prefix}.{name}.bias"], **options)

    down = f"{prefix}.shortcut.weight" in p
    shortcut = conv(x, "shortcut", stride=stride) if down else x
    out = conv(_norm_act(x, p, f"{prefix}.bn1", act), "conv1", padding=1)
    return shortcut + conv(
        _norm_act(out, p, f"{prefix}.bn2", act), "conv2", stride=stride, padding=1
    )


def _standardised(x):
    flat = x.flatten(1)
    floor = 1 / (255 * math.sqrt(flat.shape[1]))
    centred = flat - flat.mean(1, keepdim=True)
    deviation = flat.std(1, unbiased=False, keepdim=True).clamp_min(floor)
    return (centred / deviation).view_as(x)


def _randomise(model):
    """Give every parameter a value of its own, so that a swapped BatchNorm weight shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double().train()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("variant", models.VARIANTS)
@pytest.mark.parametrize("size", [8, 11, 32])
def test_preact18_computes_what_its_weights_say(size, variant, activation):
    torch.manual_seed(0)
    options = {"variant": variant, "activation": activation}
    model, act = (
        _randomise(models.build("preact18", 7, 2, size, 4, **options)),
        ACTIVATIONS[activation],
    )
    p = dict(model.named_parameters())
    x = torch.rand(3, 2, size, size, dtype=torch.float64)
    out = F.conv2d(_standardised(x), p["stem.weight"], padding=1)
    for group, stride in enumerate((1, 2, 2, 2)):
        out = _block(out, p, f"groups.{group}.0", stride, act)
        out = _block(out, p, f"groups.{group}.1", 1, act)
    last = "head.2"
    if variant == "standard":
        out, last = _norm_act(out, p, "head.0", act), "head.4"
    expected = out.mean((2, 3)) @ p[f"{last}.weight"].T + p[f"{last}.bias"]
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("variant", models.VARIANTS)
def test_wide_resnet_computes_what_its_weights_say(variant, activation):
    torch.manual_seed(0)
    options = {"variant": variant, "activation": activation}
    model, act = (
        _randomise(models.build("wrn28_10", 5, 3, 8, 1, **options)),
        ACTIVATIONS[activation],
    )
    p = dict(model.named_parameters())
    block_of = _authors_block if variant == "authors" else _block
    x = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    out = F.conv2d(_standardised(x), p["stem.weight"], p.get("stem.bias"), padding=1)
    for group, stride in enumerate((1, 2, 2)):
        for block in range(4):
            out = block_of(out, p, f"groups.{group}.{block}", stride if block == 0 else 1, act)
    out = _norm_act(out, p, "head.0", act)
    expected = out.mean((2, 3)) @ p["head.4.weight"].T + p["head.4.bias"]
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


def test_authors_wide_resnet_moves_its_last_running_statistics_by_nine_tenths():
    torch.manual_seed(0)
    model = models.build("wrn28_10", 5, 3, 8, width=1, variant="authors").train()
    seen = []
    model.head[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(torch.rand(4, 3, 8, 8))
    torch.testing.assert_close(model.head[0].running_mean, 0.9 * seen[0].mean((0, 2, 3)))


def test_mlp6_is_six_matrices_with_relu_between():
    torch.manual_seed(0)
    model = models.build("mlp6", 10, 1, 28).double()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    biases = [p for p in model.parameters() if p.dim() == 1]
    assert [tuple(m.shape) for m in matrices] == [(512, 784), *[(512, 512)] * 4, (10, 512)]
    x = torch.rand(3, 1, 28, 28, dtype=torch.float64)
    out = _standardised(x).flatten(1)
    for matrix, bias in zip(matrices[:-1], biases[:-1], strict=True):
        out = (out @ matrix.T + bias).clamp_min(0)
    expected = out @ matrices[-1].T + biases[-1]
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


def test_wide_resnet_starts_from_he_normal_fan_out():
    torch.manual_seed(0)
    model = models.build("wrn28_10", width=2)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 4000:
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            deviation = module.weight.std().item()
            assert deviation == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)


def test_preact18_starts_from_the_default_of_torch():
    torch.manual_seed(3)
    model = models.build("preact18", width=8)
    torch.manual_seed(3)
    # The first module constructed is the stem; its draw is torch's own.
    assert torch.equal(model.stem.weight, nn.Conv2d(3, 8, 3, padding=1, bias=False).weight)
    bound = 1 / math.sqrt(8 * 9)
    weight = model.groups[0][0].conv1.weight
    assert 0.97 * bound < weight.abs().max() <= bound


def test_standardisation_is_the_formula_in_float64():
    x = (
        torch.rand(5, 3, 9, 9, dtype=torch.float64)
        * torch.tensor([1, 0.1, 1e-3, 1e-4, 1])[:, None, None, None].double()
    )
    values = x.numpy()
    flat = values.reshape(5, -1)
    floor = 1 / (255 * np.sqrt(flat.shape[1]))
    expected = (flat - flat.mean(1, keepdims=True)) / np.maximum(flat.std(1, keepdims=True), floor)
    np.testing.assert_allclose(kernels.standardize(x).numpy().reshape(5, -1), expected, atol=1e-9)


def test_standardisation_is_differentiable_and_finite_on_a_constant_image():
    x = torch.full((2, 1, 8, 8), 0.3, dtype=torch.float64)
    x[1] = torch.rand(1, 8, 8, dtype=torch.float64)
    x.requires_grad_()
    assert torch.autograd.gradcheck(kernels.standardize, (x,))
    out = kernels.standardize(x)
    (grad,) = torch.autograd.grad((out * torch.randn_like(out)).sum(), x)
    assert out.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("name", ["preact18", "wrn28_10", "mlp6"])
def test_mix_point_interpolates_right_there(name, layer):
    torch.manual_seed(0)
    model = models.build(name, 4, 1, 8, width=2 if name != "mlp6" else 16).double().eval()
    x = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    mix = Mix(layer, torch.tensor([2, 0, 1]), torch.tensor(0.3))
    stages = [_standardised, model.stem, *model.groups, model.head]
    cut = {0: 1, 1: 3, 2: 4}[layer]
    out = x
    for stage in stages[:cut]:
        out = stage(out)
    lam = torch.tensor(0.3).double()
    out = lam * out + (1 - lam) * out[mix.perm]
    for stage in stages[cut:]:
        out = stage(out)
    with MixPoints(model).applied(mix):
        torch.testing.assert_close(model(x), out, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(model(x), out)


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_that_is_no_mix_point_is_refused_not_left_unmixed(layer):
    model = models.build("mlp6", 3, 1, 8, width=4)
    mix = Mix(layer, torch.tensor([1, 0]), torch.tensor(0.5))
    with (
        pytest.raises(InputError, match=f"mix layer is {layer}"),
        MixPoints(model).applied(mix),
    ):
        pytest.fail("the pass would not be mixed")


@pytest.mark.parametrize("name", models.ARCHS)
@pytest.mark.parametrize(("channels", "size", "classes"), [(1, 8, 2), (3, 17, 5), (4, 12, 100)])
def test_any_channels_size_and_classes_give_finite_logits(name, channels, size, classes):
    width = 8 if name == "mlp6" else 1
    model = models.build(name, classes, channels, size, width).eval()
    logits = model(torch.rand(2, channels, size, size))
    assert logits.shape == (2, classes) and logits.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"name": "preact81"}, "preact18"),
        ({"name": "mlp6", "image_size": 7}, "image_size"),
        ({"name": "mlp6", "width": 0}, "width"),
        ({"name": "preact18", "num_classes": 1}, "num_classes"),
        ({"name": "preact18", "in_channels": 0}, "in_channels"),
    ],
)
def test_build_refuses_by_name(arguments, named):
    with pytest.raises(InputError, match=named):
        models.build(**arguments)
