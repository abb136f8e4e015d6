"""Unusual networks: traced, frozen, tied, random, with masks, with parameters of any shape."""

import signal

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import fastiat
from fastiat.engine import graphs
from fastiat.models import ModelCard
from fastiat.networks.check import check_network
from fastiat.runs.directory import load_initial
from fastiat.runs.robustbench import definition
from fastiat.runs.weights import pack_model, read_model
from fastiat.system.errors import InputError
from fastiat.system.signals import TrainingInterrupt
from fastiat.train import Trainer

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randint(256, (40, 8, 8, 3), dtype=torch.uint8, generator=GENERATOR)
LABELS = torch.arange(40) % 4
TRAIN, TEST = (IMAGES, LABELS), (IMAGES[:20], LABELS[:20])
FEW = {"steps": 2, "batch_size": 10, "lr": 0.01, "device": "cpu", "precision": "fp32"}


class Net(nn.Module):
    """Two convolutions and a linear layer on the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer2(self.layer1(x)).mean((2, 3)))


def _net(change=lambda model: None, kind: type[nn.Module] = Net) -> nn.Module:
    torch.manual_seed(0)
    model = kind()
    change(model)
    return model


def _fit(model, tmp_path, name="run", **settings):
    return fastiat.fit(model, TRAIN, TEST, out=tmp_path / name, **{"epochs": 1, **FEW, **settings})


def test_a_traced_network_has_the_errors_of_the_network_itself(tmp_path):
    model = _fit(_net(), tmp_path, epochs=4, lr=0.1).model
    attacks = ["fgsm", "pgd-3", "pgd-3-targeted"]
    expected = fastiat.evaluate_model(model, TEST, attacks, restarts=2)
    traced = fastiat.evaluate_model(torch.fx.symbolic_trace(model), TEST, attacks, restarts=2)
    assert traced.errors == expected.errors and 0 < expected.clean_error < 100
    run = _fit(torch.fx.symbolic_trace(_net()), tmp_path, "traced", mix="none")
    assert run.clean_error == pytest.approx(run.history[-1]["test_error_percent"])


def _freeze(model: nn.Module) -> None:
    model.layer1.requires_grad_(False)


def _unused(model: nn.Module) -> None:
    model.extra = nn.Linear(3, 3)


def _tied(model: nn.Module) -> None:
    model.layer3 = nn.Linear(8, 8)
    model.head = nn.Sequential(model.layer3, nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 4))
    model.head[2].weight = model.layer3.weight


def _mask(model: nn.Module) -> None:
    model.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))


def _five(model: nn.Module) -> None:
    model.scale = nn.Parameter(torch.ones(1, 1, 1, 1, 1))


def _script(model: nn.Module) -> None:
    with pytest.warns(FutureWarning):
        model.layer2[1] = torch.jit.script(nn.ReLU())


def _named(model: nn.Module) -> None:
    model.mix_points = 3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("change", "held"), [(_freeze, "layer1"), (_unused, "extra"), (_tied, "none")]
)
def test_the_step_in_fixed_buffers_trains_the_parameters_that_eager_trains(
    change, held, precision, tmp_path, monkeypatch
):
    monkeypatch.setattr(graphs, "compile_once", lambda function: function)
    monkeypatch.setattr(graphs, "has_compiler", lambda device: True)
    options = {"precision": precision, "weight_decay": 0.1}
    eager = _fit(_net(change), tmp_path, "eager", engine="eager", **options).model
    step = _fit(_net(change), tmp_path, "step", engine="compile", **options).model
    before = _net(change).state_dict()
    for name, value in step.state_dict().items():
        tolerance = 1e-6 if precision == "fp32" else 2e-3
        assert torch.allclose(value, eager.state_dict()[name], atol=tolerance), name
        if name in dict(_net().named_parameters()) or name.startswith("extra"):
            assert torch.equal(value, before[name]) == name.startswith(held), name


@pytest.mark.parametrize("change", [_freeze, _unused, _tied, _mask, _five, _script, _named])
def test_an_unusual_network_trains_loads_and_resumes(change, tmp_path):
    run = _fit(_net(change), tmp_path, mix="none", ema=0.9)
    again = fastiat.load(run.path, model=_net(change))
    for name, value in run.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    resumed = _fit(_net(change), tmp_path, mix="none", ema=0.9, resume=True)
    assert resumed.errors == run.errors


def test_the_average_of_a_tied_weight_takes_it_once(tmp_path):
    weights = []
    original = Trainer.update

    def update(self, *batch):
        found = original(self, *batch)
        weights.append(self.model.layer3.weight.double().clone())
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "update", update)
        run = _fit(_net(_tied), tmp_path, mix="none", ema=0.9)
    average = _net(_tied).layer3.weight.double()
    for step, weight in enumerate(weights, 1):
        decay = min(0.9, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
    assert torch.allclose(run.model.layer3.weight.double(), average, atol=1e-6)


class Random(Net):
    """Drops half of the features."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.layer2(self.layer1(x)).mean((2, 3))
        return self.head(F.dropout(features, 0.5, self.training))


def test_dropout_is_fixed_by_the_seed_and_goes_on_after_a_resume(tmp_path, monkeypatch):
    whole = _fit(_net(kind=Random), tmp_path, "whole", mix="none").model.state_dict()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    model = Random()
    model.load_state_dict(_net(kind=Random).state_dict())
    torch.set_rng_state(state)
    other = _fit(model, tmp_path, "other", mix="none").model.state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    original = Trainer.update

    def update(self, *batch):
        found = original(self, *batch)
        if self.step == 2:
            signal.raise_signal(signal.SIGINT)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", update)
        with pytest.raises(TrainingInterrupt):
            _fit(_net(kind=Random), tmp_path, "cut", mix="none")
    resumed = _fit(_net(kind=Random), tmp_path, "cut", mix="none", resume=True).model.state_dict()
    for name, value in whole.items():
        assert torch.equal(other[name], value) and torch.equal(resumed[name], value), name
    eight = _fit(_net(kind=Random), tmp_path, "eight", mix="none", seed=8).model.state_dict()
    assert not torch.equal(eight["head.weight"], whole["head.weight"])


def test_initial_weights_leave_the_normalisation_as_it_was_chosen(tmp_path):
    first = _fit(_net(), tmp_path, "a", mix="none", normalise="imagenet")
    mean = ("0.1",) * 3 + ("0.9",) * 3
    for init, name in ((first.path, "b"), (first.path / "model.safetensors", "c")):
        found = _fit(_net(), tmp_path, name, mix="none", normalise=mean, init=init, lr=0.0)
        assert torch.allclose(found.model.normalise.mean, torch.tensor(0.1))
        assert torch.equal(found.model.network.head.weight, first.model.network.head.weight)
    # Between networks with and without a layer of fastiat, and with a module called `network`.
    plain = _fit(_net(), tmp_path, "d", mix="none", normalise="none", init=first.path, lr=0.0)
    assert torch.equal(plain.model.head.weight, first.model.network.head.weight)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = Net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.network(x)

    save_file(dict(_net(kind=Outer).state_dict()), tmp_path / "own.safetensors")
    outer = Outer()
    load_initial(outer, str(tmp_path / "own.safetensors"))
    assert torch.equal(outer.network.head.weight, _net(kind=Outer).network.head.weight)
    card = ModelCard("x:y", None, 4, 3, 8, tuple("abcd"), normalise=("imagenet",))
    wrapped = card.behind_normalisation(Outer())
    load_initial(wrapped, str(tmp_path / "own.safetensors"))
    assert torch.equal(wrapped.network.network.head.weight, outer.network.head.weight)


def test_initial_weights_of_a_built_in_network_leave_its_normalisation(tmp_path):
    first = ModelCard("preact18", 2, 4, 3, 8, tuple("abcd"), normalise=("imagenet",))
    (tmp_path / "m.safetensors").write_bytes(pack_model(first.build().state_dict(), first))
    for words in (("image",), ("0.1",) * 3 + ("0.9",) * 3):
        model = ModelCard("preact18", 2, 4, 3, 8, tuple("abcd"), normalise=words).build()
        before = {n: t.clone() for n, t in model.normalise.state_dict().items()}
        load_initial(model, str(tmp_path / "m.safetensors"))
        for name, value in model.normalise.state_dict().items():
            assert torch.equal(before[name], value)


@pytest.mark.parametrize(
    ("arch", "side"),
    [
        ("torchvision:regnet_x_400mf", 32),
        ("torchvision:mnasnet0_5", 64),
        ("torchvision:googlenet", 64),
        ("timm:levit_128s", 224),
        ("timm:swin_tiny_patch4_window7_224", 224),
    ],
)
def test_a_library_network_that_computes_in_its_constructor_is_saved_and_loaded(
    arch, side, tmp_path, monkeypatch
):
    card = ModelCard(arch, None, 4, 3, side, tuple("abcd"), normalise=("imagenet",))
    model = card.build().eval()
    file = tmp_path / "model.safetensors"
    file.write_bytes(pack_model(model.state_dict(), card))
    loaded, _ = read_model(file)
    x = torch.rand(2, 3, side, side)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(loaded.eval()(x), expected)
        monkeypatch.chdir(tmp_path)
        names: dict = {}
        exec(definition(card), names)
        assert torch.allclose(names["model"](x), expected, atol=1e-6)


def test_a_frozen_network_and_one_without_parameters_are_measured():
    frozen = _net().requires_grad_(False)
    assert fastiat.evaluate_model(frozen, TEST, ["fgsm"]).errors == (
        fastiat.evaluate_model(_net(), TEST, ["fgsm"]).errors
    )
    assert fastiat.evaluate_model(nn.Flatten(), (IMAGES, LABELS), ["none"]).errors["none"].n == 40


def test_a_network_that_a_run_cannot_hold_is_refused():
    class Extra(Net):
        def get_extra_state(self) -> dict[str, int]:
            return {"seen": 1}

        def set_extra_state(self, state: dict[str, int]) -> None:
            pass

    with pytest.raises(InputError, match="_extra_state in its state_dict, a dict: keep only"):
        check_network(Extra(), (3, 8, 8), 4)
    with pytest.warns(FutureWarning):
        script = torch.jit.script(Net())
    with pytest.raises(InputError, match="is TorchScript: give the nn"):
        check_network(script, (3, 8, 8), 4)
    assert fastiat.evaluate_model(script, TEST, ["fgsm"]).errors["fgsm"].n == 20


def test_a_default_mix_point_that_cannot_be_mixed_says_so():
    class Pair(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.layer2(self.layer1(self.layer1(x)[:, :3])).mean((2, 3)))

    with pytest.raises(InputError, match="the default mix point layer1: this module runs 2 times"):
        check_network(Pair(), (3, 8, 8), 4, ("layer1",), chosen=False)
