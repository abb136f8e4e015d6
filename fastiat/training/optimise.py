"""The optimizer: learning rate, SGD, and the moving average of the weights."""

import math

import torch
from torch import Tensor, nn

from fastiat.config import TrainConfig
from fastiat.models import running_statistics


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of update `step`, counted from 0.

    Schedule "step": the rate is divided by 10 after 1/2 and again after 3/4 of the updates, as in
    section 4.1 of the paper (after epochs 100 and 150 of 200). Schedule "cosine": linear warm-up
    over the first tenth of the updates, then half a cosine period down to zero.
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
    """Return the optimizer of section 4.1 of the paper: SGD with momentum.

    `lr` is a scalar tensor on the model's device, which the caller fills before each update. A
    captured graph would keep a Python number as it was at the capture, but reads a tensor anew. The
    momentum buffers exist, as zeros, from the start, so that every replay of a captured graph
    updates the same tensors.
    """
    parameters = list(model.parameters())
    # Weight decay without `decay_norm` spares BatchNorm parameters and biases: those have one
    # dimension.
    decayed = [p for p in parameters if config.decay_norm or p.dim() > 1]
    spared = [p for p in parameters if not config.decay_norm and p.dim() <= 1]
    groups = [(decayed, config.weight_decay), (spared, 0.0)]
    optimizer = torch.optim.SGD(
        [{"params": params, "weight_decay": decay} for params, decay in groups if params],
        lr=lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        fused=True,
    )
    if config.momentum:
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


@torch.no_grad()
def move_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Update the exponential moving average of weights and running statistics, in place.

        average = d average + (1 - d) model,  d = min(`decay`, (1 + step) / (10 + step))

    `step` counts the updates from 1. Other buffers, such as counters and masks, are copied.
    """
    # d is smaller at the start, so that the average soon forgets the initial weights.
    decay = min(decay, (1 + step) / (10 + step))
    # `parameters` gives a weight that has several names once.
    old, new = ([*net.parameters(), *running_statistics(net)] for net in (average, model))
    torch._foreach_lerp_(old, new, 1 - decay)
    averaged = {id(tensor) for tensor in old}
    for kept, buffer in zip(average.buffers(), model.buffers(), strict=True):
        if id(kept) not in averaged:
            kept.copy_(buffer)
