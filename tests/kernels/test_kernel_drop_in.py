"""The kernels in two published training loops, next to the arithmetic that those loops have.

The loops with kernels are the code of docs/cookbook/kernels.md. Wong et al. 2020
(fast_adversarial) perturb normalised images by a `delta` with a radius for each channel. Rice et
al. 2020 (robust_overfitting) mix pixels, and attack and train by the mixed loss.
"""

import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

DOC = Path(__file__).parents[2] / "docs/cookbook/kernels.md"
EPS = 8 / 255


def documented(device):
    """The names that the document's loops define, on `device`."""
    names = {}
    for code in re.findall(r"^```python\n(.*?)^```$", DOC.read_text(), re.M | re.S)[1:]:
        exec(re.sub(r"(torch\.tensor\(.*?\))", rf"\1.to({device!r})", code), names)
    return names


def make(device):
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU()),
        *(nn.Flatten(), nn.Linear(4 * 36, 5)),
    )
    return net.to(device), torch.rand(6, 3, 6, 6).to(device), torch.arange(6).to(device) % 5


def both(net, ours, plain, *args):
    """Run the two updates on two copies of a network; compare examples and weights."""
    results = []
    for update in (ours, plain):
        model = deepcopy(net).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        results.append((update(model, optimizer, *args), *model.state_dict().values()))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6)
    return results[0][0]


def clamp(x, low, high):
    return torch.max(torch.min(x, high), low)


@pytest.mark.parametrize("alpha", [10 / 255, 2 / 255], ids=["train_fgsm", "train_pgd"])
def test_fast_adversarial_takes_the_step_for_its_delta_in_normalised_space(alpha, device):
    names = documented(device)
    mean, std = names["mean"], names["std"]
    epsilon, lower, upper = EPS / std, (0 - mean) / std, (1 - mean) / std
    net, pixels, y = make(device)
    x = (pixels - mean) / std
    delta = clamp((2 * torch.rand_like(x) - 1) * epsilon, lower - x, upper - x)

    def plain(model, optimizer, x, y, start, alpha):
        delta = (start - x).requires_grad_()
        F.cross_entropy(model(x + delta), y).backward()
        moved = clamp(delta.detach() + alpha * torch.sign(delta.grad), -epsilon, epsilon)
        delta = clamp(moved, lower - x, upper - x)
        optimizer.zero_grad()
        F.cross_entropy(model(x + delta), y).backward()
        optimizer.step()
        return x + delta

    x_adv = both(net, names["fast_update"], plain, x, y, x + delta, alpha / std)
    moved = ((x_adv - x) * std).abs()
    assert moved.max().item() == pytest.approx(EPS, rel=1e-4)
    assert (moved > 0.9 * EPS).float().mean() > 0.05


@pytest.mark.parametrize("lam", [0.3, "tensor"])
@pytest.mark.parametrize(("norm", "eps", "alpha"), [("linf", EPS, 2 / 255), ("l2", 0.5, 0.2)])
def test_robust_overfitting_takes_mixup_and_the_step_for_its_arithmetic(
    norm, eps, alpha, lam, device
):
    net, x, y = make(device)
    perm = torch.tensor([3, 0, 5, 1, 2, 4], device=device)
    lam = torch.tensor(0.3, device=device) if lam == "tensor" else lam
    start = torch.randn_like(x)
    if norm == "l2":
        start *= eps * 0.8 / start.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    else:
        start = (2 * torch.rand_like(x) - 1) * eps

    def criterion(logits, y_a, y_b):
        return lam * F.cross_entropy(logits, y_a) + (1 - lam) * F.cross_entropy(logits, y_b)

    def plain(model, optimizer, x, y, perm, lam, start, eps, alpha, steps, norm):
        x, y_b = lam * x + (1 - lam) * x[perm], y[perm]
        delta = clamp(start, 0 - x, 1 - x)
        for _ in range(steps):
            delta.requires_grad_()
            (grad,) = torch.autograd.grad(criterion(model(x + delta), y, y_b), delta)
            d = delta.detach()
            if norm == "linf":
                d = torch.clamp(d + alpha * torch.sign(grad), min=-eps, max=eps)
            else:
                size = grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
                d = d + alpha * grad / (size + 1e-10)
                d = d.flatten(1).renorm(2, 0, eps).view_as(d)
            delta = clamp(d, 0 - x, 1 - x)
        optimizer.zero_grad()
        criterion(model((x + delta).clamp(0, 1)), y, y_b).backward()
        optimizer.step()
        return x + delta

    x_adv = both(
        net, documented(device)["mixup_update"], plain, x, y, perm, lam, start, eps, alpha, 1, norm
    )
    d = x_adv - (lam * x + (1 - lam) * x[perm])
    size = d.abs().max() if norm == "linf" else d.flatten(1).norm(dim=1).max()
    assert 0.5 * eps < size <= eps * (1 + 1e-5)
