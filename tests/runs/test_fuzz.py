"""Hostile files: 500 of the ten thousand of `make torture`, and links and pipes in a run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastiat.runs.directory import CONFIG, LOCK, LOG, METRICS, MODEL, PREVIOUS, STATE
from fastiat.system.errors import one_line, printable
from fastiat.system.tables import markdown

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_no_hostile_file_ends_in_anything_but_acceptance_or_one_line():
    # In a process of its own, as torch's threads do not survive forks.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "tests/tools/fuzz.py", "--inputs", "500", "--seed", "1"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "none failed" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_the_fuzzer_finds_what_it_is_to_find(tmp_path):
    """Readers that do what none may are put in place of fastiat's own."""
    code = """
import dataclasses, os, sys, time
sys.path.insert(0, "tests/tools")
import fuzz, fuzz_targets
from fastiat.system.errors import InputError

def lines(*_): raise InputError("two\\nlines")
def bug(*_): raise KeyError("x")
def memory(*_): bytearray(3 * 2**30)
def outside(place, *_): (place.parent / fuzz_targets.OUTSIDE / "x").write_text("y")
def code(*_): os.system("true")
def hidden(*_):
    try: os.mkdir("/tmp/canary")
    except Exception: pass
def escape(*_): print("\\x1b[2J")
def crash(*_): os.abort()
def hang(*_):
    while True: pass
def fine(*_): raise InputError("one line")

fuzz.CPU_SECONDS = 0.3
kind = fuzz_targets.TARGETS[-1]
ways = (lines, bug, memory, outside, code, hidden, escape, crash, hang, fine)
targets = [dataclasses.replace(kind, name=way.__name__, use=way) for way in ways]
class World:
    def __init__(self, folder, decode):
        self.folder, self.seeds = folder, {"tables.csv": [b"a,b"]}
        (folder / kind.needs).mkdir(parents=True)
fuzz.World, fuzz.TARGETS = World, []
real = fuzz._world
with real(True) as (world, place):
    for target in targets:
        tally = fuzz._tally(world, place, target, 0, range(2))
        print(target.name, dict(tally.outcomes), tally.failures[:1])
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    *failing, fine = done.stdout.splitlines()
    assert len(failing) == 9, done.stdout + done.stderr
    said = {line.split()[0]: line for line in failing}
    assert all("{'failed': 2}" in line for line in failing), done.stdout
    assert "SIGABRT" in said["crash"] and "SIGPROF" in said["hang"] and "2 GB" in said["memory"]
    assert "os.system" in said["code"] and "os.mkdir" in said["hidden"]
    assert fine.startswith("fine {'refused': 2}")


@pytest.mark.parametrize("name", [METRICS, LOG, LOCK])
def test_a_link_in_a_run_is_not_written_through(complaint, run, tmp_path, name):
    victim = tmp_path / "victim"
    victim.write_text("whole")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(victim)
    if name == METRICS:
        complaint("evaluate", run, "--limit", "5", "--attacks", "none")
    else:
        complaint("train", "--resume", "--out", run)
    assert victim.read_text() == "whole"


@pytest.mark.parametrize("name", [CONFIG, METRICS, STATE, MODEL, "evaluation.json", "norms.json"])
def test_a_pipe_in_a_run_is_refused_without_waiting_for_it(complaint, run, name):
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    (run / PREVIOUS).unlink(missing_ok=True)
    if name == STATE:
        complaint("train", "--resume", "--out", run)
    elif name == MODEL:
        complaint("evaluate", run)
    else:
        complaint("report", run)


def test_a_config_chooses_no_place_to_download_to(complaint, run, tmp_path):
    place = tmp_path / "elsewhere"
    place.mkdir()
    text = (run / CONFIG).read_text().replace('"digits"', '"svhn"')
    (run / CONFIG).write_text(text.replace('"data_dir": null', f'"data_dir": "{place}"'))
    assert "--data-dir" in complaint("evaluate", run)
    assert "--data-dir" in complaint("train", "--resume", "--out", run)
    assert not list(place.iterdir())


def test_json_that_would_take_more_memory_than_there_is_is_refused_unparsed(complaint, run):
    # Parsed, these would take several gigabytes.
    many = "[" + "[]," * 40_000_000 + "[]]"
    rows = (run / METRICS).read_text()
    (run / METRICS).write_text('{"kind": ' + many + "}\n")
    assert "line 1 is damaged" in complaint("report", run)
    (run / METRICS).write_text(rows)
    (run / "evaluation.json").write_text(many)
    assert "larger than any" in complaint("report", run)
    (run / "evaluation.json").unlink()
    (run / CONFIG).write_text(many)
    assert "larger than any" in complaint("evaluate", run)


def test_what_a_terminal_acts_on_is_named_and_long_lines_are_cut():
    assert printable("a\x1b[2J\n\x9b\u202e\ud800é字") == "a\\x1b[2J\\n\\x9b\\u202e\\ud800é字"
    line = one_line("x" * 10**6 + ": mend it so")
    assert len(line) <= 2000 and line.endswith(": mend it so") and " ... " in line


def test_a_bar_in_a_cell_does_not_end_it():
    text = markdown(("a", "b"), [("x|y\nz", "1")])
    assert text.splitlines()[2].count("|") - text.splitlines()[2].count(r"\|") == 3
    assert len(text.splitlines()) == 3
