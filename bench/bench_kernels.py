"""Each op of fastiat.kernels, and the torch expression it replaces, eager and compiled.

    python -m pytest bench/bench_kernels.py --benchmark-only

"triton" is the op on CUDA and "cpu" the op on the CPU. `extra_info` has the least
bytes per second that an op moves (every operand once), also as a fraction of the rate of a copy.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from timing import DEVICE, ON_GPU
from torch import Tensor
from torch.nn import functional as F

from fastiat import kernels
from fastiat.kernels.crop_flip import crop_flip_reference

EPS, ALPHA, CLASSES, PAD = 8 / 255, 2 / 255, 10, 4
SHAPE = (3, 32, 32)
BATCHES = (64, 128, 512, 4096) if ON_GPU else (16, 64)
N = 3072  # values of an image


def plain_pgd_step(x_adv: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    moved = x_adv + ALPHA * grad.sign()
    return torch.min(torch.max(moved, x - EPS), x + EPS).clamp(0, 1)


def plain_pgd_step_l2(x_adv: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    norm = grad.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
    d = x_adv + ALPHA * grad / norm - x
    length = d.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
    return (x + d * (EPS / length).clamp_max(1)).clamp(0, 1)


def plain_random_start(x: Tensor, seed: Tensor) -> Tensor:
    return (x + (2 * torch.rand_like(x) - 1) * EPS).clamp(0, 1)


def plain_mix(x: Tensor, perm: Tensor, lam: Tensor) -> Tensor:
    return lam * x + (1 - lam) * x[perm]


def plain_standardize(x: Tensor) -> Tensor:
    centred = x - x.mean((1, 2, 3), keepdim=True)
    variance = centred.square().mean((1, 2, 3), keepdim=True)
    return centred * torch.rsqrt(variance.clamp_min(1 / (255.0**2 * N)))


def plain_cross_entropy(logits: Tensor, y_a: Tensor, y_b: Tensor, lam: Tensor) -> Tensor:
    loss_a = F.cross_entropy(logits, y_a, reduction="none")
    loss_b = F.cross_entropy(logits, y_b, reduction="none")
    return (lam * loss_a + (1 - lam) * loss_b).mean()


def images(batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.rand(batch, *SHAPE, device=DEVICE)
    x = (x * 255).to(dtype) if dtype == torch.uint8 else x.to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def attack_inputs(batch: int) -> list[Tensor]:
    return [images(batch), images(batch) - 0.5, images(batch)]


def cross_entropy_inputs(batch: int) -> list[Tensor]:
    labels = torch.randint(CLASSES, (2, batch), device=DEVICE)
    return [torch.randn(batch, CLASSES, device=DEVICE), *labels, torch.tensor(0.3, device=DEVICE)]


def crop_inputs(batch: int) -> list[Tensor]:
    dataset = torch.randint(0, 256, (10000, 32, 32, 3), dtype=torch.uint8, device=DEVICE)
    index = torch.randint(10000, (batch,), device=DEVICE)
    offsets = torch.randint(2 * PAD + 1, (2, batch), device=DEVICE)
    return [dataset, index, *offsets, torch.rand(batch, device=DEVICE) < 0.5]


class Case(NamedTuple):
    """An op, the expression it replaces, their inputs, and the least bytes an image moves."""

    op: Callable[..., Any]
    plain: Callable[..., Any]
    inputs: Callable[[int], list[Tensor]]
    forward: int
    backward: int | None = None


CASES = {
    "pgd_step": Case(
        lambda *t: kernels.pgd_step(*t, EPS, ALPHA), plain_pgd_step, attack_inputs, 16 * N
    ),
    "pgd_step_": Case(
        lambda *t: kernels.pgd_step_(*t, EPS, ALPHA), plain_pgd_step, attack_inputs, 16 * N
    ),
    "pgd_step_l2": Case(
        lambda *t: kernels.pgd_step_l2(*t, EPS, ALPHA), plain_pgd_step_l2, attack_inputs, 16 * N
    ),
    "random_start": Case(
        lambda x, seed: kernels.random_start(x, EPS, seed),
        plain_random_start,
        lambda batch: [images(batch), torch.tensor(0, device=DEVICE)],
        8 * N,
    ),
    "mix": Case(
        kernels.mix,
        plain_mix,
        lambda batch: [
            images(batch),
            torch.randperm(batch, device=DEVICE),
            torch.tensor(0.3, device=DEVICE),
        ],
        8 * N,
        8 * N,
    ),
    "standardize": Case(
        kernels.standardize, plain_standardize, lambda batch: [images(batch)], 8 * N, 12 * N
    ),
    "mixed_cross_entropy": Case(
        kernels.mixed_cross_entropy,
        plain_cross_entropy,
        cross_entropy_inputs,
        4 * CLASSES + 16,
        8 * CLASSES + 16,
    ),
    "crop_flip": Case(
        lambda *t: kernels.crop_flip(*t, PAD),
        lambda *t: crop_flip_reference(*t, PAD),
        crop_inputs,
        2 * N,
    ),
}
RUNS = [(name, "forward") for name in CASES]
RUNS += [(name, "forward+backward") for name, case in CASES.items() if case.backward]


@pytest.mark.parametrize("implementation", ["eager", "compile", "cpu", "triton"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("name", "direction"), RUNS)
def test_kernel(
    name: str, direction: str, batch: int, implementation: str, measure: Any, benchmark: Any
) -> None:
    if implementation == "triton" and not ON_GPU:
        pytest.skip("Triton kernels run on a GPU, and there is none")
    if implementation == "cpu" and ON_GPU:
        pytest.skip("the CPU path is measured on machines without a GPU")
    if implementation == "compile" and not ON_GPU and batch != BATCHES[-1]:
        pytest.skip("on the CPU compiled at one batch size, as compiling takes the most time")
    benchmark.group = f"{name} {direction} {batch}"
    torch.manual_seed(0)
    torch.set_num_threads(1)
    case = CASES[name]
    run = case.plain if implementation in ("eager", "compile") else case.op
    if implementation == "compile":
        torch.compiler.reset()
        run = torch.compile(run, fullgraph=True, dynamic=False)
    tensors = case.inputs(batch)
    if direction == "forward":
        measure(lambda: run(*tensors), case.forward * batch)
        return
    x = tensors[0].requires_grad_()
    upstream = torch.randn_like(run(*tensors))
    size = (case.forward + (case.backward or 0)) * batch
    measure(lambda: torch.autograd.grad(run(*tensors), x, upstream), size)
