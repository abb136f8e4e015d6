"""Seconds of an update of `fastiat.fit` beside the same loop written by hand, rounds interleaved.

    python -m pytest bench/bench_fit.py --benchmark-only

Both train torchvision's resnet18 by IAT, mixed at the input, `layer1` and `layer2`, on images of 32
pixels without augmentation, in eager PyTorch. `over by hand` is the ratio of the medians. The loop
by hand has no metrics, checks or checkpoints. Both attack with PGD-7.
"""

import copy
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timing
import torch
from conftest import describe, replay
from steps import random_images
from timing import DEVICE
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18

from fastiat.config import TrainConfig
from fastiat.train import Trainer

BATCH = 128 if timing.ON_GPU else 16
EPS, ALPHA, STEPS = 0.03, 0.0075, 7
SECONDS = 90


def by_hand(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], object]:
    """Return a call that makes one update of a plain loop."""
    optimizer = torch.optim.SGD(
        model.parameters(), 1e-3, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=True
    )
    random = np.random.default_rng(0)

    def mixed_loss(x: Tensor, y: Tensor) -> Tensor:
        layer, lam = random.integers(3), float(random.beta(2, 2))
        perm = torch.randperm(len(x), device=x.device)

        def at(point: int, h: Tensor) -> Tensor:
            return lam * h + (1 - lam) * h[perm] if point == layer else h

        h = model.maxpool(model.relu(model.bn1(model.conv1(at(0, x)))))
        h = at(2, model.layer2(at(1, model.layer1(h))))
        logits = model.fc(model.avgpool(model.layer4(model.layer3(h))).flatten(1))
        return lam * F.cross_entropy(logits, y) + (1 - lam) * F.cross_entropy(logits, y[perm])

    def pgd(x: Tensor, y: Tensor) -> Tensor:
        model.eval()
        x_adv = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
        for _ in range(STEPS):
            x_adv.requires_grad_()
            (grad,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y, reduction="sum"), x_adv)
            x_adv = x_adv.detach() + ALPHA * grad.sign()
            x_adv = torch.clamp(torch.clamp(x_adv, x - EPS, x + EPS), 0, 1)
        model.train()
        return x_adv

    def update() -> None:
        index = torch.randint(len(images), (BATCH,), device=images.device)
        x = images[index].permute(0, 3, 1, 2).float() / 255
        y = labels[index]
        optimizer.zero_grad()
        (mixed_loss(x, y) / 2).backward()
        (mixed_loss(pgd(x, y), y) / 2).backward()
        optimizer.step()

    model.train()
    return update


@pytest.mark.benchmark(timer=replay)
def test_fit(record: Any, benchmark: Any, request: pytest.FixtureRequest) -> None:
    dataset = random_images(64 * BATCH)
    config = TrainConfig(
        arch="torchvision.models.resnet:ResNet", mix_at=("input", "layer1", "layer2"),
        batch_size=BATCH, device=str(DEVICE), engine="eager", precision="fp32", lr=1e-3,
        augment="none", epochs=10**6,
    )  # fmt: skip
    torch.manual_seed(0)
    network = resnet18(num_classes=10)
    plain = copy.deepcopy(network).to(DEVICE, memory_format=torch.channels_last)
    trainer = Trainer(config, dataset, network)
    updates = itertools.chain.from_iterable(trainer.epoch_updates() for _ in itertools.count())
    train = dataset.train
    calls: dict[str, Callable[[], object]] = {
        "fastiat.fit": lambda: next(updates),
        "by hand": by_hand(plain, train.images.to(DEVICE), train.labels.to(DEVICE)),
    }
    for call in calls.values():
        call()
    once = request.config.getoption("benchmark_disable")
    rounds = timing.interleaved(calls, budget=SECONDS, most=1 if once else 40, least=1)
    benchmark.group = f"update of resnet18 at 32 pixels, batch {BATCH}, {describe()}"
    middle = statistics.median(rounds["by hand"])
    ratio = statistics.median(rounds["fastiat.fit"]) / middle
    record("fastiat.fit", rounds["fastiat.fit"], BATCH, **{"over by hand": ratio})
    n = len(rounds["by hand"])
    print(f"\nby hand {middle:.4f} s, fastiat.fit over by hand {ratio:.4f}, n {n}")
