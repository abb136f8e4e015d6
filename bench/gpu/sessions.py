"""First results on a GPU: a speed run, Table 3, AutoAttack and a diagnosis: `make gpu-results`.

    python bench/gpu/sessions.py --data-dir DIR --out DIR [--session 9] [--epochs 20]

DIR is an image tree; for the paper's table it is that of CIFAR-10. It runs those of these
stages that are not finished, in this order:

- speed: `--preset modern`, with more epochs in every try, until PGD-50 with 10 restarts at
  eps 8/255 has an error of 54 % or less (Wong et al. 2020, "Fast is better than free"). The time
  is that of the whole process, with compiling;
- table3: `fastiat reproduce table3`, the paper's recipe with the schedule scaled to `--epochs`;
- autoattack, diagnose: of adversarial training and of both rows of IAT, on 1,000 test images.

A session ends after `--session` minutes, and a training writes a checkpoint; the same command
continues. A stage that fails is recorded, and the next stages still run. DIR/gpu_results.json has
the results, the machine and the commands.

At the end figures.tar.gz, all files of the runs except weights and checkpoints, is written to
DIR/keep, and to $OUT if it is set, beside the newest checkpoint in parts of 15 MiB. On another
machine `--restore FOLDER` puts both back into DIR before the first stage.
`--device cpu --tiny` rehearses everything.
"""

import argparse
import json
import os
import shutil
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import timing  # noqa: E402
from gpu.train import TO_STOP, read_rows, run_fastiat, write_report  # noqa: E402

from fastiat.runs.directory import CONFIG, LOG, METRICS, STATE  # noqa: E402

MARK = 54.0
"""PGD-50-10 error in % that ends the speed run."""
SPEED_EPOCHS = (6, 9, 13, 18)
ATTACKED = ("pgd-none", "pgd-mixup", "pgd-manifold")
"""The adversarially trained rows of Table 3, as run directories name them."""
KEPT = ("*.json", "*.jsonl", "*.md", "*.csv", LOG)
FIGURES, CHECKPOINT = "figures.tar.gz", "checkpoint.tar"
PART, MOST_PARTS = 15 << 20, 7
"""Size in bytes of a part of the checkpoint, and how many parts are written at most: a machine that
is lent may return eight files of less than 16 MiB."""


class StageFailedError(Exception):
    """A command of a stage has failed."""


class Session:
    """The time limit of this session, and the results of all sessions."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.deadline = time.monotonic() + 60 * arguments.session
        self.out = Path(arguments.out).resolve()
        self.report = self.out / "gpu_results.json"
        self.data = ["--data-dir", str(Path(arguments.data_dir).resolve())]
        self.machine = ["--device", arguments.device]
        self.found: dict[str, Any] = {"machine": timing.machine(), "speed": [], "commands": []}
        if self.report.exists():
            self.found = json.loads(self.report.read_text())

    def fastiat(self, argv: list[str], begun: Path) -> bool:
        """Run a command, record it, and return whether it succeeded within the session."""
        left = self.deadline - TO_STOP - time.monotonic()
        if left <= 0:
            return False
        started = time.monotonic()
        status = run_fastiat(argv, left, begun)
        seconds = round(time.monotonic() - started, 2)
        self.found["commands"].append({"argv": argv, "status": status, "seconds": seconds})
        write_report(self.report, self.found)
        if status not in (0, 143, -15):
            raise StageFailedError(f"status {status}: {' '.join(argv)}")
        return status == 0

    def speed(self) -> bool:
        """Try longer trainings until one reaches the mark; return whether this is done."""
        tiny = ["--arch", "mlp6", "--width", "8", "--batch-size", "8"] if self.tiny else []
        for epochs in SPEED_EPOCHS[:1] if self.tiny else SPEED_EPOCHS:
            run = self.out / f"speed-{epochs}"
            tried = next((t for t in self.found["speed"] if t["epochs"] == epochs), None)
            if tried is None:
                # A whole training is timed, so a training that was cut short starts anew.
                shutil.rmtree(run, ignore_errors=True)
                flags = ["--preset", "modern", "--epochs", str(epochs), *tiny]
                flags += ["--holdout", "0", "--patience", "0", "--dataset", "folder", *self.data]
                started = time.monotonic()
                if not self.fastiat(["train", *flags, *self.machine, "--out", str(run)], run / LOG):
                    return False
                tried = {"epochs": epochs, "wall_s": round(time.monotonic() - started, 2)}
                tried["epochs_s"] = sum(row["seconds"] for row in read_rows(run, "epoch"))
                self.found["speed"].append(tried)
            if "errors" not in tried:
                attack = ["--attacks", "none", "pgd-50", "--restarts", "1" if self.tiny else "10"]
                attack += ["--eps", "8/255", "--alpha", "2/255"]
                argv = ["evaluate", str(run), *self.data, *self.machine, *attack]
                if not self.fastiat(argv, run / METRICS):
                    return False
                tried["errors"] = _errors(run)
                write_report(self.report, self.found)
            if tried["errors"]["pgd-50"]["error_percent"] <= MARK:
                break
        return True

    def table3(self) -> bool:
        """Train and measure the six rows; return whether this is done."""
        argv = ["reproduce", "table3", "--dataset", "folder", *self.data, *self.machine]
        argv += ["--epochs", str(self.arguments.epochs), "--splits", "test"]
        argv += ["--arch", "mlp6", "--width", "8"] if self.tiny else []
        out = self.out / "table3"
        return self.fastiat([*argv, "--out", str(out)], out)

    def autoattack(self) -> bool:
        """Run AutoAttack on the adversarially trained rows; return whether this is done."""
        return all(
            "autoattack" in _errors(run)
            or self.fastiat(
                ["evaluate", str(run), *self.data, *self.machine, *self.limit, "--autoattack"],
                run / METRICS,
            )
            for run in self.attacked
        )

    def diagnose(self) -> bool:
        """Diagnose the adversarially trained rows; return whether this is done."""
        return all(
            (run / "diagnosis.json").exists()
            or self.fastiat(["diagnose", str(run), *self.data, *self.machine, *self.limit], run)
            for run in self.attacked
        )

    @property
    def tiny(self) -> bool:
        """Whether this is a rehearsal."""
        return bool(self.arguments.tiny)

    @property
    def limit(self) -> list[str]:
        """The flag for the number of test images of AutoAttack and the diagnosis."""
        return ["--limit", "8" if self.tiny else "1000"]

    @property
    def attacked(self) -> list[Path]:
        """The runs that AutoAttack and the diagnosis measure."""
        runs = [file.parent for file in (self.out / "table3").glob("*/" + CONFIG)]
        attacked = sorted(run for run in runs if any(name in run.name for name in ATTACKED))
        if len(attacked) < len(ATTACKED):
            raise StageFailedError("Table 3 is not trained: run --stages table3 first")
        return attacked[:1] if self.tiny else attacked

    def run(self, stages: Sequence[str]) -> tuple[str | None, list[str]]:
        """Run the stages; return the first that is not finished, and those that have failed."""
        failed = []
        for stage in stages:
            try:
                if not getattr(self, stage)():
                    return stage, failed
            except StageFailedError as error:
                print(f"gpu/sessions.py: {stage} failed: {error}", file=sys.stderr)
                failed.append(stage)
        return None, failed

    def keep(self) -> None:
        """Write the figures and the newest checkpoint to DIR/keep and $OUT."""
        here = self.out / "keep"
        here.mkdir(exist_ok=True)
        with tarfile.open(here / FIGURES, "w:gz") as archive:
            for file in sorted({file for kind in KEPT for file in self.out.rglob(kind)}):
                if here not in file.parents:
                    archive.add(file, file.relative_to(self.out))
        for old in here.glob(f"{CHECKPOINT}.*"):
            old.unlink()
        states = sorted(self.out.rglob(STATE), key=lambda file: file.stat().st_mtime)
        for newest in states[-1:]:
            with tarfile.open(here / CHECKPOINT, "w") as archive:
                archive.add(newest, newest.relative_to(self.out))
            content = (here / CHECKPOINT).read_bytes()
            (here / CHECKPOINT).unlink()
            parts = range(0, len(content), PART)
            if len(parts) > MOST_PARTS:
                print(f"gpu/sessions.py: {newest} is too large to be kept", file=sys.stderr)
                break
            for number, start in enumerate(parts):
                part = here / f"{CHECKPOINT}.{number}"
                part.write_bytes(content[start : start + PART])
        if place := os.environ.get("OUT"):
            shutil.copytree(here, place, dirs_exist_ok=True)

    def restore(self, folder: Path) -> None:
        """Put back the figures and the checkpoint that `keep` has written to `folder`."""
        parts = sorted(folder.glob(f"{CHECKPOINT}.*"))
        whole = self.out / CHECKPOINT
        whole.write_bytes(b"".join(part.read_bytes() for part in parts))
        for archive in (folder / FIGURES, whole):
            if archive.stat().st_size:
                with tarfile.open(archive) as opened:
                    opened.extractall(self.out, filter="data")
        whole.unlink()
        self.found = json.loads(self.report.read_text())


def main() -> int:
    """Run one session; return 0 unless something failed."""
    arguments = _arguments()
    if not Path(arguments.data_dir).is_dir():
        print(f"gpu/sessions.py: {arguments.data_dir} is not a folder", file=sys.stderr)
        return 2
    session = Session(arguments)
    session.out.mkdir(parents=True, exist_ok=True)
    if arguments.restore is not None:
        session.restore(Path(arguments.restore))
    write_report(session.report, session.found)
    try:
        left, failed = session.run(arguments.stages)
    finally:
        session.keep()
    if left:
        print(f"gpu/sessions.py: {left} is not finished; run the same command to continue")
    elif failed:
        print(f"gpu/sessions.py: done, except {', '.join(failed)}: {session.report}")
    else:
        print(f"gpu/sessions.py: all done: {session.report}")
    return int(bool(failed))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", required=True, help="tree of train/CLASS/*, test/CLASS/*")
    parser.add_argument("--out", required=True, help="folder of the runs and the report")
    parser.add_argument("--session", type=float, default=9.0, help="minutes of this session")
    parser.add_argument("--epochs", type=int, default=20, help="epochs of Table 3's trainings")
    stages = ("speed", "table3", "autoattack", "diagnose")
    parser.add_argument("--stages", nargs="+", choices=stages, default=stages)
    parser.add_argument("--restore", help="folder of what a session on another machine has kept")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny networks and few images")
    return parser.parse_args()


def _errors(run: Path) -> dict[str, dict[str, Any]]:
    """Return a run's last error under each attack, from its evaluation.json."""
    file = run / "evaluation.json"
    if not file.exists():
        return {}
    keys = ("error_percent", "interval_95_percent", "n", "restarts", "eps", "alpha")
    entries = json.loads(file.read_text())
    return {entry["attack"]: {key: entry.get(key) for key in keys} for entry in entries}


if __name__ == "__main__":
    sys.exit(main())
