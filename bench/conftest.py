"""What the benchmarks share: the device, its copy bandwidth, and timing that waits for it."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


def wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


@pytest.fixture(scope="session")
def copy_bandwidth() -> float:
    """Bytes per second that a large copy reads and writes on this device: the practical ceiling."""
    source = torch.ones((1 << 30) if ON_GPU else (1 << 26), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(12):
        wait()
        start = time.perf_counter()
        target.copy_(source)
        wait()
        seconds.append(time.perf_counter() - start)
    return 2 * source.numel() / statistics.median(seconds)


@pytest.fixture
def measure(benchmark: Any, copy_bandwidth: float) -> Callable[..., None]:
    """Time `call`, which moves `size` bytes at the least, and note the rate beside the copy's.

    A round is many calls and one wait, so that launches overlap as they do in training; short GPU
    calls therefore show the rate of launching, not of the kernel.
    """

    def run(call: Callable[[], Any], size: int, device: str = DEVICE) -> None:
        calls = 20 if ON_GPU else 1

        def many() -> None:
            for _ in range(calls):
                call()
            wait()

        benchmark.pedantic(many, rounds=15, warmup_rounds=3)
        name = torch.cuda.get_device_name() if ON_GPU else "cpu"
        benchmark.extra_info.update(device=name, bytes=size, copy_GB_per_s=copy_bandwidth / 1e9)
        if benchmark.stats is None:  # --benchmark-disable
            return
        rate = size * calls / benchmark.stats.stats.median
        benchmark.extra_info.update(
            calls_per_round=calls, GB_per_s=rate / 1e9, fraction_of_copy=rate / copy_bandwidth
        )

    return run
