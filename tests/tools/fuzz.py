"""Damaged and hostile files for all code that reads outside data.

Usage: `python tests/tools/fuzz.py --help`.

Every input is a damaged copy of a valid file, put where a user would have it, and the command or
function that reads it is called in a forked process with limits. It must accept
the file, or refuse it with a message of one line: no traceback, no signal, no hang, no more than
2 GB beyond what Python and torch take, nothing written outside of the run's folder or the cache,
no code of the file executed, no network. `fuzz_targets.py` has the kinds of files and their
readers, `fuzz_mutations.py` the damage.
"""

import argparse
import contextlib
import io
import json
import logging
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch
from fuzz_targets import OUTSIDE, TARGETS, RefusedError, Target, World

from fastiat import cli
from fastiat.system.errors import InputError, out_of_memory

MEMORY = 2 * 2**30
CPU_SECONDS, SECONDS = 20.0, 120.0
BATCH = 100
"""Inputs that a forked process takes before the next is forked."""


class EscapedError(BaseException):
    """An input made fastiat do something that `_Guard` forbids."""


@dataclass
class Tally:
    """The outcomes of the inputs of one target."""

    name: str
    outcomes: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    memory: int = 0
    """Most bytes resident beyond those at the start of a process."""
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        done, refused = sum(self.outcomes.values()), self.outcomes["refused"]
        return (
            f"{self.name:<16}{done:>8}{refused:>9}{self.outcomes['accepted']:>10}"
            f"{len(self.failures):>8}{self.slowest:>11.2f}{self.memory / 2**20:>10.0f}"
        )


HEAD = "target            inputs  refused  accepted  failed  slowest/s  peak/MiB"


def fuzz(inputs: int, seed: int, names: tuple[str, ...] = ()) -> list[Tally]:
    """Give `inputs` inputs to the targets, by their weights, and return a tally for each."""
    chosen = [target for target in TARGETS if not names or target.name in names]
    weights = sum(target.weight for target in chosen)
    tallies = []
    with _world(decode=inputs >= 2000) as (world, place):
        print(HEAD, flush=True)
        for target in chosen:
            count = math.ceil(inputs * target.weight / weights)
            tallies.append(_tally(world, place, target, seed, range(count)))
            print(tallies[-1], flush=True)
    return tallies


def again(seed: int, name: str, number: int, keep: Path | None) -> Tally:
    """Run one input again, and print the traceback of its exception."""
    (target,) = (target for target in TARGETS if target.name == name)
    with _world(decode=True) as (world, place):
        if keep:
            keep.write_bytes(target.make(_random(seed, target, number), world))
        return _tally(world, place, target, seed, range(number, number + 1), show=True)


@contextlib.contextmanager
def _world(decode: bool) -> Iterator[tuple[World, Path]]:
    """Make the valid files, and an empty folder for each input's copy of them."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.dont_write_bytecode = True
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name).resolve()
        with _captured(), _environment(folder):
            world = World(folder / "valid", decode)
            for target in TARGETS:
                _fresh(world, target, folder / "place")
                target.use(folder / "place" / "inside", target.valid(world), random.Random(0))
        yield world, folder / "place"


@contextlib.contextmanager
def _environment(folder: Path) -> Iterator[None]:
    before, here = dict(os.environ), Path.cwd()
    for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "FASTIAT_CACHE", "FASTIAT_DATA"):
        place = folder / "place" / "inside" / "home"
        os.environ[name] = str(place)
        place.mkdir(parents=True, exist_ok=True)
    tempfile.tempdir = None
    os.chdir(folder)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        tempfile.tempdir = None
        os.chdir(here)


def _fresh(world: World, target: Target, place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    (place / OUTSIDE).mkdir(parents=True)
    (place / OUTSIDE / "x").write_text("untouched")
    shutil.copytree(world.folder / target.needs, place / "inside", symlinks=True)
    (place / "inside" / "home").mkdir(exist_ok=True)


def _random(seed: int, target: Target, number: int) -> random.Random:
    return random.Random(f"{seed} {target.name} {number}")


def _tally(
    world: World, place: Path, target: Target, seed: int, numbers: range, show: bool = False
) -> Tally:
    tally, left = Tally(target.name), list(numbers)
    while left:
        process, pipe = _fork(world, place, target, seed, left[:BATCH], show)
        number = left[0]
        with os.fdopen(pipe) as answers:
            for line in answers:
                answer = json.loads(line)
                number = left.pop(0)
                tally.outcomes[answer["outcome"]] += 1
                tally.slowest = max(tally.slowest, answer["seconds"])
                tally.memory = max(tally.memory, answer["memory"])
                if answer["outcome"] == "failed":
                    tally.failures.append(_failure(seed, target, number, answer["why"]))
        _, status = os.waitpid(process, 0)
        if status:
            number = left.pop(0)
            why = f"exited with {status >> 8}"
            if os.WIFSIGNALED(status):
                why = f"died of {signal.Signals(os.WTERMSIG(status)).name}"
            tally.outcomes["failed"] += 1
            tally.failures.append(_failure(seed, target, number, why))
    return tally


def _failure(seed: int, target: Target, number: int, why: str) -> str:
    command = f"python tests/tools/fuzz.py --seed {seed} --again {target.name} {number}"
    return f"{target.name} {number}: {why}\n  again: {command}"


def _fork(
    world: World, place: Path, target: Target, seed: int, numbers: list[int], show: bool
) -> tuple[int, int]:
    """Fork a process that runs these inputs and writes an answer for each into a pipe."""
    sys.stdout.flush()
    reader, writer = os.pipe()
    process = os.fork()
    if process:
        os.close(writer)
        return process, reader
    try:
        os.close(reader)
        _work(world, place, target, seed, numbers, show, writer)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _work(
    world: World, place: Path, target: Target, seed: int, numbers: list[int], show: bool, out: int
) -> NoReturn:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = size + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**28, 2**28))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.fsync = lambda _: None
    errors = os.fdopen(os.dup(2), "w")
    past = os.open(place.parent / "stderr", os.O_CREAT | os.O_RDWR)
    os.dup2(past, 2)
    start = _resident()
    guard = _Guard(place / "inside")
    with _environment(place.parent):
        os.chdir(place.parent)
        for number in numbers:
            drawn = _random(seed, target, number)
            content = target.make(drawn, world)
            _fresh(world, target, place)
            begun = time.monotonic()
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            with guard:
                outcome, why = _outcome(target, place, content, drawn, errors if show else None)
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            if guard.broken:
                outcome, why = "failed", guard.broken.pop()
                guard.broken.clear()
            if os.fstat(past).st_size:
                outcome, why = "failed", f"printed past Python {os.pread(past, 200, 0)!r}"
                os.truncate(past, 0)
                os.lseek(past, 0, os.SEEK_SET)
            answer = {"outcome": outcome, "why": why, "seconds": time.monotonic() - begun}
            answer["memory"] = max(_resident() - start, 0)
            os.write(out, json.dumps(answer).encode() + b"\n")
    os._exit(0)


def _resident() -> int:
    """Return the most bytes that this process ever had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _outcome(
    target: Target, place: Path, content: bytes, drawn: random.Random, show: TextIO | None
) -> tuple[str, str]:
    error: BaseException | None = None
    outcome, why = "accepted", ""
    with _captured() as (text, raised):
        try:
            target.use(place / "inside", content, drawn)
        except InputError as refused:
            outcome, error = "refused", refused
            if not isinstance(refused, RefusedError):
                print(f"fastiat: {refused}", file=sys.stderr)
        except BaseException as failed:
            error = failed
            if show:
                traceback.print_exception(failed, file=show)
            where = traceback.extract_tb(failed.__traceback__)[-1]
            why = f"{type(failed).__name__}: {str(failed)[:200]} ({where.name}:{where.lineno})"
            outcome = "failed"
    said, complaint = (stream.getvalue() for stream in text)
    if show:
        print(outcome, why, ascii(said), ascii(complaint), file=show)
    if any(_of_memory(one) for one in (*raised, error)) or "allocate" in complaint:
        return "failed", f"asked for more than 2 GB: {complaint[:200]!r}"
    if (place / OUTSIDE / "x").read_text() != "untouched" or len(list(place.iterdir())) != 2:
        return "failed", "wrote outside"
    if outcome == "refused" and len(complaint.splitlines()) != 1:
        return "failed", f"not one line: {complaint[:300]!r}"
    if len(complaint) > 2500:
        return "failed", f"a line of {len(complaint)} characters"
    wild = {character for character in said + complaint if not _harmless(character)}
    if wild and outcome != "failed":
        return "failed", f"printed {sorted(wild)!a}"
    return outcome, why


def _harmless(character: str) -> bool:
    return character in "\n\t" or character.isprintable()


def _of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it hides, says that memory ran out."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        # A size that overflows is refused before anything is asked for.
        if out_of_memory(error) and "calculation overflowed" not in str(error):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def _captured() -> Iterator[tuple[tuple[io.StringIO, io.StringIO], list[Exception]]]:
    """Capture printed and logged text, and the errors that the command line turns into messages."""
    out, err, raised = io.StringIO(), io.StringIO(), []
    explain, handler = cli.explain, logging.StreamHandler(err)

    def noted(error: Exception) -> tuple[int | None, str]:
        raised.append(error)
        return explain(error)

    log = logging.getLogger("fastiat")
    log.addHandler(handler)
    cli.explain = noted
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield (out, err), raised
    finally:
        cli.explain = explain
        log.removeHandler(handler)


class _Guard:
    """Within the block, refuse and record actions that no input may cause."""

    FORBIDDEN = (
        *("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pty.spawn"),
        *("socket.connect", "socket.getaddrinfo", "pickle.find_class", "ctypes.dlopen"),
    )
    CHANGING = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink")
    WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def __init__(self, allowed: Path) -> None:
        self.allowed, self.on = str(allowed) + os.sep, False
        self.broken: list[str] = []
        sys.addaudithook(self.hook)

    def __enter__(self) -> None:
        self.on = True

    def __exit__(self, *_: object) -> None:
        self.on = False

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in self.FORBIDDEN:
            self.refuse(f"{event} {args[:2]!r:.200}")
        elif event in self.CHANGING or (event == "open" and (args[2] or 0) & self.WRITING):
            paths = args[:2] if event in ("os.rename", "os.link", "os.symlink") else args[:1]
            for path in paths:
                if isinstance(path, str | bytes | os.PathLike) and not self.within(path):
                    self.refuse(f"{event} {path!r}")

    def within(self, path: Any) -> bool:
        real = os.path.realpath(os.fsdecode(path))
        return (real + os.sep).startswith(self.allowed) or real == os.devnull

    def refuse(self, what: str) -> NoReturn:
        self.broken.append(what)
        raise EscapedError(what)


def main() -> int:
    """Run the command line; return 1 if an input failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--inputs", type=int, default=10_000, help="how many (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all inputs (default: 0)")
    parser.add_argument(
        "--targets", nargs="+", default=(), choices=[target.name for target in TARGETS]
    )
    parser.add_argument("--again", nargs=2, metavar=("TARGET", "N"), help="run input N again")
    parser.add_argument("--keep", type=Path, help="with --again: write the input there")
    given = parser.parse_args()
    if given.again:
        name, number = given.again
        tallies = [again(given.seed, name, int(number), given.keep)]
    else:
        begun = time.monotonic()
        tallies = fuzz(given.inputs, given.seed, tuple(given.targets))
        done = sum(sum(tally.outcomes.values()) for tally in tallies)
        print(f"{done} inputs from seed {given.seed} in {time.monotonic() - begun:.0f} s")
    failures = [failure for tally in tallies for failure in tally.failures]
    print("\n".join(failures) or "none failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
