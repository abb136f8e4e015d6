"""The bounds of pyproject.toml: lower ones that are tested, upper ones with a reason."""

import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import oldest
import pytest

LINES = oldest.PROJECT.read_text().splitlines()
REQUIREMENTS = list(oldest.requirements())


@pytest.mark.parametrize("name", [name for name, *_ in REQUIREMENTS])
def test_a_dependency_has_a_lower_bound_and_no_upper_one_without_a_reason(name):
    (operator,) = [operator for of, operator, _, _ in REQUIREMENTS if of == name]
    assert operator in (">=", "~=")
    # What builds the package, further up, may be what an extra needs too.
    *_, at = [i for i, line in enumerate(LINES) if re.search(rf'"{name}[>~]=', line)]
    # Several in a row share the reason above them.
    above = at - 1
    while "~=" in LINES[above]:
        above -= 1
    assert operator == ">=" or "#" in LINES[at] or LINES[above].lstrip().startswith("#")


@pytest.mark.parametrize("text", ["numpy", "numpy<3", "numpy>=2,<3", "numpy==2.0"])
def test_another_kind_of_bound_is_refused(monkeypatch, tmp_path, text):
    project = tmp_path / "pyproject.toml"
    project.write_text(f'[project]\ndependencies = ["{text}"]\n[project.optional-dependencies]\n')
    monkeypatch.setattr(oldest, "PROJECT", project)
    with pytest.raises(ValueError, match="lower bound"):
        list(oldest.requirements())


def test_pins_are_every_dependency_at_its_lower_bound():
    script = Path(oldest.__file__)
    printed = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    pins = dict(line.split(";")[0].split("==") for line in printed.stdout.splitlines())
    text = oldest.PROJECT.read_text()
    assert {"torch", "numpy", "hypothesis", "pyautoattack", "ffcv"} <= pins.keys()
    for name, version in pins.items():
        assert re.search(rf'"{name}[>~]={re.escape(version)}[";]', text)


def test_tritons_bound_is_the_one_that_the_oldest_torch_asks_for():
    pins = {name: version for name, _, version, _ in REQUIREMENTS}
    # Torch of CUDA pins its own; that of the CPU names none.
    asked = [line for line in requires("torch") or () if re.match(r"triton\b", line)]
    from torch import __version__

    if __version__.startswith(f"{pins['torch']}.") and asked:
        assert re.match(rf"triton==({re.escape(pins['triton'])})", asked[0])
