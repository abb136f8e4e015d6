"""The caller's defaults of torch change nothing, and no function changes its arguments."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastiat
from fastiat import attack, cli, data, kernels, mix, models
from fastiat.train import algorithm1


@contextmanager
def dtype(name: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(name)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


# "meta" stands for any device that is not the CPU: what is put there by mistake has no values.
DEFAULTS = {
    "float64": lambda: dtype(torch.float64),
    "bfloat16": lambda: dtype(torch.bfloat16),
    "set_default_device": lambda: device("meta"),
    "with torch.device": lambda: torch.device("meta"),
}


@pytest.fixture(params=DEFAULTS)
def changed(request: pytest.FixtureRequest) -> Callable[[], object]:
    return DEFAULTS[request.param]


def test_load_gives_the_network_as_saved(changed, trained):
    expected = fastiat.load(trained)
    with changed():
        model = fastiat.load(trained)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]) and value.dtype == torch.float32


def test_data_and_draws_are_the_same(changed):
    def everything() -> list[Tensor]:
        digits = data.load("digits")
        out = [digits.train.images, digits.train.labels, digits.test.images]
        for per_sample in (False, True):
            generator = torch.Generator().manual_seed(1)
            one = mix.draw("manifold", 6, generator=generator, device="cpu", per_sample=per_sample)
            assert one is not None
            out += [one.perm, one.lam, torch.tensor(one.layer, device="cpu")]
        return out

    expected = everything()
    with changed():
        actual = everything()
    assert [x.dtype for x in actual] == [x.dtype for x in expected]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("name", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("arch", models.ARCHS)
def test_built_networks_are_fp32(arch, name):
    with dtype(name):
        model = models.build(arch, width=1, image_size=8)
        assert torch.get_default_dtype() == name
    assert {value.dtype for value in model.parameters()} == {torch.float32}


X, Y = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
PERM, LAM = torch.tensor([1, 2, 3, 0]), torch.tensor(0.3)


def calls(model: nn.Module) -> dict[str, tuple[Callable[..., object], tuple]]:
    """Every public function of tensors, with arguments."""
    grad, logits, one = torch.cos(7 * X), X[:, :, 0].flatten(1), mix.Mix(0, PERM, LAM)
    images = (255 * X).to(torch.uint8).permute(0, 2, 3, 1)
    start, flip, half = torch.zeros_like(Y), Y > 1, logits.bfloat16()
    seed = torch.full((), 3, device="cpu", dtype=torch.int64)

    def mixed_forward(x: Tensor, one: mix.Mix) -> Tensor:
        points = mix.MixPoints(model)
        try:
            with points.applied(one):
                return model(x)
        finally:
            points.remove()

    def with_generator(function: Callable[..., Tensor], **more: object) -> Callable[..., Tensor]:
        return lambda *args: function(
            *args, generator=torch.Generator().manual_seed(0), eps=0.1, **more
        )

    return {
        "pgd_step": (kernels.pgd_step, (X, grad, X, 0.1, 0.02)),
        "pgd_step_l2": (kernels.pgd_step_l2, (X, grad, X, 0.5, 0.2)),
        "random_start": (kernels.random_start, (X, 0.1, seed)),
        "crop_flip": (kernels.crop_flip, (images, Y, start, start, flip, 1)),
        "mix": (kernels.mix, (X, PERM, LAM)),
        "mix by a number": (kernels.mix, (X, PERM, 0.3)),
        "standardize": (kernels.standardize, (X,)),
        "standardize uint8": (kernels.standardize, ((255 * X).to(torch.uint8),)),
        "mixed_cross_entropy": (kernels.mixed_cross_entropy, (logits, Y, PERM, LAM)),
        "ce": (mix.mixed_loss, (logits, Y, None)),
        "mixed ce": (mix.mixed_loss, (logits, Y, one)),
        "half ce": (mix.mixed_loss, (half, Y, one)),
        "bce": (mix.mixed_loss, (logits, Y, one, "bce")),
        "half bce": (mix.mixed_loss, (half, Y, one, "bce")),
        "mixed_correct": (mix.mixed_correct, (logits, Y, one)),
        "to_pixels": (models.to_pixels, (255 * X,)),
        "to_pixels uint8": (models.to_pixels, ((255 * X).to(torch.uint8),)),
        "forward": (model, (X,)),
        "mixed forward": (mixed_forward, (X, one)),
        "fgsm": (lambda x, y: attack.fgsm(model, x, y), (X, Y)),
        "pgd": (with_generator(lambda *a, **k: attack.pgd(model, *a, **k)), (X, Y)),
        "pgd without a start": (lambda x, y: attack.pgd(model, x, y, random_start=False), (X, Y)),
        "pgd without a ball": (lambda x, y: attack.pgd(model, x, y, eps=0), (X, Y)),
        "pgd l2": (
            with_generator(lambda *a, **k: attack.pgd(model, *a, **k), norm="l2", loss="margin"),
            (X, Y),
        ),
        "PGD": (
            with_generator(lambda *a, **k: attack.PGD(model, engine="eager", **k)(*a), restarts=2),
            (X, Y),
        ),
        "attack_loss": (attack.attack_loss, (logits, Y, "margin")),
        "attack_loss of halves": (attack.attack_loss, (half, Y, "ce")),
        "input_gradient": (lambda x, y: attack.input_gradient(model, x, y, "ce"), (X, Y)),
        "count_errors": (
            lambda x, y: torch.full(
                (), attack.count_errors(model, [(x, y)]), device="cpu", dtype=torch.int64
            ),
            (255 * X, Y),
        ),
    }


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return models.build("preact18", width=2, image_size=8).eval()


NAMES = list(calls(nn.Identity()))


@pytest.mark.parametrize("name", NAMES)
def test_functions_of_tensors_give_the_same(changed, name, network):
    function, arguments = calls(network)[name]
    expected = function(*arguments)
    with changed():
        actual = function(*arguments)
    assert actual.dtype == expected.dtype and actual.device == expected.device
    assert torch.equal(actual, expected)


def tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value):
        return [x for field in fields(value) for x in tensors(getattr(value, field.name))]
    return []


@pytest.mark.parametrize("name", NAMES)
def test_functions_change_no_argument_and_return_none_of_their_memory(name, network):
    function, arguments = calls(network)[name]
    given = [tensor for value in arguments for tensor in tensors(value)]
    before = [tensor.clone() for tensor in given]
    out = function(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    assert isinstance(out, Tensor)
    out.detach().zero_()
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def test_an_update_leaves_its_batch_alone(network):
    x, y = X.clone(), Y.clone()
    one = mix.Mix(1, PERM.clone(), LAM.clone())
    points = mix.MixPoints(network)
    algorithm1(network, x, y, lambda x, y: attack.fgsm(network, x, y), lambda: one, points)
    points.remove()
    network.zero_grad()
    assert torch.equal(x, X) and torch.equal(y, Y)
    assert torch.equal(one.perm, PERM) and torch.equal(one.lam, LAM)


def test_training_and_evaluation_are_the_same(changed, trained, small, tmp_path: Path):
    with changed():
        assert cli.main(["train", *small, "--out", str(tmp_path / "run")]) == 0
        assert cli.main(["evaluate", str(tmp_path / "run"), "--attacks", "none"]) == 0
    actual, expected = fastiat.load(tmp_path / "run"), fastiat.load(trained)
    for name, value in expected.state_dict().items():
        assert torch.equal(actual.state_dict()[name], value)
