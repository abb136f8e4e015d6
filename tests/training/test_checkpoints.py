"""Checkpoints: two generations, when they are written, and what a kill leaves behind."""

import errno
import json
import signal
from dataclasses import fields
from pathlib import Path

import pytest
from trainings import assert_same, rows_of, signal_in

from fastiat import cli
from fastiat.config import TrainConfig
from fastiat.runs.directory import CONFIG, LOCK, METRICS, MODEL, PREVIOUS, STATE, Run
from fastiat.runs.weights import pack_state, read_state
from fastiat.system.errors import InputError
from fastiat.train import Trainer


def step_of(file: Path) -> int:
    return read_state(file)["step"]


def test_a_checkpoint_of_step_0_is_there_before_the_first_update(small, tmp_path, monkeypatch):
    out, found = tmp_path / "run", []
    original = Trainer.update

    def update(self, *batch):
        if not found:
            found.append(step_of(out / STATE))
        return original(self, *batch)

    monkeypatch.setattr(Trainer, "update", update)
    assert cli.main(["train", *small, "--out", str(out)]) == 0
    assert found == [0]


def test_checkpoints_come_when_due_and_a_resume_may_say_anew_when(
    small, stopped, tmp_path, monkeypatch
):
    assert json.loads((stopped / CONFIG).read_text())["checkpoint_every"] == 0
    saved = []
    original = Run.save_state
    monkeypatch.setattr(
        Run, "save_state", lambda self, state: saved.append(state["step"]) or original(self, state)
    )
    resume = ["train", "--resume", "--checkpoint-every", "100", "--out", str(stopped)]
    assert cli.main(resume) == 0
    assert saved == [44]
    # A clock that moves by a second a look.
    now = iter(range(10**9))
    monkeypatch.setattr("fastiat.train.time.monotonic", lambda: float(next(now)))
    saved.clear()
    out = tmp_path / "run"
    assert cli.main(["train", *small, "--checkpoint-every", "45", "--out", str(out)]) == 0
    assert saved[0] == 0 and saved[-1] == 44 and 2 < len(saved) < 10


@pytest.mark.parametrize("damage", ["cut", "bit", "missing", "values"])
def test_the_older_checkpoint_stands_in_for_a_damaged_one_with_one_line(
    trained, stopped, capsys, damage
):
    file = stopped / STATE
    whole = file.read_bytes()
    assert (step_of(file), step_of(stopped / PREVIOUS)) == (30, 29)
    if damage == "cut":
        file.write_bytes(whole[:-100])
    elif damage == "bit":
        middle = whole.index(read_state(file)["model"]["head.bias"].numpy())
        file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    elif damage == "missing":
        file.unlink()
    else:
        file.write_bytes(pack_state(read_state(file) | {"random": 3}))
    with open(stopped / METRICS, "a") as metrics:
        metrics.write('{"kind": "step", "step": 30}\n')
    capsys.readouterr()
    assert cli.main(["train", "--resume", "--out", str(stopped)]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fastiat: warning: {file}") and line.endswith(
        "using state.previous.safetensors"
    )
    assert_same(trained, stopped)


def test_a_damaged_checkpoint_never_takes_the_place_of_the_good_older_one(stopped, monkeypatch):
    (stopped / STATE).write_bytes(b"damaged")
    signal_in(monkeypatch, "update", signal.SIGTERM, 35)
    assert cli.main(["train", "--resume", "--checkpoint-every", "9", "--out", str(stopped)]) == 143
    assert (step_of(stopped / STATE), step_of(stopped / PREVIOUS)) == (35, 29)


def test_two_damaged_checkpoints_get_one_line_that_names_both(stopped, complaint, contents):
    for name in (STATE, PREVIOUS):
        (stopped / name).write_bytes(b"damaged")
    before = contents(stopped)
    line = complaint("train", "--resume", "--out", stopped)
    assert str(stopped / STATE) in line and str(stopped / PREVIOUS) in line
    assert "put one back, or start again with another --out" in line
    del before[LOCK]
    after = contents(stopped)
    del after[LOCK]
    assert after == before


def test_where_files_cannot_be_linked_two_checkpoints_are_kept_too(small, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    signal_in(monkeypatch, "update", signal.SIGTERM, 3)
    out = tmp_path / "run"
    assert cli.main(["train", *small, "--out", str(out)]) == 143
    assert (step_of(out / STATE), step_of(out / PREVIOUS)) == (3, 0)


def test_what_a_kill_left_half_written_is_removed_by_the_resume(stopped):
    for name in (STATE, PREVIOUS, METRICS, MODEL, CONFIG, "evaluation.json"):
        (stopped / f".{name}.123").write_bytes(b"half")
    assert cli.main(["train", "--resume", "--out", str(stopped)]) == 0
    assert [file.name for file in stopped.glob(".*")] == [LOCK]


def test_a_kill_while_the_run_is_made_leaves_the_place_free(small, tmp_path, complaint):
    out = tmp_path / "run"
    out.mkdir()
    (out / LOCK).write_bytes(b"")
    (out / f".{CONFIG}.123").write_bytes(b'{"pre')
    assert "holds no run" in complaint("train", "--resume", "--out", out)
    assert cli.main(["train", *small, "--out", str(out)]) == 0
    assert not (out / f".{CONFIG}.123").exists()


def test_only_the_cut_last_line_is_dropped_and_damaged_ones_stay_to_be_named(run, complaint):
    whole = (run / METRICS).read_text()
    (run / METRICS).write_text("damaged\n" + whole + '{"kind": "ep')
    Run.open(run).log("evaluation", error_percent=1.5)
    assert (run / METRICS).read_text() == (
        "damaged\n" + whole + '{"kind": "evaluation", "error_percent": 1.5}\n'
    )
    assert f"{run / METRICS}, line 1 is damaged" in complaint("report", run)


@pytest.mark.parametrize(
    ("damage", "lost"),
    [("removed", "2 rows of the 30"), ("a line", "1 row of the 30"), ("nothing", "")],
)
def test_a_resume_says_that_rows_before_its_checkpoint_are_gone(stopped, capsys, damage, lost):
    lines = (stopped / METRICS).read_text().splitlines(keepends=True)
    assert len(lines) == 2  # step 20 and epoch 1
    if damage == "removed":
        (stopped / METRICS).unlink()
    elif damage == "a line":
        (stopped / METRICS).write_text("damaged\n" + lines[1])
    capsys.readouterr()
    assert cli.main(["train", "--resume", "--out", str(stopped)]) == 0
    assert capsys.readouterr().err == (
        f"fastiat: warning: {stopped / METRICS} was damaged or changed: it lacks {lost} steps "
        f"so far\n"
        if lost
        else ""
    )


@pytest.mark.parametrize("name", [STATE, PREVIOUS])
def test_a_folder_in_the_place_of_a_checkpoint_is_named_with_what_mends_it(
    stopped, complaint, name
):
    (stopped / name).unlink()
    (stopped / name).mkdir()
    line = complaint("train", "--resume", "--out", stopped)
    assert f"Is a directory: {stopped / name}: move that folder away" in line


def test_measuring_again_after_a_kill_doubles_no_row(run, trained):
    lines = (run / METRICS).read_text().splitlines(keepends=True)
    (run / METRICS).write_text("".join(lines[:-1]))
    assert cli.main(["train", "--resume", "--out", str(run)]) == 0
    assert rows_of(run) == rows_of(trained)


@pytest.mark.parametrize("gone", [field.name for field in fields(TrainConfig)])
def test_a_config_without_one_of_its_settings_is_refused(run, gone):
    values = json.loads((run / CONFIG).read_text())
    del values[gone]
    (run / CONFIG).write_text(json.dumps(values))
    with pytest.raises(InputError, match=f"lacks the field '{gone}'"):
        Run.open(run)


def test_an_empty_config_is_refused(run, complaint):
    (run / CONFIG).write_text("{}")
    assert "lacks the field 'attack_loss'" in complaint("train", "--resume", "--out", run)
