"""Seconds of the update of every method over a plain update's, rounds interleaved.

    python -m pytest bench/bench_methods.py --benchmark-only

`over plain` is the time of an update over that of a plain one in the same engine. `floor` is the
ratio of their arithmetic: `steps.PASSES` has the passes of each method. On a CPU the network is
slim and the engine eager; on a GPU the engine is graph.
"""

import statistics
from typing import Any

import pytest
import steps
import timing
from conftest import describe, replay, selected
from timing import ON_GPU

ENGINE = "graph" if ON_GPU else "eager"
ARCH, WIDTH, BATCH = "preact18", None if ON_GPU else 16, 128 if ON_GPU else 16
SECONDS = 60
METHODS = steps.METHODS | steps.LATER_METHODS


@pytest.fixture(scope="module")
def times(request: pytest.FixtureRequest) -> dict[str, list[float]]:
    """Return {method: seconds of its rounds}; plain updates are always timed."""
    chosen = {"plain", *(item.callspec.params["method"] for item in selected(request))}
    calls = {m: steps.make(m, ENGINE, ARCH, BATCH, width=WIDTH) for m in METHODS if m in chosen}
    once = request.config.getoption("benchmark_disable")
    return timing.interleaved(calls, budget=SECONDS, most=1 if once else 15, least=1)


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize("method", METHODS)
def test_update(method: str, times: dict[str, list[float]], record: Any, benchmark: Any) -> None:
    seconds = times[method]
    benchmark.group = f"update, {ARCH} width {WIDTH or 64}, batch {BATCH}, {ENGINE}, {describe()}"
    middle = statistics.median(seconds)
    input_gradient, full = timing.flops(ARCH, WIDTH)
    work = steps.flops(method, input_gradient, full)
    passes = steps.PASSES[method]
    record(
        f"{method} {ENGINE}",
        seconds,
        BATCH,
        **{
            "over plain": middle / statistics.median(times["plain"]),
            "floor": work / full,
            "training passes": passes.training,
            "attack passes": passes.attack,
            "forward passes": passes.forward,
            "rounds": len(seconds),
        },
    )
