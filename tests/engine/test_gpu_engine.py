"""Captured graphs against plain PyTorch, in fp32: the attack, the step and the whole training.

Every test also runs on the CPU, where the same buffers are filled by the same calls without a
capture; on CUDA ("cuda") they are captured and replayed.
"""

import copy
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastiat import data, kernels, models
from fastiat.attack import PGD, PGDLoop, attack_defaults, pgd
from fastiat.config import TrainConfig
from fastiat.engine import graphs
from fastiat.mix import Mix, MixPoints
from fastiat.runs.weights import pack_state, read_state
from fastiat.train import Trainer, algorithm1
from fastiat.training.step import Step

DEFAULTS: dict[str, Any] = {**attack_defaults(), "eps": 8 / 255, "alpha": 2 / 255}
BATCH = 6


# PyTorch looks for it once, at the process's first matrix product on CUDA.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    """Algorithms that repeat bit for bit, and fp32 that is fp32."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.allow_tf32
    graphs.prepare(torch.device("cuda" if torch.cuda.is_available() else "cpu"), True)
    yield
    torch.use_deterministic_algorithms(False)
    cudnn.benchmark, cudnn.allow_tf32 = before


@pytest.fixture
def model(device: str) -> models.Network:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = models.build("preact18", width=4)
        # Running statistics that are not the initial ones, so that eval mode is not an identity.
        network.train()(torch.rand(32, 3, 32, 32))
    return network.eval().to(device, memory_format=torch.channels_last)


@pytest.fixture
def batch(device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(BATCH, 3, 32, 32, generator=generator)
    y = torch.randint(10, (BATCH,), generator=generator)
    return x.to(device, memory_format=torch.channels_last), y.to(device)


def loop_on(
    model: models.Network, x: Tensor, y: Tensor, *, pool: Any = None, **settings: Any
) -> PGDLoop:
    """An un-compiled loop with these images in its buffers, captured where there is CUDA."""
    return PGDLoop(
        model,
        x.clone(),
        y.clone(),
        None,
        DEFAULTS | settings,
        weights=lambda: graphs.detached_weights(model, None, ()),
        compiled=False,
        captured=x.is_cuda,
        pool=pool,
    )


def generator_on(device: str, seed: int = 7) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def state_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model: torch.nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


@pytest.mark.parametrize("bn", ["eval", "batch", "update"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_replayed_attack_is_bit_equal_to_the_plain_one(device, model, batch, bn, norm, loss):
    settings = {"bn": bn, "norm": norm, "loss": loss}
    if norm == "l2":
        settings |= {"eps": 0.5, "alpha": 0.1}
    plain = copy.deepcopy(model)
    loop = loop_on(model, *batch, generator=generator_on(device), **settings)
    attack = partial(pgd, plain, **{**DEFAULTS, **settings, "generator": generator_on(device)})
    for shift in (0, 1, 2):  # the first call captures, the others replay
        loop.x.copy_(batch[0].roll(shift, 0))
        loop.y.copy_(batch[1].roll(shift, 0))
        assert torch.equal(loop(), attack(loop.x, loop.y))
        assert_same_state(model, state_of(plain))


def test_random_starts_are_fresh_at_every_replay_and_repeat_with_the_seed(device, model, batch):
    runs = []
    for _ in range(2):
        loop = loop_on(model, *batch, generator=generator_on(device), alpha=0.0)
        runs.append([loop().clone() for _ in range(4)])
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)
    starts = torch.stack(runs[0])
    assert (starts - batch[0]).abs().amax() <= 8 / 255 + 1e-6
    for i in range(4):
        for j in range(i):
            # Two uniform starts share hardly a pixel, but for those that clipping makes equal.
            assert (starts[i] == starts[j]).float().mean() < 0.2


def test_making_ready_leaves_weights_buffers_and_generators_as_they_were(device, model, batch):
    before, mine = state_of(model), generator_on(device)
    default = torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()
    expected = generator_on(device)
    torch.empty((), dtype=torch.int64, device=device).random_(generator=expected)
    loop_on(model, *batch, generator=mine, bn="batch")()
    assert_same_state(model, before)
    assert torch.equal(mine.get_state(), expected.get_state())
    after = torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()
    assert torch.equal(after, default)
    assert all(p.grad is None for p in model.parameters())


def _network_and_images(where: str) -> tuple[models.Network, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = models.build("preact18", width=8).eval()
        x, y = torch.rand(32, 3, 32, 32), torch.randint(10, (32,))
    return network.to(where), x.to(where), y.to(where)


def _loss(network: torch.nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return torch.nn.functional.cross_entropy(network(x), y).item()


def _assert_as_strong(
    network: torch.nn.Module, x: Tensor, y: Tensor, examples: Tensor, plain: Tensor
) -> None:
    assert (examples - x).abs().amax() <= DEFAULTS["eps"] + 1e-6
    # Rounding turns the sign of a few small gradients; nearly all pixels agree all the same.
    assert ((examples - plain).abs() > 1e-6).float().mean() < 0.1
    clean = _loss(network, x, y)
    expected = _loss(network, plain, y) - clean
    assert _loss(network, examples, y) - clean == pytest.approx(expected, rel=0.02) and expected > 0


ENGINES = ["eager", pytest.param("graph", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("name", ENGINES)
def test_attack_follows_weights_that_change_and_leaves_no_gradient(name):
    network, x, y = _network_and_images("cuda" if name == "graph" else "cpu")
    settings = {"random_start": False, "eps": 8 / 255, "alpha": 2 / 255}
    attack = PGD(network, engine=name, precision="fp32", **settings)
    for _ in range(3):
        examples = attack(x, y)
        assert all(p.grad is None for p in network.parameters())
        _assert_as_strong(network, x, y, examples, pgd(network, x, y, **settings))
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize(("loss", "restarts"), [("ce", 1), ("margin", 3)])
def test_attack_under_any_engine_is_as_strong_as_the_plain_one(name, loss, restarts):
    where = "cuda" if name == "graph" else "cpu"
    network, x, y = _network_and_images(where)
    settings = {"eps": 8 / 255, "alpha": 2 / 255, "loss": loss, "restarts": restarts}
    attack = PGD(network, engine=name, precision="fp32", generator=generator_on(where), **settings)
    plain = pgd(network, x, y, generator=generator_on(where), **settings)
    _assert_as_strong(network, x, y, attack(x, y), plain)


def _parts(device: str, **settings: Any) -> tuple[models.Network, torch.optim.SGD]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = models.build("preact18", width=4)
    network = network.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=torch.tensor(0.01, device=device),
        momentum=0.9,
        nesterov=True,
        weight_decay=1e-4,
        fused=True,
    )
    for parameter in network.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return network, optimizer


def _mix(layer: int | None, seed: int, device: str) -> Mix | None:
    if layer is None:
        return None
    generator = torch.Generator().manual_seed(seed)
    perm = torch.randperm(BATCH, generator=generator).to(device)
    return Mix(layer, perm, torch.rand((), generator=generator).to(device))


@pytest.mark.parametrize("attacked", [True, False])
def test_replayed_step_is_bit_equal_to_algorithm_1_for_every_mix_layer(device, attacked):
    settings = DEFAULTS | {"steps": 2} if attacked else None
    network, optimizer = _parts(device)
    plain, plain_optimizer = _parts(device)
    random, plain_random = generator_on(device), generator_on(device)
    step = Step(
        network,
        optimizer,
        torch.Size((BATCH, 3, 32, 32)),
        None if settings is None else settings | {"generator": random},
        MixPoints(network),
        dtype=None,
        compiled=False,
        captured=device == "cuda",
    )
    attack, points = None, MixPoints(plain)
    if settings is not None:
        attack = partial(pgd, plain, **(settings | {"generator": plain_random}))
    layers = [(None, None), (0, 1), (1, 2), (2, 0), (0, 1), (2, 2), (None, 1)]
    generator = torch.Generator().manual_seed(2)
    for number, pair in enumerate(layers):
        shape = (BATCH, 32, 32, 3)
        images = torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(device)
        images, y = images.permute(0, 3, 1, 2), torch.arange(BATCH, device=device) % 10
        mixes = tuple(_mix(layer, 10 * number + i, device) for i, layer in enumerate(pair))
        for group in optimizer.param_groups + plain_optimizer.param_groups:
            group["lr"].fill_(0.01 / (1 + number))
        update = step(images, y, mixes)
        plain_optimizer.zero_grad()
        draws = iter(mixes)
        x = models.to_pixels(images)
        expected = algorithm1(plain, x, y, attack, lambda d=draws: next(d), points)
        plain_optimizer.step()
        for name in ("clean_loss", "adv_loss", "clean_correct", "adv_correct"):
            assert torch.equal(getattr(update, name), getattr(expected, name)), (pair, name)
        assert_same_state(network, state_of(plain))
        for p, q in zip(network.parameters(), plain.parameters(), strict=True):
            mine, theirs = optimizer.state[p], plain_optimizer.state[q]
            assert torch.equal(mine["momentum_buffer"], theirs["momentum_buffer"])
    assert torch.equal(random.get_state(), plain_random.get_state())
    if device == "cuda":
        # A graph for each layer of each pass and one for the optimizer, from one pool.
        assert step._captured is not None
        halves = {("clean", pair[0], False) for pair in layers}
        halves |= {("adversarial", pair[1], False) for pair in layers if attacked}
        assert set(step._captured) == {*halves, "optimizer"}
        captured = [piece.graph for piece in step._captured.values()]
        assert {graph.pool() for graph in captured if graph} == {step.pool}


@pytest.mark.gpu
def test_graphs_of_one_pool_share_their_memory():
    torch.manual_seed(0)
    network = models.build("preact18", width=16).eval().cuda()
    x, y = torch.rand(64, 3, 32, 32, device="cuda"), torch.zeros(64, dtype=torch.int64).cuda()

    def reserved_by(pool: Any) -> int:
        loops = [loop_on(network, x, y, pool=pool) for _ in range(3)]
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        for loop in loops:
            loop()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved() - before

    shared, own = reserved_by(torch.cuda.graph_pool_handle()), reserved_by(None)
    assert shared < 0.6 * own


TRAINING = TrainConfig(
    dataset="digits",
    arch="preact18",
    width=4,
    mix="mixup",  # one mix layer, as each is compiled on its own
    epochs=2,
    batch_size=64,
    steps=2,
    lr=0.01,
    precision="fp32",
    ema=0.9,
    eval_limit=50,
)


def _trained(config: TrainConfig, steps: int) -> Trainer:
    trainer = Trainer(config, data.load("digits"))
    updates = trainer.epoch_updates()
    for _ in range(steps):
        next(updates)
    return trainer


@pytest.mark.gpu
def test_training_under_graph_stays_beside_the_eager_one_in_fp32():
    config = replace(TRAINING, device="cuda", deterministic=True)
    plain, fast = (_trained(replace(config, engine=name), 5) for name in ("eager", "graph"))
    assert fast.step == plain.step == 5
    torch.testing.assert_close(fast.totals, plain.totals, rtol=1e-2, atol=0.5)
    for (name, p), q in zip(plain.model.named_parameters(), fast.model.parameters(), strict=True):
        assert (p - q).norm() <= 0.02 * p.norm() + 1e-4, name
    assert torch.equal(fast.random["attack"].get_state(), plain.random["attack"].get_state())


METHODS = {
    "trades, awp": {"objective": "trades", "awp": 0.01},
    "mart": {"objective": "mart", "mix": "cutmix"},
    "awp, later": {"awp": 0.01, "awp_warmup": 1, "epochs": 3},
    "mixed": {"attack_mixed": True, "mix": "cutmix", "awp": 0.01, "lam_per_sample": True},
    "n-fgsm": {"adv": "n-fgsm"},
}


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_replayed_training_is_bit_equal_to_its_uncaptured_twin(method, precision, monkeypatch):
    monkeypatch.setattr(graphs, "compile_once", lambda function: function)
    changes = {"device": "cuda", "deterministic": True, "precision": precision, **METHODS[method]}
    config = replace(TRAINING, **changes)
    twin, captured = (_trained(replace(config, engine=name), 5) for name in ("compile", "graph"))
    assert torch.equal(captured.totals, twin.totals)
    assert_same_state(captured.model, state_of(twin.model))


@pytest.mark.parametrize("name", ENGINES)
def test_training_resumed_in_mid_epoch_is_bit_equal(name, tmp_path):
    where = "cuda" if name == "graph" else "cpu"
    config = replace(TRAINING, device=where, engine=name, deterministic=True)
    whole, first = _trained(config, 9), _trained(config, 4)
    (tmp_path / "state").write_bytes(pack_state(first.state_dict()))
    second = Trainer(config, data.load("digits"))
    second.load_state_dict(read_state(tmp_path / "state"))
    updates = second.epoch_updates()
    for _ in range(5):
        next(updates)
    assert_same_state(second.model, state_of(whole.model))
    assert whole.average is not None and second.average is not None
    assert_same_state(second.average, state_of(whole.average))
    assert torch.equal(second.totals, whole.totals)


def test_random_starts_of_the_kernel_are_those_of_the_attack(device, model, batch):
    generator = generator_on(device)
    seed = torch.empty((), dtype=torch.int64, device=device).random_(generator=generator_on(device))
    started = loop_on(model, *batch, generator=generator, alpha=0.0)()
    expected = kernels.random_start(batch[0], 8 / 255, seed)
    torch.testing.assert_close(started, expected, rtol=0, atol=1e-7)
