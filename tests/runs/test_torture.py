"""Kill -9 anywhere: the short version of `make torture`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "tools" / "torture.py"


@pytest.mark.long
def test_trainings_killed_anywhere_resume_to_the_bits_of_undisturbed_ones():
    # A process of its own, as it forks, which the threads of a process that has trained forbid.
    ended = subprocess.run(
        [sys.executable, SCRIPT, "--kills", "8", "--scenarios", "2", "--json"],
        capture_output=True, text=True,
    )  # fmt: skip
    found = json.loads(ended.stdout)
    assert found["failures"] == [], found
    assert (found["kills"], found["repeats"]) == (8, 2) and found["runs"] >= 2
    assert found["unreadable"] == found["lost"] == found["doubled"] == ended.returncode == 0
