"""Training from end to end: repeated, stopped, resumed, on a full disk, and shown."""

import fcntl
import os
import pty
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trainings import assert_same, rows_of, signal_in

from fastiat import cli
from fastiat.runs.directory import METRICS, MODEL, STATE, Run
from fastiat.runs.weights import read_state
from fastiat.train import Trainer

# Updates in an epoch, and the flags of the run.
VARIANTS = {
    "plain": (22, ("--epochs", "3")),
    "ema": (
        5,
        (
            *("--arch", "preact18", "--width", "2", "--bn", "update", "--epochs", "3"),
            *("--batch-size", "256", "--ema", "0.9", "--mix-at", "1"),
        ),
    ),
    "holdout": (18, ("--epochs", "3", "--holdout", "280", "--patience", "2")),
}


@pytest.fixture(scope="module", params=VARIANTS)
def whole(request, small, tmp_path_factory) -> tuple[Path, tuple[str, ...], int]:
    """A run that was never stopped, its flags, and the number of updates in its epochs."""
    steps, flags = VARIANTS[request.param]
    out = tmp_path_factory.mktemp("whole") / request.param
    assert cli.main(["train", *small, *flags, "--out", str(out)]) == 0
    return out, (*small, *flags), steps


@pytest.mark.parametrize(
    ("method", "number", "epochs"),
    [
        ("update", signal.SIGINT, 0),
        ("update", signal.SIGTERM, 1.5),
        ("update", signal.SIGTERM, 2),  # the last update of an epoch
        ("validate", signal.SIGTERM, 1),
        ("validate", signal.SIGINT, 3),
    ],
)
def test_a_stopped_training_resumes_to_the_same_bits(
    whole, tmp_path, monkeypatch, capsys, method, number, epochs
):
    never_stopped, flags, steps = whole
    out, step = tmp_path / "run", max(int(epochs * steps), 1)
    with monkeypatch.context() as patch:
        signal_in(patch, method, number, step)
        assert cli.main(["train", *flags, "--out", str(out)]) == 128 + number
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(f"fastiat: stopped at step {step}, checkpoint written")
    assert lines[-1].endswith(f"go on with: fastiat train --resume --out {out}")
    assert read_state(out / STATE)["step"] == step
    assert cli.main(["train", "--resume", "--out", str(out)]) == 0
    assert_same(never_stopped, out)


def test_a_second_stop_is_resumed_too(whole, tmp_path, monkeypatch):
    never_stopped, flags, steps = whole
    out = tmp_path / "run"
    for step, argv in ((steps // 2, ["train", *flags]), (2 * steps - 1, ["train", "--resume"])):
        with monkeypatch.context() as patch:
            signal_in(patch, "update", signal.SIGTERM, step)
            assert cli.main([*argv, "--out", str(out)]) == 143
    assert cli.main(["train", "--resume", "--out", str(out)]) == 0
    assert_same(never_stopped, out)


@pytest.mark.parametrize("whole", ["holdout"], indirect=True)
def test_a_killed_training_resumes_from_its_last_checkpoint(whole, tmp_path):
    never_stopped, flags, _ = whole
    out = tmp_path / "run"
    script = f"""
import os, signal
from fastiat import cli, train
original = train.Trainer.update
def update(self, *batch):
    if self.step == 31:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *batch)
train.Trainer.update = update
cli.main({["train", *flags, "--checkpoint-every", "0", "--out", str(out)]!r})
"""
    root = Path(__file__).parent.parent
    ended = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    with open(out / METRICS, "a") as file:
        file.write('{"kind": "step", "step": 9')  # what a kill during a write leaves
    assert cli.main(["train", "--resume", "--out", str(out)]) == 0
    assert_same(never_stopped, out)


def test_a_kill_between_a_row_and_its_checkpoint_doubles_no_row(whole, tmp_path, monkeypatch):
    never_stopped, flags, steps = whole
    out = tmp_path / "run"
    original = Run.log_line

    def die(self, text):
        original(self, text)
        if text.startswith("epoch 2"):
            raise SystemExit(137)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log_line", die)
        with pytest.raises(SystemExit):
            cli.main(["train", *flags, "--checkpoint-every", "0", "--out", str(out)])
    assert read_state(out / STATE)["step"] == 2 * steps
    assert cli.main(["train", "--resume", "--out", str(out)]) == 0
    assert_same(never_stopped, out)


def test_a_training_killed_before_its_first_checkpoint_starts_from_step_0(
    trained, small, tmp_path, monkeypatch
):
    out = tmp_path / "run"

    def die(*_):
        raise SystemExit(137)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save_state", die)
        with pytest.raises(SystemExit):
            cli.main(["train", *small, "--out", str(out)])
    assert (out / "config.json").exists() and not (out / STATE).exists()
    assert cli.main(["train", "--resume", "--out", str(out)]) == 0
    assert_same(trained, out)


def test_a_finished_run_resumes_to_its_errors_and_stays_as_it_is(run, capsys, contents):
    before = contents(run)
    assert cli.main(["train", "--resume", "--out", str(run)]) == 0
    out = capsys.readouterr().out
    assert "trained already, 2 epochs" in out and "PGD-20" in out
    after = contents(run)
    assert all(after[name] == before[name] for name in (STATE, MODEL, "config.json"))
    assert after[METRICS].startswith(before[METRICS])


def test_the_same_seed_gives_the_same_bits_and_another_one_others(trained, small, tmp_path):
    for seed in ("0", "1"):
        out = str(tmp_path / seed)
        assert cli.main(["train", *small, "--seed", seed, "--out", out]) == 0
    assert_same(trained, tmp_path / "0")
    one, other = (load_file(tmp_path / seed / MODEL) for seed in ("0", "1"))
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_modern_stops_early_and_keeps_the_best_epoch(small, tmp_path, monkeypatch):
    weights = {}
    original = Trainer.validate

    def validate(self, row):
        better = original(self, row)
        weights[self.epoch] = {k: v.clone() for k, v in self.eval_model.state_dict().items()}
        return better

    monkeypatch.setattr(Trainer, "validate", validate)
    out = tmp_path / "run"
    flags = ("--preset", "modern", "--holdout", "200", "--epochs", "40", "--patience", "2")
    network = ("--arch", "preact18", "--width", "2", "--batch-size", "256")
    # A learning rate so high that the error soon stops falling.
    assert cli.main(["train", *small, *flags, *network, "--lr", "1", "--out", str(out)]) == 0
    epochs = [row for row in rows_of(out) if row["kind"] == "epoch"]
    errors = [row["holdout_error_percent"] for row in epochs]
    best = errors.index(min(errors))
    assert len(errors) == best + 3 < 40
    kept = load_file(out / MODEL)
    assert all(torch.equal(kept[name], value) for name, value in weights[best + 1].items())
    assert not all(torch.equal(kept[name], value) for name, value in weights[best + 3].items())


def test_a_training_that_diverges_ends_in_one_line_and_keeps_its_checkpoint(
    small, tmp_path, monkeypatch, complaint
):
    out = tmp_path / "run"
    original = Trainer.update

    def update(self, *batch):
        result = original(self, *batch)
        if self.step == 25:
            next(self.model.parameters()).data.fill_(torch.nan)
        return result

    monkeypatch.setattr(Trainer, "update", update)
    line = complaint("train", *small, "--checkpoint-every", "0", "--out", out)
    assert "diverged" in line and "the checkpoint of step 24 is intact" in line
    assert f"fastiat train --resume --out {out} --on-nan skip" in line
    state = read_state(out / STATE)
    assert state["step"] == 24
    assert all(value.isfinite().all() for value in state["model"].values())


@pytest.mark.long
def test_preact18_without_its_final_norm_diverges_and_the_setting_at_fault_is_named(
    tmp_path, complaint, capsys
):
    line = complaint(
        *("train", "--variant", "authors", "--adv", "none", "--mix", "none", "--epochs", "4"),
        *("--dataset", "digits", "--device", "cpu", "--precision", "fp32"),
        *("--out", tmp_path / "run"),
    )
    assert "the training diverged" in line and "--variant standard or --loss bce" in line


def test_a_loss_far_above_a_guess_is_told_once_in_the_first_epoch(
    small, tmp_path, monkeypatch, capsys
):
    original = Trainer.update

    def update(self, *batch):
        return original(self, *batch)._replace(adv_loss=torch.tensor(24.0))

    monkeypatch.setattr(Trainer, "update", update)
    flags = (*small, "--batch-size", "16", "--out", str(tmp_path / "run"))
    assert cli.main(["train", *flags]) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert "the loss is 24 at step 1, and the loss of a guess is 2.3" in warnings[0]
    assert "a lower --lr than 0.02, or --schedule cosine" in warnings[0]


def test_a_training_on_a_part_of_the_images_resumes_on_the_same_part(small, tmp_path, monkeypatch):
    flags = ("train", *small, "--train-limit", "130", "--batch-size", "16")
    assert cli.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    signal_in(monkeypatch, "update", signal.SIGTERM, 11)
    assert cli.main([*flags, "--out", str(tmp_path / "parts")]) == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert cli.main(["train", "--resume", "--out", str(tmp_path / "parts")]) == 0
    whole, parts = (load_file(tmp_path / name / MODEL) for name in ("whole", "parts"))
    assert all(torch.equal(parts[name], value) for name, value in whole.items())
    steps = [row["step"] for row in rows_of(tmp_path / "parts") if row["kind"] == "epoch"]
    assert steps == [8, 16]


@contextmanager
def little_space(folder: Path, size: int, largest: int) -> Iterator[None]:
    """Mount a disk of `size` bytes at `folder`.

    Where that is not allowed, no file may exceed `largest` bytes: the same writes fail.
    """
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.getuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0:
        try:
            yield
        finally:
            subprocess.run(["umount", str(folder)], check=True)
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("whole", ["plain"], indirect=True)
def test_a_full_disk_ends_in_one_line_with_the_checkpoint_intact(
    whole, tmp_path, monkeypatch, complaint, contents
):
    never_stopped, flags, _ = whole
    stopped, small_disk = tmp_path / "stopped", tmp_path / "disk"
    with monkeypatch.context() as patch:
        signal_in(patch, "update", signal.SIGTERM, 30)
        assert cli.main(["train", *flags, "--out", str(stopped)]) == 143
    small_disk.mkdir()
    # Space for the run as it is, but not for its next checkpoint beside the last.
    size = sum(-(-file.stat().st_size // 4096) * 4096 for file in stopped.iterdir()) + 16384
    copy = shutil.copytree(stopped, tmp_path / "copy")
    with little_space(small_disk, size, (stopped / STATE).stat().st_size // 2):
        out = small_disk / "run"
        shutil.copytree(copy, out) if os.path.ismount(small_disk) else copy.rename(out)
        line = complaint("train", "--resume", "--checkpoint-every", "0", "--out", out)
        assert "No space left" in line or "File too large" in line
        assert line.endswith(f"go on with: fastiat train --resume --out {out}\n")
        kept = Path(shutil.move(out, tmp_path / "kept"))
    assert contents(kept)[STATE] == contents(stopped)[STATE]
    assert cli.main(["train", "--resume", "--out", str(kept)]) == 0
    assert_same(never_stopped, kept)


def test_a_reader_that_goes_away_ends_the_training_without_a_traceback(
    small, tmp_path, monkeypatch, capsys
):
    receiver, sender = os.pipe()
    os.close(receiver)
    with os.fdopen(sender, "w") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        assert cli.main(["train", *small, "--out", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err == "fastiat: the program that reads the output has ended\n"


def test_a_disk_full_from_the_start_gets_one_line_and_no_run(small, tmp_path, complaint):
    with little_space(tmp_path, 4096, 10):
        if os.path.ismount(tmp_path):
            (tmp_path / "ballast").write_bytes(bytes(4096))
        line = complaint("train", *small, "--out", tmp_path / "run")
        assert "config.json" in line or str(tmp_path / "run") in line
        assert not (tmp_path / "run").exists()


def test_lines_go_to_stdout_and_progress_to_stderr(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fastiat.system.progress.PLAIN_EVERY", 0.0)
    out = tmp_path / "run"
    assert cli.main(["train", *small, "--out", str(out)]) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert [line.split(",")[0] for line in lines[1:3]] == ["epoch 1/2", "epoch 2/2"]
    assert str(out) in lines[3] and "No attack" in lines[5]
    assert shown.out == (out / "stdout.log").read_text()
    assert "training: 64/2816 images" in shown.err and "PGD-20: " not in shown.out
    assert all(" img/s, " in line and " left" in line for line in shown.err.splitlines())
    assert re.search(r" left, clean 2\.\d+ \d+ %, adv 2\.\d+ \d+ %\n", shown.err)


def test_the_time_left_after_a_resume_counts_this_sessions_images(monkeypatch, capsys):
    from fastiat.system import progress

    now = iter([100.0, 200.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    shown = progress.Progress("training", total=10_000, done=9_000)
    shown.advance(100)
    # 100 images in 100 seconds, 900 to go.
    assert capsys.readouterr().err == "training: 9100/10000 images, 1 img/s, 15:00 left\n"


def test_a_terminal_gets_a_bar_that_the_lines_do_not_break(small, tmp_path, monkeypatch):
    """stdout and stderr go to one pseudo-terminal; the test computes what it shows."""
    master, slave = pty.openpty()
    shown: list[bytes] = []

    def read() -> None:
        with suppress_eio():
            while chunk := os.read(master, 65536):
                shown.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(slave, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        patch.setattr(sys, "stderr", terminal)
        assert cli.main(["train", *small, "--steps", "30", "--out", str(tmp_path / "run")]) == 0
    reader.join()
    os.close(master)
    text = b"".join(shown).decode()
    bar = (
        r"training +\d+%\|.*\| [\d.k]+ img/s, \d\d:\d\d left, clean 2\.\d+ \d+ %, adv 2\.\d+ \d+ %"
    )
    assert re.search(bar, text)
    left = [final(line) for line in text.split("\n")]
    logged = (tmp_path / "run" / "stdout.log").read_text().splitlines()
    assert [line for line in left if line] == [line.rstrip() for line in logged]


def final(line: str) -> str:
    """Return what a terminal shows of a line: text after a carriage return overwrites its start."""
    cells: list[str] = []
    for part in line.replace("\x1b[A", "").split("\r"):
        cells[: len(part)] = part
    return "".join(cells).rstrip()


@contextmanager
def suppress_eio() -> Iterator[None]:
    try:
        yield
    except OSError as error:  # how Linux ends a pseudo-terminal
        assert error.errno == 5


def test_tensorboard_reads_the_events_of_both_sessions(small, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_in(patch, "update", signal.SIGTERM, 30)
        assert cli.main(["train", *small, "--out", str(out)]) == 143
    assert cli.main(["train", "--resume", "--out", str(out)]) == 0
    events = EventAccumulator(str(out)).Reload()
    rows = [row for row in Run.open(out).rows() if row["kind"] == "epoch"]
    for name in ("clean_loss", "adv_accuracy_percent", "test_error_percent"):
        points = events.Scalars(f"epoch/{name}")
        assert [point.step for point in points] == [22, 44]
        assert [point.value for point in points] == pytest.approx([row[name] for row in rows])
    assert [point.step for point in events.Scalars("step/learning_rate")] == [20, 40]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_trained_run_is_measured_says_how_to_measure_it(
    small, trained, tmp_path, monkeypatch, capsys, number
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("fastiat.evaluate.evaluate", lambda config: os.kill(os.getpid(), number))
        assert cli.main(["train", *small, "--out", str(out)]) == 128 + number
    assert capsys.readouterr().err == (
        f"fastiat: {out} is trained; measure it with: fastiat train --resume --out {out}\n"
    )
    assert cli.main(["train", "--resume", "--out", str(out)]) == 0
    assert_same(trained, out)
