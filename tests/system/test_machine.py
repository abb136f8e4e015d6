"""What the machine refuses a training: space, memory, its folder. One line, all it had intact."""

import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from disks import disk
from trainings import assert_same

from fastiat import cli
from fastiat.runs.directory import LOCK, PREVIOUS, STATE, Run
from fastiat.runs.weights import read_state
from fastiat.train import Trainer

GB = 2**30


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, happens: Callable[[], object]) -> None:
    """Have something happen within the update that ends at `step`, at its first time only."""
    original, happened = Trainer.update, []

    def update(self, *batch):
        result = original(self, *batch)
        if self.step == step and not happened:
            happened.append(step)
            happens()
        return result

    monkeypatch.setattr(Trainer, "update", update)


@contextmanager
def limited(what: int, to: int) -> Iterator[None]:
    """Limit a resource of this process."""
    before = resource.getrlimit(what)
    resource.setrlimit(what, (to, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


def address_space() -> int:
    """Return the bytes of memory that this process has reserved."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def resume(out: Path) -> list[object]:
    return ["train", "--resume", "--checkpoint-every", "0", "--out", out]


def step_of(out: Path) -> int:
    return read_state(out / STATE)["step"]


def test_a_limit_on_file_sizes_ends_in_one_line_with_both_checkpoints_intact(
    stopped, trained, complaint, contents
):
    before = contents(stopped)
    with limited(resource.RLIMIT_FSIZE, (stopped / STATE).stat().st_size // 2):
        line = complaint(*resume(stopped))
    assert f"File too large: {stopped / STATE}: raise the limit on file sizes" in line
    assert line.endswith(f"go on with: fastiat train --resume --out {stopped}\n")
    after = contents(stopped)
    assert (after[STATE], after[PREVIOUS]) == (before[STATE], before[PREVIOUS])
    assert not list(stopped.glob(".state*"))
    assert cli.main([str(part) for part in resume(stopped)]) == 0
    assert_same(trained, stopped)


@pytest.mark.mounts
def test_a_disk_that_fills_up_while_metrics_are_written_loses_no_row(
    small, trained, tmp_path, monkeypatch, complaint
):
    (tmp_path / "disk").mkdir()
    out = tmp_path / "disk" / "run"

    def fill() -> None:
        with open(tmp_path / "disk" / "ballast", "wb") as ballast:
            while os.write(ballast.fileno(), bytes(4096)) == 4096:
                pass

    def fill_to_the_last() -> None:
        with pytest.raises(OSError, match="No space"):
            fill()

    with disk(tmp_path / "disk", "size=400k"):
        with monkeypatch.context() as patch:
            at_step(patch, 22, fill_to_the_last)
            line = complaint("train", *small, "--out", out)
        assert "No space left on device" in line and "free some space" in line
        (tmp_path / "disk" / "ballast").unlink()
        assert cli.main(["train", "--resume", "--out", str(out)]) == 0
        assert_same(trained, out)


@pytest.mark.mounts
def test_a_folder_that_becomes_read_only_ends_in_one_line_and_resumes_when_mended(
    small, trained, tmp_path, monkeypatch, complaint
):
    folder = tmp_path / "disk"
    folder.mkdir()
    out = folder / "run"

    def lock_up() -> None:
        # The disk itself cannot be mounted anew while a file on it is open for writing.
        subprocess.run(["mount", "--bind", out, out], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", out], check=True)

    with disk(folder):
        with monkeypatch.context() as patch:
            at_step(patch, 30, lock_up)
            line = complaint("train", *small, "--checkpoint-every", "0", "--out", out)
        assert "Read-only file system" in line and "choose a place that can be written to" in line
        assert step_of(out) == 29
        assert "Read-only file system" in complaint("train", "--resume", "--out", out)
        subprocess.run(["umount", out], check=True)
        assert cli.main(["train", "--resume", "--out", str(out)]) == 0
        assert_same(trained, out)


@pytest.mark.mounts
def test_a_read_only_disk_is_refused_at_once(small, tmp_path, complaint):
    with disk(tmp_path, "ro"):
        assert "cannot be written to" in complaint("train", *small, "--out", tmp_path / "run")


@pytest.mark.parametrize("how", ["removed", "replaced", "moved"])
def test_a_folder_that_vanishes_ends_in_one_line_and_is_not_made_anew(
    stopped, trained, monkeypatch, complaint, how
):
    aside = stopped.with_name("aside")

    def vanish() -> None:
        shutil.rmtree(stopped) if how == "removed" else stopped.rename(aside)
        if how == "replaced":
            stopped.mkdir()

    with monkeypatch.context() as patch:
        at_step(patch, 35, vanish)
        line = complaint(*resume(stopped))
    assert f"{stopped} was removed, replaced or unmounted" in line
    assert not stopped.exists() if how != "replaced" else not list(stopped.iterdir())
    if how != "removed":
        assert step_of(aside) == 34
        assert cli.main(["train", "--resume", "--out", str(aside)]) == 0
        assert_same(trained, aside)


@pytest.mark.mounts
def test_a_disk_that_is_unmounted_gets_nothing_written_into_its_place(
    small, tmp_path, monkeypatch, complaint
):
    folder = tmp_path / "disk"
    folder.mkdir()
    with disk(folder):
        at_step(
            monkeypatch, 3, lambda: subprocess.run(["umount", "--lazy", str(folder)], check=True)
        )
        line = complaint("train", *small, "--checkpoint-every", "0", "--out", folder)
    assert "was removed, replaced or unmounted" in line
    assert not list(folder.iterdir())


def test_a_network_larger_than_the_memory_gets_one_line_and_no_run(small, tmp_path, complaint):
    with limited(resource.RLIMIT_AS, address_space() + GB):
        line = complaint("train", *small, "--width", "30000", "--out", tmp_path / "run")
    assert "takes more memory than there is: lower --batch-size or --width" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("allocate", [lambda: torch.empty(4 * GB), lambda: bytearray(4 * GB)])
def test_memory_that_runs_out_ends_in_one_line_with_the_checkpoint_intact(
    stopped, trained, monkeypatch, complaint, allocate
):
    with monkeypatch.context() as patch, limited(resource.RLIMIT_AS, address_space() + 2 * GB):
        at_step(patch, 35, allocate)
        line = complaint(*resume(stopped))
    assert "more memory than there is" in line and "--batch-size or --width" in line
    assert line.endswith(f"go on with: fastiat train --resume --out {stopped}\n")
    assert step_of(stopped) == 34
    assert cli.main(["train", "--resume", "--out", str(stopped)]) == 0
    assert_same(trained, stopped)


def raise_as_cuda_does() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")


def fill_the_gpu() -> None:
    torch.empty(2**50, device="cuda", dtype=torch.uint8)


@pytest.mark.parametrize(
    "run_out", [raise_as_cuda_does, pytest.param(fill_the_gpu, marks=pytest.mark.gpu)]
)
def test_memory_of_the_gpu_that_runs_out_ends_in_one_line(stopped, monkeypatch, complaint, run_out):
    at_step(monkeypatch, 35, run_out)
    line = complaint(*resume(stopped))
    assert "more memory than there is" in line and "--batch-size or --width" in line
    assert step_of(stopped) == 34


def test_what_ends_so_leaves_the_run_unlocked(stopped, monkeypatch, complaint):
    at_step(monkeypatch, 35, raise_as_cuda_does)
    complaint(*resume(stopped))
    Run.open(stopped).lock()
    assert (stopped / LOCK).exists()
