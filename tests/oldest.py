"""The lower bounds of pyproject.toml, for `make test-oldest`: pins for pip, and whether they hold.

`python tests/oldest.py` prints every dependency at exactly its lower bound, a constraints file;
`python tests/oldest.py --check` raises unless this environment has those versions.
"""

import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
REQUIREMENT = re.compile(r"([\w.-]+)(\[[\w,]+\])?(?:(>=|~=)(\d+(?:\.\d+)*))?(?:; (.+))?")


def requirements() -> Iterator[tuple[str, str | None, str | None, str | None]]:
    """Yield (name, operator, lower bound, marker) of every dependency, the extras' too."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    for written in (project["dependencies"], *project["optional-dependencies"].values()):
        for text in written:
            found = REQUIREMENT.fullmatch(text)
            if found is None:
                raise ValueError(f"{text!r} is no name with one lower bound")
            name, _, operator, version, marker = found.groups()
            if name != "fastiat":
                yield name, operator, version, marker


def check() -> None:
    """Raise `AssertionError` unless every dependency that is installed is at its lower bound."""
    for name, _, wanted, _ in requirements():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            assert name == "ffcv", f"{name} is not installed"
            continue
        public = version.split("+")[0]
        # 2.0 stands for 2.0.0.
        assert re.fullmatch(rf"{wanted}(\.0)*", public), f"{name} {version} is not {wanted}"
    import numpy
    import torch

    print(f"lower bounds: numpy {numpy.__version__}, torch {torch.__version__} and the others")


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        check()
    else:
        for name, _, version, marker in requirements():
            print(f"{name}=={version}" + (f"; {marker}" if marker else ""))
