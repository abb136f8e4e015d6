"""Images per second of PGD-7 (eps 8/255, alpha 2/255, random start): fastiat beside its peers.

`pytest bench/ --benchmark-only`. The network is preact18, slim on a CPU so that a round is short;
every implementation attacks the same weights and the same images.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastiat import models
from fastiat.attack import pgd
from fastiat.device import autocast, has_fast_bf16, pick_device

EPS, ALPHA, STEPS, BATCH = 8 / 255, 2 / 255, 7, 64
DEVICE = pick_device("auto")
WIDTH = 64 if DEVICE.type == "cuda" else 16
Attack = Callable[[Tensor, Tensor], Tensor]


def _fastiat(model: nn.Module, precision: str) -> Attack:
    def attack(x: Tensor, y: Tensor) -> Tensor:
        with autocast(DEVICE, precision):
            return pgd(model, x, y, eps=EPS, alpha=ALPHA, steps=STEPS)

    return attack


def _torchattacks(model: nn.Module) -> Attack:
    peer = pytest.importorskip("torchattacks", reason="fastiat[bench] is not installed")
    return peer.PGD(model, eps=EPS, alpha=ALPHA, steps=STEPS)


def _foolbox(model: nn.Module) -> Attack:
    peer = pytest.importorskip("foolbox", reason="fastiat[bench] is not installed")
    wrapped = peer.PyTorchModel(model, bounds=(0, 1), device=DEVICE)
    attack = peer.attacks.LinfPGD(abs_stepsize=ALPHA, steps=STEPS)
    return lambda x, y: attack(wrapped, x, y, epsilons=EPS)[1]


def _naive(model: nn.Module) -> Attack:
    """The loop of many training scripts: `backward()`, weight gradients included."""

    def attack(x: Tensor, y: Tensor) -> Tensor:
        x_adv = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
        for _ in range(STEPS):
            x_adv = x_adv.detach().requires_grad_()
            F.cross_entropy(model(x_adv), y).backward()
            step = x_adv.detach() + ALPHA * x_adv.grad.sign()
            x_adv = torch.minimum(torch.maximum(step, x - EPS), x + EPS).clamp(0, 1)
        return x_adv

    return attack


IMPLEMENTATIONS: dict[str, Callable[[nn.Module], Attack]] = {
    "fastiat fp32": partial(_fastiat, precision="fp32"),
    "fastiat bf16": partial(_fastiat, precision="bf16"),
    "torchattacks": _torchattacks,
    "foolbox": _foolbox,
    "naive backward": _naive,
}


@pytest.mark.benchmark(group=f"PGD-7, preact18 width {WIDTH}, batch {BATCH}, {DEVICE.type}")
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_pgd7_throughput(benchmark, name):
    if "bf16" in name and not has_fast_bf16(DEVICE):
        pytest.skip(f"{DEVICE} has no fast bf16")
    torch.manual_seed(0)
    model = models.build("preact18", width=WIDTH).to(DEVICE, memory_format=torch.channels_last)
    x = torch.rand(BATCH, 3, 32, 32, device=DEVICE).contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (BATCH,), device=DEVICE)
    attack = IMPLEMENTATIONS[name](model.eval())

    def run() -> Tensor:
        x_adv = attack(x, y)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return x_adv

    x_adv = benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    assert (x_adv - x).abs().max() <= EPS + 1e-6
    if benchmark.stats is not None:
        benchmark.extra_info["images_per_second"] = BATCH / benchmark.stats.stats.median
