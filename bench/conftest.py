"""Fixtures of the benchmarks: rates relative to a copy, replayed rounds, tables at the end."""

import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chart
import pytest
import timing
from timing import DEVICE, ON_GPU

TABLES = pytest.StashKey[dict[str, list[dict[str, Any]]]]()
BAR = "images/s"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """On the CPU everything runs on one thread, so that machines can be compared."""
    timing.torch.set_num_threads(1)


@pytest.fixture(scope="session")
def copy_bandwidth() -> float:
    """Bytes per second that a large copy reads and writes on this device."""
    return timing.copy_bandwidth()


@pytest.fixture(scope="session")
def peak() -> Callable[[str], float]:
    """A function that returns the FLOP/s of a large matrix product in the given arithmetic."""
    known: dict[str, float] = {}

    def measured(arithmetic: str) -> float:
        if arithmetic not in known:
            known[arithmetic] = timing.matrix_peak(arithmetic)
        return known[arithmetic]

    return measured


class _Replay:
    """A clock that only advances by given seconds, to report rounds that were timed earlier.

    pytest-benchmark times the rounds of one test after another. With this clock as its timer, which
    the test advances by the seconds of its next round, pytest-benchmark records rounds that were
    interleaved with those of other tests.
    """

    __name__ = "replay"

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def rounds(self, benchmark: Any, seconds: list[float]) -> None:
        """Record `seconds` as the rounds of `benchmark`, whose timer this clock is."""
        left = iter(seconds)

        def one() -> None:
            self.now += next(left)

        benchmark.pedantic(one, rounds=len(seconds))


replay = _Replay()


@pytest.fixture
def record(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., None]:
    """Record rounds that were timed earlier, with figures that also go into the final table."""

    def file(name: str, seconds: list[float], images: int, **figures: Any) -> None:
        replay.rounds(benchmark, seconds)
        middle = statistics.median(seconds)
        row = {"name": name, "seconds": middle, BAR: images / middle, **figures}
        benchmark.extra_info.update(row, rounds_are="interleaved with the group's other tests")
        tables = request.config.stash.setdefault(TABLES, {})
        tables.setdefault(benchmark.group, []).append(row)

    return file


def selected(request: pytest.FixtureRequest, **same: Any) -> list[pytest.Item]:
    """Return the tests of this module that will run and have these parameters."""
    mine = [item for item in request.session.items if item.path == request.path]
    return [item for item in mine if same.items() <= item.callspec.params.items()]


@pytest.fixture
def measure(benchmark: Any, copy_bandwidth: float) -> Callable[..., None]:
    """Time `call`, which moves at least `size` bytes, and record its rate relative to a copy.

    A round is many calls and one wait, so that launches overlap as they do in training. For short
    GPU calls the result is therefore the rate of launches, not of the kernel.
    """

    def run(call: Callable[[], Any], size: int) -> None:
        calls = 20 if ON_GPU else 1

        def many() -> None:
            for _ in range(calls):
                call()
            timing.wait()

        benchmark.pedantic(many, rounds=15, warmup_rounds=3)
        benchmark.extra_info.update(bytes=size, copy_GB_per_s=copy_bandwidth / 1e9)
        if benchmark.stats is None:  # --benchmark-disable
            return
        rate = size * calls / benchmark.stats.stats.median
        benchmark.extra_info.update(
            calls_per_round=calls, GB_per_s=rate / 1e9, fraction_of_copy=rate / copy_bandwidth
        )

    return run


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["fastiat"] = timing.machine()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for title, rows in config.stash.get(TABLES, {}).items():
        first = max(rows, key=lambda row: row[BAR])
        columns = [row | {"of the best": row[BAR] / first[BAR]} for row in rows]
        columns.sort(key=lambda row: -row[BAR])
        terminalreporter.write_line("")
        terminalreporter.write_line(chart.text(title, columns, BAR))
        file = _folder(config) / (re.sub(r"\W+", "-", title).strip("-") + ".svg")
        chart.figure(file, title, rows, BAR)
        terminalreporter.write_line(f"chart: {file}")


def _folder(config: pytest.Config) -> Path:
    """Return the folder of charts: that of the JSON, or that of pytest-benchmark's own files."""
    json = config.getoption("benchmark_json", None)
    if not json:
        return config.rootpath / ".benchmarks"
    # A path, or with an older pytest-benchmark the file that was opened there.
    return (json if isinstance(json, Path) else Path(json.name)).parent


def describe() -> str:
    """Return the name of the device for titles."""
    return timing.torch.cuda.get_device_name() if ON_GPU else f"{DEVICE}, one thread"
