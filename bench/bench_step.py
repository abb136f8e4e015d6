"""Seconds of a training step: plain, PGD-AT and IAT under every engine, rounds interleaved.

    python -m pytest bench/bench_step.py --benchmark-only

`over plain` is the step's time over that of the plain step of the same engine; `floor` is the ratio
of their FLOP, 6.67 for IAT: 20 forward passes' worth of arithmetic against 3. On a CPU the network
is slim, so that rounds are short.
"""

import statistics
from collections.abc import Iterator
from typing import Any

import pytest
import steps
import timing
import torch
from conftest import describe, replay, selected
from timing import ON_GPU

from fastiat.engine import graphs

ENGINES = ("eager", "compile", "graph") if ON_GPU else ("eager", "compile")
ARCH, WIDTH = "preact18", None if ON_GPU else 16
BATCHES = (64, 128, 512) if ON_GPU else (16,)
SECONDS = 20
Times = dict[tuple[str, str], list[float]]


@pytest.fixture(scope="module", params=BATCHES)
def batch(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def times(request: pytest.FixtureRequest, batch: int) -> Iterator[Times]:
    """Return {(engine, method): seconds of its rounds}; plain steps are always timed."""
    chosen = [item.callspec.params for item in selected(request, batch=batch)]
    pairs = {(p["engine"], m) for p in chosen for m in ("plain", p["method"])}
    if not graphs.has_compiler(timing.DEVICE):
        pairs = {pair for pair in pairs if pair[0] != "compile"}
    calls = {pair: steps.make(pair[1], pair[0], ARCH, batch, width=WIDTH) for pair in sorted(pairs)}
    once = request.config.getoption("benchmark_disable")
    rounds = timing.interleaved(calls, budget=SECONDS, most=1 if once else 15, least=1)
    yield rounds
    torch.compiler.reset()


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize("method", steps.METHODS)
@pytest.mark.parametrize("engine", ENGINES)
def test_step(
    engine: str, method: str, batch: int, times: Times, peak: Any, record: Any, benchmark: Any
) -> None:
    if (engine, method) not in times:
        pytest.skip("torch.compile needs a C++ compiler, and there is none")
    seconds = times[engine, method]
    benchmark.group = f"step, {ARCH} width {WIDTH or 64}, batch {batch}, {describe()}"
    middle = statistics.median(seconds)
    rate = steps.flops(method, *timing.flops(ARCH, WIDTH)) * batch / middle
    record(
        f"{method} {engine}",
        seconds,
        batch,
        **{
            "CIFAR-10 epoch s": steps.CIFAR10 // batch * middle,
            "over plain": middle / statistics.median(times[engine, "plain"]),
            "floor": {"plain": 1.0, "PGD-AT": steps.FLOOR, "IAT": steps.FLOOR}[method],
            "TFLOP/s": rate / 1e12,
            "of peak": rate / peak(timing.fast_arithmetic()),
            "rounds": len(seconds),
        },
    )
