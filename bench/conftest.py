"""What the benchmarks share: timing beside a copy's, rounds timed before, tables at the end."""

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
    """On the CPU all is measured on one thread, so that machines compare."""
    timing.torch.set_num_threads(1)


@pytest.fixture(scope="session")
def copy_bandwidth() -> float:
    """Bytes per second that a large copy reads and writes here."""
    return timing.copy_bandwidth()


@pytest.fixture(scope="session")
def peak() -> Callable[[str], float]:
    """FLOP per second of a large matrix product in the arithmetic that is asked for."""
    known: dict[str, float] = {}

    def measured(arithmetic: str) -> float:
        if arithmetic not in known:
            known[arithmetic] = timing.matrix_peak(arithmetic)
        return known[arithmetic]

    return measured


class _Replay:
    """A clock that moves only by the seconds it is told, for rounds that were timed before.

    pytest-benchmark times one test's rounds after the other; with this clock as its timer, which
    the test moves by its next round, it files rounds that were interleaved with other tests'.
    """

    __name__ = "replay"

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def rounds(self, benchmark: Any, seconds: list[float]) -> None:
        """File `seconds` as the rounds of `benchmark`, whose timer this is."""
        left = iter(seconds)

        def one() -> None:
            self.now += next(left)

        benchmark.pedantic(one, rounds=len(seconds))


replay = _Replay()


@pytest.fixture
def record(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., None]:
    """File rounds timed before, with figures that also go into the table at the end."""

    def file(name: str, seconds: list[float], images: int, **figures: Any) -> None:
        replay.rounds(benchmark, seconds)
        middle = statistics.median(seconds)
        row = {"name": name, "seconds": middle, BAR: images / middle, **figures}
        benchmark.extra_info.update(row, rounds_are="interleaved with the group's other tests")
        tables = request.config.stash.setdefault(TABLES, {})
        tables.setdefault(benchmark.group, []).append(row)

    return file


def selected(request: pytest.FixtureRequest, **same: Any) -> list[pytest.Item]:
    """Return the tests of this module that are to run and have these parameters."""
    mine = [item for item in request.session.items if item.path == request.path]
    return [item for item in mine if same.items() <= item.callspec.params.items()]


@pytest.fixture
def measure(benchmark: Any, copy_bandwidth: float) -> Callable[..., None]:
    """Time `call`, which moves `size` bytes at the least, and note the rate beside the copy's.

    A round is many calls and one wait, so that launches overlap as they do in training; short GPU
    calls therefore show the rate of launching, not of the kernel.
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
    """Return where charts go: beside the JSON, or where pytest-benchmark keeps its own files."""
    json = config.getoption("benchmark_json", None)
    if not json:
        return config.rootpath / ".benchmarks"
    # A path, or with an older pytest-benchmark the file that was opened there.
    return (json if isinstance(json, Path) else Path(json.name)).parent


def describe() -> str:
    """Say where something was measured, for titles."""
    return timing.torch.cuda.get_device_name() if ON_GPU else f"{DEVICE}, one thread"
