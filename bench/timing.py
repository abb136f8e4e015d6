"""Shared by all benchmarks: the device, its peak rates, synchronised timing, FLOP counts."""

import importlib.metadata
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastiat import models
from fastiat.engine.device import has_fast_bf16

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    *("torch", "torchvision", "triton", "numpy", "pytest", "pytest-benchmark"),
    *("torchattacks", "foolbox", "adversarial-robustness-toolbox"),
)
SHORTEST = 0.05
"""Least seconds of a timed interval on a GPU: the wait at its end is then negligible."""


def wait() -> None:
    """Wait until the device has finished all work."""
    if ON_GPU:
        torch.cuda.synchronize()


def timed(call: Callable[[], object], times: int = 1) -> float:
    """Return the mean seconds of `times` calls, with one wait at the end."""
    wait()
    start = time.perf_counter()
    for _ in range(times):
        call()
    wait()
    return (time.perf_counter() - start) / times


def interleaved(
    calls: Mapping[Any, Callable[[], object]],
    *,
    budget: float,
    least: int = 3,
    most: int = 15,
    shortest: float = SHORTEST,
) -> dict[Any, list[float]]:
    """Time every call once per round, in a new order each round; return the seconds of each.

    A slow phase of the machine then slows all calls. There are at most `most` rounds; they end
    after `budget` seconds, but not before `least` rounds. Every call has to be warm.
    """
    times = dict.fromkeys(calls, 1)
    if ON_GPU:
        times = {name: math.ceil(shortest / timed(call)) for name, call in calls.items()}
    rounds: dict[Any, list[float]] = {name: [] for name in calls}
    order, names = random.Random(0), list(calls)
    started = time.perf_counter()
    for done in range(1, most + 1):
        order.shuffle(names)
        for name in names:
            rounds[name].append(timed(calls[name], times[name]))
        spent = time.perf_counter() - started
        if done >= least and spent * (done + 1) / done > budget:
            break
    return rounds


def copy_bandwidth() -> float:
    """Return the bytes per second that a large copy reads and writes on this device."""
    source = torch.ones((1 << 30) if ON_GPU else (1 << 26), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / statistics.median(
        timed(lambda: target.copy_(source), 20 if ON_GPU else 1) for _ in range(12)
    )  # fmt: skip


def matrix_peak(arithmetic: str, size: int | None = None) -> float:
    """Return the FLOP/s of a large square matrix product in "bf16", "fp32" or "tf32".

    The rates of convolutions are compared with it. On a CPU it is the rate of torch's threads.
    """
    size = size or (8192 if ON_GPU else 2048)
    dtype = torch.bfloat16 if arithmetic == "bf16" else torch.float32
    a, b = torch.randn(2, size, size, device=DEVICE).to(dtype)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = arithmetic == "tf32"
    try:
        seconds = [timed(lambda: a @ b, 5 if ON_GPU else 1) for _ in range(8)]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return 2 * size**3 / statistics.median(seconds[2:])


@cache
def flops(
    arch: str, width: int | None = None, shape: tuple[int, int, int] = (3, 32, 32)
) -> tuple[int, int]:
    """Return the FLOP per image of one PGD step and of one plain training step.

    The first is a forward pass with the input gradient, the second one with all gradients. A
    multiplication and an addition count as two.
    """
    channels, size, _ = shape
    model = models.build(arch, 10, channels, size, width).eval()
    x = torch.rand(1, *shape)

    def count(inputs: list[torch.Tensor]) -> int:
        with FlopCounterMode(display=False) as counter:
            # The counter misses the gradient of a leaf tensor that is the network's own argument.
            torch.autograd.grad(model(x.clone()).sum(), inputs)
        return counter.get_total_flops()

    full = count(list(model.parameters()))
    x.requires_grad_()
    return count([x]), full


def build(arch: str, width: int | None = None) -> nn.Module:
    """Return a network with the weights of seed 0, in eval mode, channels-last on the device."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = models.build(arch, width=width)
    return model.to(DEVICE, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


def fast_arithmetic() -> str:
    """Return the arithmetic that fastiat uses on this device."""
    return "bf16" if has_fast_bf16(DEVICE) else "fp32"


def plain_arithmetic() -> str:
    """Return the arithmetic of PyTorch's fp32 convolutions by default: TF32 on CUDA."""
    return "tf32" if ON_GPU else "fp32"


def pytorch_defaults() -> None:
    """Set PyTorch's global flags to their defaults, with cuDNN's benchmark mode on."""
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True


def machine() -> dict[str, Any]:
    """Return the facts that identify a measurement: device, driver, versions, commit, command.

    $FASTIAT_COMMIT names the commit of a copy that has no git history.
    """
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if ON_GPU else "cpu",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": os.environ.get("FASTIAT_COMMIT")
        or _output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "changed_files": _output("git", "-C", str(ROOT), "status", "--porcelain"),
        "packages": {name: _version(name) for name in PACKAGES},
    }
    if ON_GPU:
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return found


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
