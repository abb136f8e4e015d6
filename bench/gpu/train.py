"""Train IAT on an image tree for a number of minutes and measure it: `make gpu-train`.

    python bench/gpu/train.py --data-dir DIR --out DIR [--minutes 25] [--session 9] [FLAG ...]

The first session measures the time of an epoch and chooses the number of epochs that fits into
`--minutes`. A session ends after `--session` minutes with a checkpoint; the same command continues
until the training has ended and is measured (no attack and PGD-20). Other flags are those of
`fastiat train`. DIR/gpu_train.json has the times, the number of epochs, the sessions and the
errors; DIR/run is the run directory.
"""

import argparse
import gc
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import timing  # noqa: E402

from fastiat import cli, data  # noqa: E402
from fastiat.config import TrainConfig  # noqa: E402
from fastiat.runs.directory import LOG, METRICS, PREVIOUS, STATE  # noqa: E402
from fastiat.runs.weights import read_state  # noqa: E402
from fastiat.system.errors import InputError  # noqa: E402
from fastiat.train import Trainer  # noqa: E402

ATTACKS = ("none", "pgd-20")
TO_STOP = 40.0
"""Seconds before a session's end at which the training is asked for its checkpoint."""


def main() -> int:
    """Run one session; return 0 unless something failed."""
    arguments, flags = _arguments()
    started = time.monotonic()
    out = Path(arguments.out).resolve()
    run, report = out / "run", out / "gpu_train.json"
    common = ["--dataset", "folder", "--data-dir", str(Path(arguments.data_dir).resolve())]
    common += ["--device", arguments.device]
    try:
        if report.exists():
            found = json.loads(report.read_text())
        else:
            argv = ["train", *common, *flags]
            _, config = cli.parse(argv)
            assert isinstance(config, TrainConfig)
            found = {"machine": timing.machine(), "argv": argv, "minutes": arguments.minutes}
            if "--epochs" in flags:
                found["epochs"] = config.epochs
            else:
                found |= _plan(config, arguments.minutes, arguments.session)
            found["sessions"] = []
    except InputError as error:
        print(f"gpu/train.py: {error}", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    write_report(report, found)
    left = 60 * arguments.session - (time.monotonic() - started)
    if (run / STATE).exists() or (run / PREVIOUS).exists():
        command = ["train", "--resume", "--out", str(run), "--data-dir", common[3]]
    else:
        # A training that was killed before its first checkpoint may have left files.
        shutil.rmtree(run, ignore_errors=True)
        command = [*found["argv"], "--epochs", str(found["epochs"]), "--out", str(run)]
    status = run_fastiat(command, left - TO_STOP, run / LOG)
    found["sessions"].append(
        {
            "ended": {0: "trained", 128 + signal.SIGTERM: "stopped"}.get(status, "failed"),
            "seconds": round(time.monotonic() - started, 1),
            "step": _step(run),
            "last_epoch": (read_rows(run, "epoch") or [None])[-1],
        }
    )
    write_report(report, found)
    if status == 128 + signal.SIGTERM:
        print("gpu/train.py: the session is over; run the same command to continue", flush=True)
        return 0
    if status != 0:
        return 1
    # `fastiat train` also measures, unless the session ended before that.
    missing = [attack for attack in ATTACKS if attack not in _errors(run)]
    if missing:
        left = 60 * arguments.session - (time.monotonic() - started)
        command = ["evaluate", str(run), *common, "--attacks", *missing]
        status = run_fastiat(command, left, run / METRICS)
    found["errors"] = _errors(run)
    found["measured"] = all(attack in found["errors"] for attack in ATTACKS)
    write_report(report, found)
    if not found["measured"]:
        print("gpu/train.py: trained, but not measured in time; run the same command again")
    return int(status not in (0, 128 + signal.SIGTERM, -signal.SIGTERM))


def _arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--data-dir", required=True, help="tree of train/CLASS/*, test/CLASS/*")
    parser.add_argument("--out", required=True, help="folder of the run and its report")
    parser.add_argument("--minutes", type=float, default=25.0, help="minutes of all sessions")
    parser.add_argument("--session", type=float, default=9.0, help="minutes of this session")
    parser.add_argument("--device", default="cuda")
    return parser.parse_known_args()


def _plan(config: TrainConfig, minutes: float, session: float) -> dict[str, Any]:
    """Time an epoch of the training and return how many of them fit into `minutes`."""
    measured = _timed(config)
    gc.collect()
    if timing.ON_GPU:
        timing.torch.cuda.empty_cache()
    # Each session has a start-up and ends early; this measurement had a start-up too.
    sessions = math.ceil(minutes / session)
    usable = 60 * minutes - (sessions + 1) * measured["start_up_s"] - sessions * TO_STOP
    return {"epochs": max(int(usable / measured["epoch_s"]), 1), **measured}


def _timed(config: TrainConfig) -> dict[str, float]:
    """Return the seconds of a start-up, an update and an epoch, and images per second."""
    begun = time.monotonic()
    trainer = Trainer(config, data.load(config.dataset, config.data_dir))
    per_epoch = len(trainer.loader)
    updates = trainer.epoch_updates()
    # After 20 draws every mix layer has been compiled and captured, almost surely.
    for _ in range(min(20, per_epoch)):
        next(updates)
    trainer.validate({})
    start_up = time.monotonic() - begun
    calls, limit = 0, time.monotonic() + 20
    timing.wait()
    first = time.perf_counter()
    while calls < 300 and time.monotonic() < limit:
        if next(updates, None) is None:
            updates = trainer.epoch_updates()
            continue
        calls += 1
    timing.wait()
    step = (time.perf_counter() - first) / calls
    epoch = per_epoch * step + timing.timed(lambda: trainer.validate({}))
    return {
        "start_up_s": start_up,
        "step_s": step,
        "epoch_s": epoch,
        "images_per_s": config.batch_size / step,
    }


def run_fastiat(argv: list[str], seconds: float, begun: Path) -> int:
    """Run a command of fastiat and return its status.

    It gets SIGTERM after `seconds`, but not before the file `begun` has grown: until then it has no
    result that a later session could continue from.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    before = begun.stat().st_size if begun.exists() else 0
    child = subprocess.Popen(
        [sys.executable, "-m", "fastiat", *argv], env=os.environ | {"PYTHONPATH": path}
    )
    deadline = time.monotonic() + seconds
    under_way = False
    while child.poll() is None:
        if time.monotonic() > deadline and under_way:
            child.terminate()
            break
        under_way = begun.exists() and begun.stat().st_size > before
        time.sleep(0.5)
    try:
        return child.wait(timeout=TO_STOP)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


def read_rows(run: Path, kind: str) -> list[dict[str, Any]]:
    """Return the rows of one kind ("epoch", "evaluation") of a run's metrics.jsonl."""
    file = run / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [row for row in rows if row["kind"] == kind]


def _errors(run: Path) -> dict[str, dict[str, Any]]:
    keys = ("error_percent", "interval_95_percent", "n")
    return {row["attack"]: {k: row[k] for k in keys} for row in read_rows(run, "evaluation")}


def _step(run: Path) -> int | None:
    """Return the step of the checkpoint."""
    file = run / STATE
    return read_state(file)["step"] if file.exists() else None


def write_report(file: Path, found: dict[str, Any]) -> None:
    """Write JSON to a file beside `file` and rename it, so that a kill leaves a whole file."""
    beside = file.with_suffix(".part")
    beside.write_text(json.dumps(found, indent=1))
    os.replace(beside, file)


if __name__ == "__main__":
    sys.exit(main())
