"""The engines: what they must not compute, copy, lay out or compile again, and that they agree."""

import copy
import types
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastiat import attack, data, models
from fastiat.attack import PGD, pgd
from fastiat.config import TrainConfig
from fastiat.engine import graphs
from fastiat.runs.weights import pack_state, read_state
from fastiat.system.errors import InputError
from fastiat.train import Trainer
from fastiat.training.step import Step

CONVOLUTIONS = 20  # of preact18
aten = torch.ops.aten


@pytest.fixture(autouse=True)
def no_recompilation(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compile anew for every test, without the C++ compiler; compiling twice is an error."""
    torch._dynamo.reset()
    monkeypatch.setattr(graphs, "BACKEND", "aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Every graph that is compiled in the test, forward and backward, as they come."""
    seen: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.append(graph)
        return make_boxed_func(graph.forward)

    monkeypatch.setattr(graphs, "BACKEND", aot_autograd(fw_compiler=keep, bw_compiler=keep))
    return seen


def _network(**options: Any) -> models.Network:
    torch.manual_seed(0)
    model = models.build("preact18", **{"width": 4, **options})
    return model.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]


def _batch(count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(count, 3, 32, 32, generator=generator)
    y = torch.randint(10, (count,), generator=generator)
    return x.contiguous(memory_format=torch.channels_last), y


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def _nodes(programs: list[torch.fx.GraphModule], target: Any) -> list[torch.fx.Node]:
    return [n for graph in programs for n in graph.graph.nodes if n.target is target]


def _gradients_computed(programs: list[torch.fx.GraphModule]) -> tuple[int, int]:
    """How many convolutions' backward passes give an input gradient, and a weight gradient."""
    masks = [node.args[10] for node in _nodes(programs, aten.convolution_backward.default)]
    return sum(mask[0] for mask in masks), sum(mask[1] for mask in masks)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("attack_first", [True, False])
def test_a_compiled_attack_computes_no_weight_gradient_and_training_keeps_its_own(
    programs, attack_first, precision
):
    model, (x, y) = _network(), _batch(2)
    reference = copy.deepcopy(model)
    F.cross_entropy(reference(x), y).backward()
    compiled = torch.compile(model, backend=graphs.BACKEND, dynamic=False)
    attacker = PGD(model, engine="compile", precision=precision, steps=2)

    def attack() -> None:
        programs.clear()
        attacker(x, y)
        assert _gradients_computed(programs) == (CONVOLUTIONS, 0)
        assert all(p.grad is None and p.requires_grad for p in model.parameters())

    def train() -> None:
        programs.clear()
        F.cross_entropy(compiled(x), y).backward()
        # The stem's input is the data, which needs no gradient.
        assert _gradients_computed(programs) == (CONVOLUTIONS - 1, CONVOLUTIONS)
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
            p.grad = None

    for act in (attack, train) if attack_first else (train, attack):
        act()
    programs.clear()
    attacker(x, y)
    F.cross_entropy(compiled(x), y).backward()
    assert programs == [], "the second round compiled again"
    # BatchNorm statistics have moved since, but every parameter must still learn.
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "weight" in name)


def test_the_steps_attack_computes_no_weight_gradient_and_its_passes_all(programs):
    trainer = _trainer("compile", mix="none")
    next(trainer.epoch_updates())
    backward = [_gradients_computed([g]) for g in programs]
    assert [b for b in backward if b != (0, 0)] == [
        (CONVOLUTIONS - 1, CONVOLUTIONS),
        (CONVOLUTIONS, 0),
    ]


TINY = TrainConfig(
    dataset="digits", arch="preact18", width=4, batch_size=16, device="cpu", precision="fp32",
    lr=0.02, steps=2, eval_limit=40,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def digits() -> data.Dataset:
    """A few of the digits, so that epochs are short."""
    whole = data.load("digits")
    index = torch.arange(64)
    return replace(whole, train=whole.train.take(index), test=whole.test.take(index))


def _trainer(engine: str, **changes: Any) -> Trainer:
    return Trainer(replace(TINY, engine=engine, **changes), data.load("digits"))


VARIANTS = {
    "iat": {},
    "pgd, statistics moved": {"mix": "none", "bn": "update"},
    "no attack": {"adv": "none", "smoothing": 0.1},
    "fgsm, pixels mixed": {
        "adv": "fgsm",
        "mix": "mixup",
        "mix_space": "pixel",
        "bn": "batch",
        "shared_mix": True,
    },
    "all else": {
        "lam_per_sample": True,
        "loss": "bce",
        "attack_loss": "margin",
        "clean_weight": 0.3,
        "smoothing": 0.2,
        "activation": "silu",
        "decay_norm": False,
        "ema": 0.9,
    },
    "trades, weights perturbed": {"objective": "trades", "awp": 0.05, "bn": "update"},
    "mart, boxes": {"objective": "mart", "mix": "cutmix"},
    "weights perturbed late": {"awp": 0.05, "awp_warmup": 1, "batch_size": 32, "bn": "batch"},
    "mixed batch attacked": {
        "attack_mixed": True,
        "mix": "cutmix",
        "lam_per_sample": True,
        "awp": 0.05,
        "smoothing": 0.1,
    },
    "n-fgsm": {"adv": "n-fgsm", "norm": "l2", "mix": "mixup", "objective": "trades", "beta": 2.0},
}
COMPILED = [
    ("iat", True, "fp32"),
    ("all else", True, "bf16"),
    ("mixed batch attacked", True, "fp32"),
    pytest.param("iat", True, "bf16", marks=pytest.mark.long),
    pytest.param("all else", True, "fp32", marks=pytest.mark.long),
    pytest.param("trades, weights perturbed", True, "bf16", marks=pytest.mark.long),
]


@pytest.mark.parametrize(
    ("variant", "compiled", "precision"),
    [*((v, False, precision) for v in VARIANTS for precision in ("fp32", "bf16")), *COMPILED],
)
def test_the_step_in_fixed_buffers_equals_the_plain_one_bit_for_bit(
    variant, precision, compiled, monkeypatch
):
    if not compiled:
        monkeypatch.setattr(graphs, "compile_once", lambda function: function)
    plain, fixed = (
        _trainer(name, precision=precision, **VARIANTS[variant]) for name in ("eager", "compile")
    )
    for _, a, b in zip(range(4), plain.epoch_updates(), fixed.epoch_updates(), strict=False):
        for name, value in a._asdict().items():
            assert torch.equal(value, getattr(b, name)), name
    one, other = plain.state_dict(), fixed.state_dict()
    for key in ("model", "average", "momentum", "random"):
        for name, value in (one[key] or {}).items():
            assert torch.equal(value, other[key][name]), name
    assert isinstance(fixed.fast_step, Step)


@pytest.mark.parametrize("bn", ["eval", "batch", "update"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"norm": "l2", "eps": 0.5, "alpha": 0.1}, {"restarts": 2, "loss": "margin"}],
    ids=["linf", "l2", "restarts"],
)
def test_the_compiled_attack_equals_the_plain_one_bit_for_bit(bn, precision, settings):
    plain, compiled = _network(), _network()
    x, y = _batch()
    settings = {"bn": bn, "steps": 3, **settings}
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        expected = pgd(plain, x, y, generator=_generator(), **settings)
    attacker = PGD(
        compiled, engine="compile", precision=precision, generator=_generator(), **settings
    )
    assert torch.equal(attacker(x, y), expected)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, compiled.state_dict()[name]), name
    assert all(m.training for m in compiled.modules())


def test_attack_follows_the_callers_autocast_and_grad_mode():
    model, (x, y) = _network(), _batch()
    attacker = PGD(model, engine="compile", random_start=False, steps=2)
    exact = pgd(model, x, y, random_start=False, steps=2)
    with torch.autocast("cpu", torch.bfloat16):
        rough = pgd(model, x, y, random_start=False, steps=2)
        assert torch.equal(attacker(x, y), rough)
        full = PGD(model, engine="compile", precision="fp32", random_start=False, steps=2)
        assert torch.equal(full(x, y), exact)
    assert not torch.equal(rough, exact)
    with torch.inference_mode():
        assert torch.equal(attacker(x.clone(), y.clone()), exact)
    with torch.no_grad():
        assert torch.equal(attacker(x, y), exact)
    result = attacker(x, y)
    attacker(x * 0.5, y)
    assert torch.equal(result, exact), "the next call overwrote the result of the last"


def test_attack_compiles_once_per_shape_and_sees_the_weights_as_they_are(programs):
    model, (x, y) = _network(), _batch(6)
    attacker = PGD(model, engine="compile", random_start=False, steps=2)
    for count in (6, 4, 6, 4):
        attacker(x[:count], y[:count])
    assert len(programs) == 2 * 2  # forward and backward of either shape
    before = attacker(x, y)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1.5)
    after = attacker(x, y)
    assert torch.equal(after, pgd(model, x, y, random_start=False, steps=2))
    assert not torch.equal(after, before)
    model.eval()
    attacker(x, y)
    assert len(programs) == 2 * 2


def test_attack_takes_wrapped_and_compiled_and_reparametrized_models():
    inner, (x, y) = models.build("mlp6", width=4), _batch()
    settings = {"random_start": False, "steps": 2}
    expected = pgd(inner, x, y, **settings)
    compiled = torch.compile(inner, backend="aot_eager", dynamic=False)
    for model in (nn.DataParallel(inner), compiled):
        assert torch.equal(PGD(model, engine="compile", **settings)(x, y), expected)
    nn.utils.parametrizations.spectral_norm(inner.head)
    inner.eval()
    examples = PGD(inner, engine="compile", **settings)(x, y)
    assert torch.equal(examples, pgd(inner, x, y, **settings))


def test_more_attacks_than_dynamo_keeps_programs_for_one_source_are_all_compiled(programs):
    (x, y), limit = _batch(2), torch._dynamo.config.recompile_limit
    model = models.build("mlp6", width=2)
    for count in range(1, limit + 2):
        programs.clear()
        PGD(model, engine="compile", steps=1, random_start=False)(x, y)
        assert len(programs) == 2, f"attack {count} was not compiled"


def test_a_training_compiles_each_pass_once_for_all_its_epochs(programs, digits):
    config = replace(TINY, engine="compile", epochs=3, holdout=16, batch_size=8, mix="mixup")
    trainer = Trainer(config, digits)
    list(trainer.epoch_updates())
    trainer.validate({})
    compiled = len(programs)
    assert compiled == 2 * 2  # the pass of both halves, and the attack's
    list(trainer.epoch_updates())
    trainer.validate({})
    assert len(programs) == compiled


def _matmul_weights(model: nn.Module) -> list[torch.Tensor]:
    """Return the parameters of convolutions and linear layers, which autocast would cast."""
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    return [parameter for layer in layers for parameter in layer.parameters()]


class _Casts(TorchDispatchMode):
    """Counts the values that are turned from fp32 into bf16 by tensors of given shapes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.shapes = {weight.shape for weight in _matmul_weights(model)}
        self.values = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        pairs: list[tuple[Any, Any]] = []
        if func is aten._to_copy.default:
            pairs = [(args[0], out)]
        elif func is aten._foreach_copy_.default:
            pairs = list(zip(args[1], args[0], strict=True))
        elif func is aten.copy_.default:
            pairs = [(args[1], args[0])]
        for source, target in pairs:
            down = (source.dtype, target.dtype) == (torch.float32, torch.bfloat16)
            self.values += source.numel() * (down and source.shape in self.shapes)
        return out


@pytest.mark.parametrize("name", ["eager", "compile"])
def test_bf16_weights_are_made_once_per_step(name, monkeypatch):
    monkeypatch.setattr(graphs, "compile_once", lambda function: function)
    trainer = _trainer(name, precision="bf16", steps=7)
    updates = trainer.epoch_updates()
    next(updates)
    with _Casts(trainer.model) as casts:
        next(updates)
    assert casts.values == sum(w.numel() for w in _matmul_weights(trainer.model))


def test_bf16_weights_are_made_once_per_attack(programs):
    model, (x, y) = _network(), _batch()
    attacker = PGD(model, engine="compile", precision="bf16")
    attacker(x, y)
    casts = _nodes(programs, aten._to_copy.default)
    casts += [n for g in programs for n in g.graph.nodes if "convert_element" in str(n.target)]
    weights = {weight.shape for weight in _matmul_weights(model)}
    assert not [node for node in casts if node.meta["val"].shape in weights]
    # The iterate comes in, and the loss goes out, in fp32.
    forward = programs[0].graph
    inputs = [n.meta["val"] for n in forward.nodes if n.op == "placeholder"]
    assert [t.dtype for t in inputs if t.shape == x.shape] == [torch.float32]
    output = next(n for n in forward.nodes if n.op == "output").args[0][0]
    assert output.meta["val"].dtype == torch.float32


def _channels_last(tensor: torch.Tensor) -> bool:
    return tensor.dim() != 4 or tensor.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_passes_take_every_convolutions_operands_channels_last(programs, precision):
    # Wide enough that no `Shortcut` selects its pixels, which is a copy.
    trainer = _trainer("compile", precision=precision, mix_at=("2",), width=16)
    next(trainer.epoch_updates())
    operands = 0
    for node in _nodes(programs, aten.convolution.default):
        for operand in (*node.args[:2], node):
            operands += 1
            assert _channels_last(operand.meta["val"]), (node, operand)
    for node in _nodes(programs, aten.convolution_backward.default):
        for operand in node.args[:3]:
            operands += 1
            assert _channels_last(operand.meta["val"]), (node, operand)
    assert operands == 3 * 2 * 2 * CONVOLUTIONS
    for graph in programs:
        for node in graph.graph.nodes:
            moved = node.target is aten.clone.default and node.meta["val"].dim() == 4
            assert not moved, f"{node} lays its input out anew"


class _Layouts(TorchDispatchMode):
    """Notes which operands of convolutions are not channels-last."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.wrong = 0, []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        operands = {aten.convolution.default: 2, aten.convolution_backward.default: 3}.get(func, 0)
        for operand in args[:operands]:
            self.seen += 1
            if not _channels_last(operand):
                self.wrong.append((str(func), tuple(operand.shape)))
        return func(*args, **(kwargs or {}))


def test_the_plain_step_takes_every_convolutions_operands_channels_last():
    trainer = _trainer("eager", precision="bf16", mix_at=("1",), steps=2)
    with _Layouts() as layouts:
        next(trainer.epoch_updates())
    passes = 1 + 2 + 1
    assert layouts.seen == passes * (2 + 3) * CONVOLUTIONS and layouts.wrong == []


def test_what_is_undone_leaves_no_trace(monkeypatch):
    monkeypatch.setattr(graphs, "compile_once", lambda function: function)
    trainer = _trainer("compile")
    next(trainer.epoch_updates())
    step = trainer.fast_step
    changed = [t for t in step._changed()]
    before = [t.clone() for t in changed]
    generators = [g.get_state() for g in trainer.random.values()]
    graphs.with_state_restored(
        lambda: (
            step._gradient("clean", 0, 1, False),
            step._ascent("adversarial", 1, 2),
            step._gradient("adversarial", 1, 2, True),
            step.optimizer.step(),
        ),
        changed,
        2,
    )
    for now, then in zip(changed, before, strict=True):
        assert torch.equal(now, then)
    for generator, state in zip(trainer.random.values(), generators, strict=True):
        assert torch.equal(generator.get_state(), state)
    listed = {t.data_ptr() for t in changed}
    for tensor in (*trainer.model.parameters(), *trainer.model.buffers()):
        assert tensor.data_ptr() in listed
    assert len(step._changed()) == len(before)


@pytest.mark.parametrize("adv", ["none", "pgd"])
def test_resume_and_seed_keep_their_promise_when_compiled(adv, tmp_path, digits):
    config = replace(
        TINY, engine="compile", adv=adv, arch="mlp6", width=16, ema=0.9, epochs=2, mix="mixup"
    )
    whole, first = Trainer(config, digits), Trainer(config, digits)
    for _ in range(2):
        list(whole.epoch_updates())
    updates = first.epoch_updates()
    for _ in range(3):
        next(updates)
    (tmp_path / "state").write_bytes(pack_state(first.state_dict()))
    second = Trainer(config, digits)
    next(second.epoch_updates())  # what was compiled before the state came must not keep the old
    second.load_state_dict(read_state(tmp_path / "state"))
    while not second.finished:
        list(second.epoch_updates())
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    assert torch.equal(whole.totals, second.totals)


def test_deterministic_asks_for_repeatable_algorithms_and_nothing_else():
    try:
        graphs.prepare(torch.device("cpu"), deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        trainer = _trainer("eager", deterministic=True)
        next(trainer.epoch_updates())
    finally:
        graphs.prepare(torch.device("cpu"), deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_wrong_engines_are_refused_in_one_line(complaint, tmp_path):
    model, (x, y) = _network(), _batch()
    with pytest.raises(InputError, match="unknown engine 'fast'"):
        PGD(model, engine="fast")
    with pytest.raises(InputError, match="unknown precision 'fp16'"):
        PGD(model, precision="fp16")
    with pytest.raises(InputError, match=r"needs a plain nn\.Module"):
        PGD(lambda x: model(x), engine="compile")
    with pytest.raises(InputError, match="CUDA graphs"):
        PGD(model, engine="graph")(x, y)
    flags = ("--dataset", "digits", "--device", "cpu", "--out", tmp_path / "run")
    assert "--engine graph captures CUDA graphs" in complaint("train", "--engine", "graph", *flags)
    assert not (tmp_path / "run").exists()


def test_engines_that_auto_takes(monkeypatch, caplog):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert graphs.pick_engine("auto", cpu) == "eager"
    assert graphs.pick_engine("auto", cuda) == "graph"
    model, (x, y) = _network(width=1).eval(), _batch(2)
    settings = {"steps": 1, "random_start": False}
    made = []
    monkeypatch.setattr(attack, "PGDLoop", lambda *a, **k: made.append(k) or _StopError.throw())
    expected = pgd(model, x, y, **settings)
    # On the CPU nothing is compiled: it takes a minute and gains nothing.
    assert torch.equal(PGD(model, **settings)(x, y), expected)
    # A plain function has no weights to freeze.
    assert torch.equal(
        PGD(lambda x: model(x), bn="eval", **settings)(x, y),
        pgd(lambda x: model(x), x, y, **settings),
    )
    assert not made
    with caplog.at_level("INFO", "fastiat.attack"), pytest.raises(_StopError):
        PGD(model, engine="compile", **settings)(x, y)
    assert [(k["compiled"], k["captured"]) for k in made] == [(True, False)]
    assert [record.message for record in caplog.records] == [
        f"compiling the attack on PreActResNet18 for batches of shape {tuple(x.shape)}, which "
        f"takes up to minutes"
    ]
    monkeypatch.setattr(graphs, "shutil", types.SimpleNamespace(which=lambda name: None))
    with pytest.raises(InputError, match=r"needs a C\+\+ compiler"):
        graphs.pick_engine("compile", cpu)


class _StopError(Exception):
    @classmethod
    def throw(cls) -> None:
        raise cls


@pytest.fixture(scope="module")
def learnt() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A network that tells digits apart, and all 1,797 of them as pixels and labels."""
    config = TrainConfig(
        dataset="digits", width=8, epochs=6, schedule="cosine", pad=1, adv="none", mix="none",
        device="cpu", lr=0.05,
    )  # fmt: skip
    whole = data.load("digits")
    trainer = Trainer(config, whole)
    while not trainer.finished:
        list(trainer.epoch_updates())
    images = torch.cat([whole.train.images, whole.test.images]).permute(0, 3, 1, 2)
    y = torch.cat([whole.train.labels, whole.test.labels])
    return trainer.model.eval(), models.to_pixels(images), y


@pytest.mark.long
@pytest.mark.parametrize("bn", ["eval", "batch"])
def test_the_fast_attack_fools_as_many_images_as_the_exact_one(learnt, bn, monkeypatch):
    monkeypatch.setattr(graphs, "BACKEND", "inductor")
    model, x, y = learnt
    settings = {"eps": 16 / 255, "alpha": 4 / 255, "bn": bn}
    fast = PGD(model, engine="compile", precision="bf16", generator=_generator(), **settings)
    exact = PGD(model, engine="eager", precision="fp32", generator=_generator(), **settings)
    robust = []
    for attacker in (fast, exact):
        hits = 0
        for start in range(0, len(x) - 598, 599):
            part = slice(start, start + 599)
            with torch.no_grad():
                hits += (model(attacker(x[part], y[part])).argmax(1) == y[part]).sum().item()
        robust.append(100 * hits / len(x))
    assert len(x) == 1797
    # The comparison means something only where the attack is neither hopeless nor perfect.
    assert 10 < robust[1] < 90
    assert abs(robust[0] - robust[1]) <= 0.5, robust


@pytest.mark.slow
def test_training_compiled_by_inductor_stays_close_to_the_plain_one(monkeypatch):
    monkeypatch.setattr(graphs, "BACKEND", "inductor")
    plain, compiled = (
        _trainer(name, arch="mlp6", width=32, mix="mixup", random_start=False)
        for name in ("eager", "compile")
    )
    for _, a, b in zip(range(4), plain.epoch_updates(), compiled.epoch_updates(), strict=False):
        torch.testing.assert_close(a.clean_loss, b.clean_loss, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(a.adv_loss, b.adv_loss, rtol=1e-3, atol=1e-3)
