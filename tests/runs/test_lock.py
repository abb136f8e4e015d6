"""One training at a time in a run directory, and no lock that outlives its process."""

import errno
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainings import assert_same

from fastiat import cli, data
from fastiat.config import TrainConfig
from fastiat.runs import lock
from fastiat.runs.directory import LOCK, Run

ROOT = Path(__file__).parents[2]


@contextmanager
def training(out: Path, small: tuple[str, ...]) -> Iterator[subprocess.Popen]:
    """A training in another process that waits in its first update."""
    wait = (
        "import time\nfrom fastiat.train import Trainer\n"
        "Trainer.update = lambda *_: time.sleep(100)"
    )
    command = ["train", *small, "--out", str(out)]
    script = f"{wait}\nfrom fastiat import cli\nraise SystemExit(cli.main({command!r}))"
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        while not (out / "stdout.log").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_second_training_is_refused_while_the_first_lives_and_no_longer(
    small, trained, tmp_path, complaint, contents
):
    out = tmp_path / "run"
    with training(out, small) as first:
        before = contents(out)
        for argv in (["train", *small], ["train", "--resume"]):
            line = complaint(*argv, "--out", out)
            assert f"in training by another process ({first.pid} on " in line
        assert cli.main(["report", str(out)]) == 0
        after = contents(out)
        assert {name: after[name] for name in before} == before
    assert cli.main(["train", "--resume", "--out", str(out)]) == 0
    assert_same(trained, out)


def test_two_that_start_at_once_make_one_run(small, tmp_path, complaint, monkeypatch):
    """The first makes its run while the second is loading its data."""
    out = tmp_path / "run"
    first = TrainConfig(dataset="digits")
    original = data.load

    def load(*arguments, **more):
        Run.create(out, first).unlock()
        return original(*arguments, **more)

    monkeypatch.setattr(data, "load", load)
    assert "already holds a run" in complaint("train", *small, "--out", out)
    assert Run.open(out).config == first


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    one, other = lock.Lock(tmp_path / LOCK), lock.Lock(tmp_path / LOCK)
    assert one.take() and not other.take()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writer)
        os.read(reader, 1)  # until the test is done with it
        os._exit(0)
    started = subprocess.Popen(["sleep", "100"], close_fds=False)
    try:
        assert not other.take()
        one.release()
        # The child is there, and holds nothing.
        deadline = time.monotonic() + 10
        while not other.take():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.close(writer)
        os.waitpid(child, 0)
        started.kill()
        started.wait()


def test_a_lock_file_that_was_removed_locks_nothing(tmp_path):
    one, other = lock.Lock(tmp_path / LOCK), lock.Lock(tmp_path / LOCK)
    assert one.take() and one.intact()
    (tmp_path / LOCK).unlink()
    assert not one.intact()
    assert other.take() and other.intact()


def test_where_nothing_can_be_locked_the_training_says_so_and_goes_on(
    small, trained, tmp_path, monkeypatch, capsys
):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    out = tmp_path / "run"
    assert cli.main(["train", *small, "--out", str(out)]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{out} cannot be locked (No locks available)" in line
    assert_same(trained, out)
