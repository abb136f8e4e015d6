"""Kill trainings with SIGKILL, at random moments and within writes, and check the files left.

    python tests/tools/torture.py --kills 100 [--seed N]     make torture KILLS=100

A training is killed several times, resumed every time, and at the end compared with a training
that was never killed: weights, checkpoint with its generators, and rows of metrics.jsonl except
times. There are three kinds of kills:

- "command": `python -m fastiat train` as a process of its own, at a random moment, its imports
  included;
- "moment": the same in a fork of this process, which has imported everything, at a random moment;
- "write": such a fork kills itself in one of its calls that write a file, drawn at random: after
  half of the bytes, or before or after the file is flushed, linked or renamed.

This process only waits, forks and compares: threads of torch would not survive a fork.
"""

import argparse
import builtins
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

# A training imports these modules when it needs them; the forks have them from here.
import fastiat.evaluate  # noqa: E402, F401
from fastiat import cli  # noqa: E402
from fastiat.runs import directory  # noqa: E402
from fastiat.runs.directory import CONFIG, LOG, METRICS, MODEL, PREVIOUS, STATE, Run  # noqa: E402
from fastiat.runs.weights import read_state  # noqa: E402
from fastiat.system import files  # noqa: E402
from fastiat.system.progress import Events  # noqa: E402
from fastiat.train import train  # noqa: E402, F401

SHARED = (
    *("--dataset", "digits", "--device", "cpu", "--steps", "2", "--lr", "0.02"),
    *("--epochs", "3", "--batch-size", "128", "--eval-limit", "40"),
)
SCENARIOS = {
    "IAT, a checkpoint every step": (
        *("--arch", "mlp6", "--width", "16", "--precision", "fp32", "--checkpoint-every", "0"),
    ),
    "modern, bf16, average and hold-out": (
        *("--preset", "modern", "--arch", "preact18", "--width", "2", "--holdout", "200"),
        *("--precision", "bf16", "--mix", "mixup", "--checkpoint-every", "0.05", "--patience", "2"),
    ),
    "no attack, checkpoints at the ends": (
        *("--arch", "preact18", "--width", "2", "--adv", "none", "--ema", "0.9", "--bn", "update"),
        *("--precision", "fp32", "--checkpoint-every", "300"),
    ),
    "FGSM on the mixed batch, bf16": (
        *("--arch", "mlp6", "--width", "16", "--adv", "fgsm", "--mix", "none"),
        *("--precision", "bf16", "--checkpoint-every", "0.01"),
    ),
}
KILLS_OF_A_RUN = 4
TIMES = {"seconds", "images_per_second"}


@dataclass
class Figures:
    """The counts of all kills; the last four fields must be zero or empty."""

    kills: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    places: Counter[str] = field(default_factory=Counter)
    """What the killed processes were doing, as the run directory shows (`place`)."""
    resumes: int = 0
    runs: int = 0
    """Trainings that were finished and compared with uninterrupted ones."""
    repeats: int = 0
    """Uninterrupted trainings that were run twice, in two processes, and compared."""
    seconds: float = 0.0
    unreadable: int = 0
    """Checkpoints that did not load after a kill."""
    lost: int = 0
    doubled: int = 0
    """Rows of metrics.jsonl that are missing, or there twice, after the last resume."""
    failures: list[str] = field(default_factory=list)
    """Messages about these and all other differences and errors."""

    @property
    def good(self) -> bool:
        return not (self.unreadable or self.lost or self.doubled or self.failures)


def fork(argv: list[str], log: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """Run the command in a child and return its process id; its output is appended to `log`."""
    child = os.fork()
    if child:
        return child
    status = 99
    try:
        opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, 1)
        os.dup2(opened, 2)
        prepare()
        status = cli.main(argv)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(child: int) -> int:
    """Return how a child ended: its exit status, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying_in_a_write(call: int) -> Callable[[], None]:
    """Return a function after which a process kills itself in its `call`-th call that writes."""
    calls = iter(range(1, sys.maxsize))

    def counted(function: Any, before: bool) -> Any:
        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            now = next(calls) == call
            if now and before:
                die()
            result = function(*arguments, **keywords)
            if now:
                die()
            return result

        return wrapped

    def opening(file: Any, mode: str = "r", *rest: Any, **keywords: Any) -> Any:
        opened = builtins.open(file, mode, *rest, **keywords)  # noqa: SIM115
        if mode in ("wb", "ab"):
            write = opened.write

            def write_half(content: Any) -> int:
                if next(calls) == call:
                    write(content[: len(content) // 2])
                    opened.flush()
                    die()
                return write(content)

            opened = _Writing(opened, write_half)
        return opened

    def prepare() -> None:
        directory.open = files.open = opening  # type: ignore[attr-defined]
        for name in ("fsync", "replace", "link"):
            setattr(os, name, counted(getattr(os, name), before=call % 2 == 0))

    return prepare


class _Writing:
    """A file whose `write` is another function."""

    def __init__(self, file: Any, write: Callable[[Any], int]) -> None:
        self._file, self.write = file, write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_Writing":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def times(out: Path) -> list[int]:
    """Return when each file of a run was last written."""
    return [file.stat().st_mtime_ns for file in sorted(out.glob("*")) + sorted(out.glob(".*"))]


def place(out: Path, before: list[int]) -> str:
    """Return what a killed process was doing, by its files and by `times` before it started."""
    if times(out) == before:
        return "importing or reading data"
    if not (out / CONFIG).exists():
        return "making the run"
    half = sorted(file.name.split(".")[1] for file in out.glob(".*.*.*"))
    if half:
        return f"writing {half[0]}"
    if not any((out / name).exists() for name in (STATE, PREVIOUS)):
        return "before the first checkpoint"
    metrics, log = (read(out / name) for name in (METRICS, LOG))
    if metrics and not metrics.endswith("\n"):
        return "writing metrics"
    return "measuring" if "trained" in log else "training"


def read(file: Path) -> str:
    return file.read_text(errors="replace") if file.exists() else ""


def rows_of(out: Path) -> list[str]:
    """Return the rows of metrics.jsonl without times; an unfinished last line is left out."""
    if not (out / METRICS).exists():
        return []
    lines = (out / METRICS).read_text().split("\n")[:-1]
    rows = [json.loads(line) for line in lines]
    return [json.dumps({k: v for k, v in row.items() if k not in TIMES}) for row in rows]


def equal(a: Any, b: Any) -> bool:
    """Whether two nests of tensors are bit-equal."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def compare(found: Figures, name: str, whole: Path, other: Path) -> None:
    """Count the differences between a run that was never killed and another."""
    rows, others = Counter(rows_of(whole)), Counter(rows_of(other))
    found.lost += (rows - others).total()
    found.doubled += (others - rows).total()
    if rows_of(whole) != rows_of(other):
        found.failures.append(f"{name}: {other} has other rows than {whole}")
    if not equal(load_file(whole / MODEL), load_file(other / MODEL)):
        found.failures.append(f"{name}: {other} has other weights than {whole}")
    a, b = (read_state(folder / STATE) for folder in (whole, other))
    wrong = [key for key in a.keys() | b.keys() if not equal(a.get(key), b.get(key))]
    if wrong:
        found.failures.append(f"{name}: {other} has another {', '.join(wrong)} than {whole}")


def check_left(found: Figures, out: Path) -> None:
    """Read all files that a kill has left, and record those that cannot be read."""
    if not (out / CONFIG).exists():
        return
    try:
        opened = Run.open(out)
        rows_of(out)
    except ValueError as error:
        found.failures.append(f"{out} is damaged: {error}")
        return
    for name in (STATE, PREVIOUS):
        if (out / name).exists():
            try:
                opened._read_state(out / name)
            except Exception as error:
                found.unreadable += 1
                found.failures.append(f"{out / name} cannot be read: {error}")


def torture(kills: int, seed: int, folder: Path, scenarios: int = len(SCENARIOS)) -> Figures:
    """Kill trainings of the first scenarios in `folder` this many times; return the counts."""
    found, draw, begun = Figures(), random.Random(seed), time.monotonic()
    whole: dict[str, tuple[Path, float]] = {}
    number = 0
    while found.kills < kills and not found.failures:
        name = list(SCENARIOS)[number % scenarios]
        if name not in whole:
            whole[name] = _undisturbed(found, name, folder)
        _kill_one_training(found, name, *whole[name], folder / f"run{number}", draw, kills)
        number += 1
    found.seconds = round(time.monotonic() - begun, 1)
    return found


def _flags(name: str) -> list[str]:
    return ["train", *SHARED, *SCENARIOS[name]]


def _undisturbed(found: Figures, name: str, folder: Path) -> tuple[Path, float]:
    """Train twice in two processes, compare, and return a run and the seconds that it took."""
    outs = [folder / f"whole{list(SCENARIOS).index(name)}{which}" for which in "ab"]
    for out in outs:
        started = time.monotonic()
        status = wait(fork([*_flags(name), "--out", str(out)], folder / "log"))
        if status != 0:
            raise RuntimeError(f"{name} ended with {status}: see {folder / 'log'}")
    compare(found, f"{name}, repeated", *outs)
    found.repeats += 1
    return outs[0], time.monotonic() - started


def _kill_one_training(
    found: Figures,
    name: str,
    whole: Path,
    seconds: float,
    out: Path,
    draw: random.Random,
    kills: int,
) -> None:
    """Kill and resume one training up to `KILLS_OF_A_RUN` times, let it end, compare it."""
    log, last = out.with_suffix(".log"), min(found.kills + KILLS_OF_A_RUN, kills)
    while True:
        argv = [*_flags(name), "--out", str(out)]
        if (out / CONFIG).exists():
            argv = ["train", "--resume", "--out", str(out)]
            found.resumes += 1
        kind, before = "none", times(out)
        if found.kills < last:
            kind = draw.choices(["command", "moment", "write"], [1, 2, 4])[0]
        if kind == "command":
            with builtins.open(log, "ab") as opened:
                process = subprocess.Popen(
                    [sys.executable, "-m", "fastiat", *argv],
                    cwd=ROOT, stdout=opened, stderr=opened,
                )  # fmt: skip
            try:
                status = process.wait(draw.uniform(0, START_UP + seconds))
            except subprocess.TimeoutExpired:
                process.kill()
                status = process.wait()
        elif kind == "write":
            # The first calls create the run; not every training makes as many as 120.
            status = wait(fork(argv, log, dying_in_a_write(int(draw.triangular(1, 120, 1)))))
        else:
            child = fork(argv, log)
            if kind == "moment":
                time.sleep(draw.uniform(0, seconds))
                os.kill(child, signal.SIGKILL)
            status = wait(child)
        if status == -signal.SIGKILL:
            found.kills += 1
            found.kinds[kind] += 1
            found.places[place(out, before)] += 1
            check_left(found, out)
        elif status != 0:
            found.failures.append(f"{name}: {' '.join(argv)} ended with {status}: see {log}")
            return
        else:
            found.runs += 1
            compare(found, name, whole, out)
            return


START_UP = 4.0
"""About the seconds that a command takes for its imports."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="number of kills (default: 100)")
    parser.add_argument("--seed", type=int, help="seed of the kills (default: random, printed)")
    parser.add_argument("--scenarios", type=int, default=len(SCENARIOS), help="how many to use")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    arguments = parser.parse_args()
    seed = random.randrange(10**6) if arguments.seed is None else arguments.seed
    torch.set_num_threads(1)
    # This imports tensorboard here, once, instead of in every fork.
    Events(lambda *_: None, 0)
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    found = torture(arguments.kills, seed, folder, arguments.scenarios)
    if found.good:
        shutil.rmtree(folder)
    if arguments.json:
        print(json.dumps(vars(found)))
    else:
        print(f"seed {seed}")
        for name, value in vars(found).items():
            print(f"{name}: {dict(value) if isinstance(value, Counter) else value}")
    return 0 if found.good else 1


if __name__ == "__main__":
    sys.exit(main())
