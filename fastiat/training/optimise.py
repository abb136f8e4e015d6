"""How weights follow their gradients: the learning rate, SGD, and the average of the weights."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastiat.config import TrainConfig


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of update `step`, counted from 0.

    "step": section 4.1's drops at epochs 100 and 150 of 200, in proportion. "cosine": linear up
    over the first tenth of the updates, then half a cosine down to zero.
    """
    total = config.epochs * steps_per_epoch
    if config.schedule == "step":
        drops = (2 * step >= total) + (4 * step >= 3 * total)
        return config.lr * 0.1**drops
    warm = total / 10
    if step < warm:
        return config.lr * (step + 1) / (warm + 1)
    return config.lr * (1 + math.cos(math.pi * (step - warm) / (total - warm))) / 2


def make_sgd(model: nn.Module, config: TrainConfig, lr: Tensor) -> torch.optim.SGD:
    """Return the optimizer of section 4.1, its momentum there from the start as zeros.

    `lr` is a tensor on the model's device, as a captured graph would hold on to a number.
    """
    optimizer = torch.optim.SGD(
        _parameter_groups(model, config),
        lr=lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        fused=True,
    )
    if config.momentum:
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Split off BatchNorm parameters and biases where they are not to decay."""
    named = list(model.named_parameters())
    if config.decay_norm:
        return [{"params": [p for _, p in named], "weight_decay": config.weight_decay}]
    return [
        {"params": [p for _, p in named if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for _, p in named if p.dim() <= 1], "weight_decay": 0.0},
    ]


@torch.no_grad()
def move_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move the average towards the model, buffers too; early steps count more, so that the start
    is soon forgotten.
    """
    decay = min(decay, (1 + step) / (10 + step))
    pairs = list(zip(average.state_dict().values(), model.state_dict().values(), strict=True))
    values = [pair for pair in pairs if pair[0].is_floating_point()]
    counts = [pair for pair in pairs if not pair[0].is_floating_point()]
    torch._foreach_lerp_([old for old, _ in values], [new for _, new in values], 1 - decay)
    for old, new in counts:
        old.copy_(new)
