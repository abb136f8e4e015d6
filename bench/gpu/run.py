"""Everything that needs a GPU, in one command of at most nine minutes: `make gpu`.

    python bench/gpu/run.py [--out DIR] [--parts ceilings tests ...] [--minutes 9]

Runs the GPU tests, then measures the peak rates of the device, attack and training step of both
networks under every engine, the kernels, and a profile. It needs PyTorch 2.11 or newer and a few
packages, but no network and no installation. Every part is a process with its own time limit and
writes PART.json as it goes, so that a crash or a kill loses no finished measurement; `summary.md`
is written again after each part.

`--device cpu --tiny` rehearses everything in less than a minute; its figures mean nothing.
"""

import argparse
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from gpu.summary import summary  # noqa: E402

PARTS = {
    "ceilings": 20,
    "tests": 150,
    "preact18": 110,
    "wrn28_10": 120,
    "kernels": 75,
    "profile": 50,
}
"""Parts, the most important first, with the seconds that each may take of nine minutes."""
PACKAGES = {
    "torch": "torch",
    "numpy": "numpy",
    "safetensors": "safetensors",
    "tqdm": "tqdm",
    "pillow": "PIL",
    "pytest": "pytest",
    "hypothesis": "hypothesis",
}
"""Package names of what the measurements and the tests import, with the module names."""


def main() -> int:
    """Run the parts that were asked for; return 0 if all of them succeeded."""
    arguments = _arguments()
    missing = [name for name, module in PACKAGES.items() if not importlib.util.find_spec(module)]
    if arguments.device != "cpu" and not importlib.util.find_spec("triton"):
        missing.append("triton")
    if missing:
        print(
            f"gpu/run.py: {sys.executable} lacks {', '.join(missing)}: install them",
            file=sys.stderr,
        )
        return 2
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if arguments.only:
        return _measure(arguments)
    problem = _device_problem(arguments.device)
    if problem:
        print(f"gpu/run.py: {problem}", file=sys.stderr)
        return 2
    out = Path(arguments.out or os.environ.get("OUT") or _default_out(arguments.device))
    out.mkdir(parents=True, exist_ok=True)
    # Each part is in its own process session, so a killed command has to end the parts itself.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    started, worst = time.monotonic(), 0
    deadline = started + 60 * arguments.minutes - 5
    scale = arguments.minutes / 9
    warmers: list[subprocess.Popen[bytes]] = []
    todo = list(arguments.parts)
    try:
        while todo:
            part = todo.pop(0)
            if part == "tests":
                # Nothing is timed while the tests run, so this fills the compiler's cache.
                warmers = _warmers(arguments, out, todo)
            later = sum(PARTS[name] for name in todo) * scale
            seconds = max(deadline - time.monotonic() - later, PARTS[part] * scale)
            seconds = max(min(seconds, deadline - time.monotonic()), 1)
            print(f"gpu/run.py: {part}, at most {seconds:.0f} s", flush=True)
            worst |= _run(arguments, out, part, seconds)
            if part == "tests":
                _stop(warmers, started + (PARTS["ceilings"] + PARTS["tests"]) * scale)
            _summarise(out)
    finally:
        _stop(warmers, 0)
    print((out / "summary.md").read_text())
    print(f"gpu/run.py: {time.monotonic() - started:.0f} s, results in {out}")
    return worst


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", help="folder of results (default: $OUT or bench/results/...)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, batches and times")
    parser.add_argument("--backend", default="inductor", help="backend of torch.compile")
    # The flags with which this script starts its parts.
    parser.add_argument("--only", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    parser.add_argument("--warm", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def _measure(arguments: argparse.Namespace) -> int:
    """Run one part in this process."""
    from gpu import parts

    return parts.run(
        arguments.only,
        Path(arguments.out),
        seconds=arguments.seconds,
        tiny=arguments.tiny,
        backend=arguments.backend,
        warm=arguments.warm,
    )


def _device_problem(device: str) -> str | None:
    import torch

    version = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
    if version < (2, 11):
        return f"PyTorch is {torch.__version__}, and fastiat needs 2.11 or newer"
    if device == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA device; rehearse with --device cpu --tiny"
    return None


def _default_out(device: str) -> Path:
    name = platform.machine()
    if device == "cuda":
        import torch

        name = torch.cuda.get_device_name()
    return ROOT / "bench" / "results" / f"{date.today()}-{re.sub(r'[^A-Za-z0-9]+', '-', name)}"


def _command(arguments: argparse.Namespace, out: Path, part: str, *more: str) -> list[str]:
    command = [sys.executable, str(Path(__file__).resolve()), "--only", part, "--out", str(out)]
    command += ["--device", arguments.device, "--backend", arguments.backend, *more]
    return command + ["--tiny"] * arguments.tiny


def _run(arguments: argparse.Namespace, out: Path, part: str, seconds: float) -> int:
    """Run one part and write to its JSON how it ended; return 1 if it failed."""
    file = out / f"{part}.json"
    file.unlink(missing_ok=True)
    # The part is given less time than its limit, so that it can end before it is killed.
    command = _command(arguments, out, part, "--seconds", str(max(seconds - 8, 1)))
    begun = time.monotonic()
    child = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        status = child.wait(timeout=seconds)
        ending = "done" if status == 0 else f"failed with status {status}"
    except subprocess.TimeoutExpired:
        ending = f"stopped after {seconds:.0f} s"
    finally:
        _end(child)
    result = json.loads(file.read_text()) if file.exists() else {"part": part}
    result |= {"ending": ending, "wall_s": round(time.monotonic() - begun, 1)}
    file.write_text(json.dumps(result, indent=1))
    return int(ending != "done")


def _warmers(
    arguments: argparse.Namespace, out: Path, parts: list[str]
) -> list[subprocess.Popen[bytes]]:
    """Start processes that compile what the parts need, one for each network and batch size."""
    networks = [part for part in parts if part in ("preact18", "wrn28_10")]
    names = [(part, index) for part in networks for index in range(3)]
    names += [("kernels", 0)] * ("kernels" in parts)
    if arguments.tiny:
        names = names[:1]
    # By default each process would start as many compilers as there are cores.
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "2"}
    return [
        subprocess.Popen(
            _command(arguments, out, part, "--warm", str(index), "--seconds", "600"),
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
        for part, index in names
    ]


def _stop(processes: list[subprocess.Popen[bytes]], deadline: float) -> None:
    """Wait for the processes until `deadline` (monotonic clock) and kill those still running."""
    for process in processes:
        try:
            process.wait(timeout=max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            print(f"gpu/run.py: still compiling, stopped: {' '.join(process.args[2:])}")  # type: ignore[index]
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all processes that it started: compilers, tests."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def _summarise(out: Path) -> None:
    (out / "summary.md").write_text(summary(out))


if __name__ == "__main__":
    sys.exit(main())
