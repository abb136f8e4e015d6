"""What a model is: plain modules, and functions and programs that hide their layers."""

import copy
import functools
import types
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastiat.attack import PGD, fgsm, pgd
from fastiat.engine import graphs
from fastiat.system.errors import InputError

SETTINGS = {"eps": 0.1, "alpha": 0.05, "steps": 3, "random_start": False}


@pytest.fixture(autouse=True)
def short_compilation(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(graphs, "BACKEND", "aot_eager")


def _network() -> nn.Sequential:
    """A network in training mode whose running statistics are not the batch's."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.InstanceNorm2d(4, track_running_stats=True),
        nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 3),
    )  # fmt: skip


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.rand(6, 3, 6, 6, generator=generator), torch.arange(6) % 3


class Holder:
    """A callable that is no module."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


class Hidden(nn.Module):
    """A module that keeps another where `modules()` does not find it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.held = {"networks": [model]}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.held["networks"][0](x)


def _apply(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x)


FUNCTIONS = {
    "lambda": lambda m: lambda z: m(z),
    "forward in a lambda": lambda m: lambda z: m.forward(z),
    "training in a lambda": lambda m: lambda z: m.train(False)(z),
    "bound method": lambda m: m.forward,
    "partial": lambda m: functools.partial(m),
    "partial of a function": lambda m: functools.partial(_apply, m),
    "object": Holder,
    "lambda of an object": lambda m: functools.partial(lambda held, z: held(z), Holder(m)),
}


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("way", [*FUNCTIONS, "hidden in a module"])
def test_a_network_out_of_sight_is_attacked_in_eval_mode_and_left_as_it_was(way):
    model, (x, y) = _network(), _batch()
    wrapped = {**FUNCTIONS, "hidden in a module": Hidden}[way](model)
    expected = pgd(copy.deepcopy(model).eval(), x, y, **SETTINGS)
    before, flags = _state(model), [m.training for m in model.modules()]
    random = torch.get_rng_state()
    with torch.no_grad():
        assert torch.equal(pgd(wrapped, x, y, **SETTINGS), expected)
    with torch.inference_mode():
        assert torch.equal(pgd(wrapped, x, y, **SETTINGS), expected)
    assert torch.equal(PGD(wrapped, **SETTINGS)(x, y), expected)
    assert torch.equal(torch.get_rng_state(), random)
    assert _unchanged(model, before)
    if way != "training in a lambda":  # which sets them itself
        assert [m.training for m in model.modules()] == flags
    assert not torch.nn.modules.module._global_forward_pre_hooks


@pytest.mark.parametrize("engine", ["eager", "compile"])
def test_flags_of_a_compiled_network_are_restored(engine):
    model, (x, y) = _network(), _batch()
    expected = pgd(copy.deepcopy(model).eval(), x, y, **SETTINGS)
    flags = [m.training for m in model.modules()]
    compiled = torch.compile(model, backend="aot_eager")
    for wrapped in (compiled, nn.Sequential(compiled)):
        assert torch.equal(PGD(wrapped, engine=engine, **SETTINGS)(x, y), expected)
        assert [m.training for m in model.modules()] == flags


@pytest.mark.parametrize("bn", ["batch", "update"])
@pytest.mark.parametrize("way", FUNCTIONS)
def test_another_batchnorm_mode_is_refused_where_the_layers_may_be_hidden(way, bn):
    model, (x, y) = _network(), _batch()
    wrapped = FUNCTIONS[way](model)
    before = _state(model)
    for act in (
        lambda: pgd(wrapped, x, y, bn=bn),
        lambda: fgsm(wrapped, x, y, bn=bn),
        lambda: PGD(wrapped, bn=bn),
    ):
        with pytest.raises(InputError, match=r"plain nn\.Module") as error:
            act()
        assert "\n" not in str(error.value)
    assert _unchanged(model, before) and model.training


def test_a_module_kept_in_a_list_has_its_batchnorm_set():
    (x, y), model = _batch(), _network()
    for bn in ("batch", "update"):
        plain, held = copy.deepcopy(model), copy.deepcopy(model)
        expected = pgd(plain, x, y, bn=bn, **SETTINGS)
        assert torch.equal(pgd(Hidden(held), x, y, bn=bn, **SETTINGS), expected)
        assert _unchanged(held, _state(plain))


def _programs(model: nn.Module, x: torch.Tensor) -> dict[str, nn.Module]:
    """`model`, in training mode, as programs; all but the first two have the mode fixed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "script": torch.jit.script(model),
            "fx": torch.fx.symbolic_trace(model),
            "trace": torch.jit.trace(model, x, check_trace=False),
            "export": torch.export.export(model, (x,)).module(),
        }


@pytest.mark.parametrize("name", ["script", "fx", "trace", "export"])
@pytest.mark.parametrize("inside", [False, True])
def test_programs_are_attacked_eagerly_and_their_statistics_stay(name, inside):
    (x, y), network = _batch(), _network()
    network = nn.Sequential(*(m for m in network if not isinstance(m, nn.Dropout)))
    program = _programs(network, x)[name]
    model = nn.Sequential(program, nn.Identity()) if inside else program
    before = _state(program)
    found = pgd(model, x, y, **SETTINGS)
    assert _unchanged(program, before)
    assert torch.equal(PGD(model, **SETTINGS)(x, y), found)
    assert torch.equal(pgd(lambda z: model(z), x, y, **SETTINGS), found)
    assert _unchanged(program, before)
    if name in ("script", "fx"):
        expected = pgd(copy.deepcopy(network).eval(), x, y, **SETTINGS)
        torch.testing.assert_close(found, expected)
    for act in (lambda: PGD(model, engine="compile"), lambda: pgd(model, x, y, bn="batch")):
        with pytest.raises(InputError, match=r"plain nn\.Module"):
            act()


def test_statistics_that_a_function_moves_itself_are_put_back_and_outer_passes_go_on():
    (x, y), layer = _batch(), nn.Linear(108, 3)
    mean, var, calls = torch.zeros(3), torch.ones(3), torch.zeros((), dtype=torch.int64)

    def model(z):
        calls.add_(1)
        z = F.batch_norm(z, mean, var, training=True)
        return layer(z.flatten(1))

    outer = F.cross_entropy(model(x), y)
    kept = mean.clone(), var.clone()
    pgd(model, x, y, restarts=2, steps=2)
    assert torch.equal(mean, kept[0]) and torch.equal(var, kept[1]) and int(calls) == 1
    outer.backward()
    assert layer.weight.grad.abs().sum() > 0


class Tied(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))
        self.append(nn.Linear(12, 3))
        self[3].weight = self[1].weight


class Shared(nn.Sequential):
    def __init__(self) -> None:
        layer = nn.Linear(12, 12)
        super().__init__(nn.Flatten(), layer, nn.ReLU(), layer, nn.Linear(12, 3))


class Island(nn.Sequential):
    """Its head is kept in fp32."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(12, 12), nn.Linear(12, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self[1](self[0](x))
        with torch.autocast(x.device.type, enabled=False):
            return self[2](x.float())


class ByHand(Island):
    """It computes with its weights before it multiplies by them, in ways that bf16 would change."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.linear(self[0](x), F.normalize(self[1].weight) * 1.001, self[1].bias)
        return self[2](x) * self[2].weight.square().sum().sqrt()


class Asking(Island):
    """It asks a weight for its type."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self[1](self[0](x))
        return self[2](x) * (2.0 if self[2].weight.dtype == torch.float32 else 1.0)


class Embedded(nn.Module):
    """Its weights are tied with a layer that does not multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first = nn.Embedding(3, 12), nn.Linear(12, 12)
        self.head = nn.Linear(12, 3, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.first(x.flatten(1)) + self.table.weight.sum(0))


class _Product(torch.autograd.Function):
    """A linear layer whose backward pass computes with the weight in fp32."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return (grad.float() @ (weight * 1.001)).to(grad.dtype), None


class OwnBackward(Island):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self[2](_Product.apply(self[0](x), self[1].weight))


class Checkpointed(Island):
    """Its forward pass runs again in the backward pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        run = torch.utils.checkpoint.checkpoint
        return self[2](run(self[1], self[0](x), use_reentrant=False))


def _normed(norm) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3))
    norm(model[1])
    return model


MODELS = {
    **{kind.__name__: kind for kind in (Tied, Shared, Island, ByHand, Asking, Embedded)},
    "OwnBackward": OwnBackward,
    "Checkpointed": Checkpointed,
    "weight norm": lambda: _normed(nn.utils.parametrizations.weight_norm),
    "spectral norm": lambda: _normed(nn.utils.parametrizations.spectral_norm),
    "orthogonal": lambda: _normed(nn.utils.parametrizations.orthogonal),
}


def _tiny() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(4, 3, 2, 2, generator=generator), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize("name", MODELS)
def test_an_attack_in_bf16_is_the_one_under_autocast(name):
    torch.manual_seed(0)
    model, (x, y) = MODELS[name](), _tiny()
    with torch.autocast("cpu", torch.bfloat16):
        expected = pgd(model, x, y, **SETTINGS)
    before = _state(model)
    found = PGD(model, engine="compile", precision="bf16", **SETTINGS)(x, y)
    assert torch.equal(found, expected)
    assert _unchanged(model, before) and all(p.grad is None for p in model.parameters())


def _castable(model: nn.Module, x: torch.Tensor) -> set[str]:
    weights = graphs.CastableWeights(model, torch.bfloat16)
    weights.observe(x)
    return weights.names


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"OwnBackward", "Checkpointed"}))
def test_a_trainings_passes_in_bf16_have_autocasts_loss_and_gradients(name):
    torch.manual_seed(0)
    model, (x, y) = MODELS[name]().eval(), _tiny()
    names = [name for name, _ in model.named_parameters()]
    weights = graphs.Weights(model, torch.bfloat16, _castable(model, x), names)
    logits = graphs.forward(model, weights.copies, torch.bfloat16, x)
    loss = F.cross_entropy(logits.float(), y)
    found = torch.autograd.grad(loss, weights.leaves)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        logits = model(x)
    expected = F.cross_entropy(logits.float(), y)
    expected.backward()
    assert torch.equal(loss, expected)
    for (name, parameter), grad in zip(model.named_parameters(), found, strict=True):
        # The two uses of a tied weight are summed in bf16 or in fp32.
        torch.testing.assert_close(grad.float(), parameter.grad, rtol=0.02, atol=1e-3, msg=name)


def test_what_only_multiplies_is_copied_and_nothing_else():
    (x, _), every = _tiny(), {"1.weight", "1.bias", "2.weight", "2.bias"}
    assert _castable(Island(), x) == {"1.weight", "1.bias"}
    assert _castable(ByHand(), x) == {"1.bias", "2.bias"}
    assert _castable(Asking(), x) == every - {"2.weight"}
    assert _castable(Tied(), x) == {"1.weight", "1.bias", "3.bias", "4.weight", "4.bias"}
    assert "table.weight" not in _castable(Embedded(), x)


def _add_hook(model: nn.Module) -> object:
    return model.register_forward_hook(lambda module, inputs, output: -output)


def _add_inner_hook(model: nn.Module) -> object:
    return model[1].register_forward_hook(lambda module, inputs, output: 0.5 - output)


def _add_pre_hook(model: nn.Module) -> object:
    return model[1].register_forward_pre_hook(lambda module, inputs: (1 - inputs[0] ** 2,))


def _add_backward_hook(model: nn.Module) -> object:
    return model[1].register_full_backward_hook(lambda module, into, out: (-into[0],))


def _add_backward_pre_hook(model: nn.Module) -> object:
    return model[1].register_full_backward_pre_hook(lambda module, out: (-out[0],))


def _add_global_hook(model: nn.Module) -> object:
    def turn(module, inputs, output):
        return -output if module is model[1] else None

    return nn.modules.module.register_module_forward_hook(turn)


def _patch_forward(model: nn.Module) -> None:
    model[1].forward = types.MethodType(
        lambda self, x: -F.linear(x, self.weight, self.bias), model[1]
    )


def _replace_layer(model: nn.Module) -> None:
    torch.manual_seed(5)
    model[1] = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))


def _parametrize(model: nn.Module) -> None:
    nn.utils.parametrize.register_parametrization(model[1], "weight", Negative())


def _replace_weight(model: nn.Module) -> None:
    model[1].weight = nn.Parameter(-model[1].weight.detach())


def _set_flag(model: nn.Module) -> None:
    model.sign = -1


class Negative(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return -weight


class Signed(nn.Sequential):
    sign = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.sign * super().forward(x)


CHANGES = [
    _add_hook, _add_inner_hook, _add_pre_hook, _add_backward_hook, _add_backward_pre_hook,
    _add_global_hook, _patch_forward, _replace_layer, _parametrize, _replace_weight, _set_flag,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_changed_after_the_first_call_is_seen(change):
    torch.manual_seed(0)
    model, (x, y) = Signed(nn.Flatten(), nn.Linear(12, 3)), _tiny()
    attack = PGD(model, engine="compile", **SETTINGS)
    first = pgd(model, x, y, **SETTINGS)
    assert torch.equal(attack(x, y), first)
    handle = change(model)
    try:
        changed = pgd(model, x, y, **SETTINGS)
        assert not torch.equal(changed, first)
        assert torch.equal(attack(x, y), changed)
    finally:
        if handle is not None:
            handle.remove()
    if handle is not None:
        assert torch.equal(attack(x, y), first)


def test_a_flag_that_changes_how_a_weight_is_used_is_seen_in_bf16():
    class Scaled(Island):
        scaled = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self[1](self[0](x))
            return self[2](x) if not self.scaled else F.linear(x, self[2].weight * 1.001) ** 3

    torch.manual_seed(0)
    model, (x, y) = Scaled(), _tiny()
    attack = PGD(model, engine="compile", precision="bf16", **SETTINGS)
    attack(x, y)
    model.scaled = True
    attack(x, y)
    assert "2.weight" not in _cast(attack)


def _cast(attack: PGD) -> set[str]:
    """Return the weights of which the attack makes copies in bf16."""
    (ready,) = attack._loops.values()
    return {name for name, weight in ready.loop.weights().items() if weight.dtype != torch.float32}
