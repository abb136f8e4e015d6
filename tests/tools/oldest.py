"""The lower bounds of pyproject.toml, for `make test-oldest`: pins for pip, and their check.

`python tests/tools/oldest.py` prints every dependency at exactly its lower bound, as constraints;
`python tests/tools/oldest.py --check` raises unless this environment has those versions.
"""

import importlib
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
REQUIREMENT = re.compile(r"([\w.-]+)(>=|~=)(\d+(?:\.\d+)*)(?:; (.+))?")


def requirements() -> Iterator[tuple[str, str, str, str | None]]:
    """Yield (name, operator, lower bound, marker) of every dependency, the extras' too."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    for written in (project["dependencies"], *project["optional-dependencies"].values()):
        for text in written:
            if text.startswith("fastiat["):  # extras of fastiat itself
                continue
            found = REQUIREMENT.fullmatch(text)
            if found is None:
                raise ValueError(f"{text!r} is not a name with one lower bound")
            name, operator, version, marker = found.groups()
            yield name, operator, version, marker


def check() -> None:
    """Raise unless every dependency that applies here is installed and at its lower bound."""
    # Imported here: pytest installs packaging, but the pins are printed before any installation.
    from packaging.markers import Marker

    names = []
    for name, _, wanted, marker in requirements():
        if marker is not None and not Marker(marker).evaluate():
            continue
        names.append(name)
        version = importlib.metadata.version(name)
        public = version.split("+")[0]
        # 2.0 stands for 2.0.0.
        assert re.fullmatch(rf"{wanted}(\.0)*", public), f"{name} {version} is not {wanted}"
    # The imported module must be the installed one; torch appends its CUDA version.
    for name in ("numpy", "torch"):
        imported = str(importlib.import_module(name).__version__).split("+")[0]
        assert imported == importlib.metadata.version(name).split("+")[0], f"{name} is {imported}"
    print("lower bounds:", " ".join(sorted(f"{n}=={importlib.metadata.version(n)}" for n in names)))


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        check()
    else:
        for name, _, version, marker in requirements():
            print(f"{name}=={version}" + (f"; {marker}" if marker else ""))
