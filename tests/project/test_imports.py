"""Imports: every module can be imported alone, and they run in one direction.

The direction is the table of docs/architecture.md, which this file reads.
"""

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fastiat"
TEXT = (ROOT / "docs" / "architecture.md").read_text()


def module_name(file: Path) -> str:
    """Return `images.tree` for images/tree.py and `images` for images/__init__.py."""
    return ".".join(file.with_suffix("").parts).removesuffix("__init__").removesuffix(".")


FILES = {file.relative_to(PACKAGE): file for file in sorted(PACKAGE.rglob("*.py"))}
# fastiat/kernels is a link, which rglob may not follow.
FILES |= {file.relative_to(ROOT): file for file in sorted((ROOT / "kernels").glob("*.py"))}
MODULES = {module_name(inside): file for inside, file in FILES.items()}
# The package itself imports its parts by name when they are first used.
CHECKED = [name for name in MODULES if name not in ("", "__main__")]


def table() -> dict[str, str]:
    """Return the parts of the table from top to bottom, with what they may import in functions."""
    section = TEXT.split("## The imports")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|$", section, re.MULTILINE)
    return dict(rows)


TABLE = table()
ORDER = list(TABLE)


def part_of(module: str) -> str:
    return module.split(".")[0]


def imports(module: str) -> Iterator[tuple[str, bool]]:
    """Yield the modules of fastiat that a module imports, and whether it does so in a function."""
    tree = ast.parse(MODULES[module].read_text())
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    own_package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(filter(None, ("fastiat", own_package, base)))
            # `from fastiat.images import tree` imports a module, `... import Dataset` a name of it.
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] != "fastiat":
                continue
            name = name.removeprefix("fastiat").removeprefix(".")
            name = name if name in MODULES else name.rpartition(".")[0]
            if name:  # not `from fastiat import __version__`
                yield name, id(node) in inside


def test_the_table_has_every_part_once():
    section = TEXT.split("## The imports")[1].split("\n## ")[0]
    assert len(re.findall(r"^\| `", section, re.MULTILINE)) == len(TABLE)
    assert set(ORDER) == {part_of(module) for module in CHECKED}


def test_the_top_of_the_package_stays_small():
    assert len(list(PACKAGE.glob("*.py"))) <= 14


@pytest.mark.parametrize("part", ORDER)
def test_a_part_imports_only_parts_below_it(part):
    below = ORDER[ORDER.index(part) :]
    wrong = [
        f"{module} imports {name}"
        for module in CHECKED
        if part_of(module) == part
        for name, _ in imports(module)
        if part_of(name) not in below
    ]
    assert not wrong


@pytest.mark.parametrize("part", ORDER)
def test_an_import_inside_a_function_is_in_the_table(part):
    allowed = re.findall(r"`([\w.]+)`", TABLE[part])
    wrong = [
        f"{module} imports {name} in a function"
        for module in CHECKED
        if part_of(module) == part
        for name, in_function in imports(module)
        if in_function and name not in allowed
    ]
    assert TABLE[part].strip().startswith("anything") or not wrong


def test_the_table_names_no_import_inside_a_function_that_there_is_not():
    found = {(part_of(m), name) for m in CHECKED for name, lazy in imports(m) if lazy}
    for part, text in TABLE.items():
        if not text.strip().startswith("anything"):
            assert {(part, name) for name in re.findall(r"`([\w.]+)`", text)} <= found


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: {name for name, _ in imports(module)} - {module} for module in CHECKED}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_every_module_can_be_imported_alone():
    # Their libraries are loaded once. The kernels stay loaded too, as torch registers an op once.
    script = """
import importlib, sys, traceback
import fastiat.kernels
failed = []
for name in sys.argv[1:]:
    for loaded in list(sys.modules):
        if loaded.split(".")[0] == "fastiat" and not loaded.startswith("fastiat.kernels"):
            del sys.modules[loaded]
    try:
        importlib.import_module(name)
    except Exception:
        failed.append(f"{name}: {traceback.format_exc().splitlines()[-1]}")
sys.exit("\\n".join(failed) or 0)
"""
    names = [f"fastiat.{name}" for name in CHECKED]
    ended = subprocess.run(
        [sys.executable, "-c", script, *names], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
