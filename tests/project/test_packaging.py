"""The package as users get it: the wheel, the checkout, from inside and from outside."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _run(*command, cwd, path=None):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    built = _run(
        "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT), cwd="/"
    )
    assert built.returncode == 0, built.stderr
    (file,) = folder.glob("*.whl")
    return file


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fastiat"}
    folders = [p for p in (ROOT / "fastiat").glob("**/") if "__pycache__" not in p.parts]
    wanted = {str(p.relative_to(ROOT)) for f in folders for p in f.glob("*.*")}
    wanted |= {f"fastiat/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
    assert wanted <= set(names)


@pytest.mark.slow
@pytest.mark.parametrize("inside", [True, False])
def test_installed_wheel_imports_helps_and_loads_its_digits(wheel, inside, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    cwd = ROOT if inside else tmp_path
    code = (
        "import fastiat.kernels, fastiat.data, fastiat;"
        "print(fastiat.kernels.pgd_step.__module__, len(fastiat.data.load('digits').train))"
    )
    imported = _run("-c", code, cwd=cwd, path=site)
    assert imported.stdout.split() == ["fastiat.kernels.pgd_step", "1437"], imported.stderr
    helped = _run("-m", "fastiat", "train", "--help", cwd=tmp_path, path=site)
    assert "--mix" in helped.stdout and "interpolation" in helped.stdout.lower(), helped.stderr


def test_top_level_kernels_import_is_refused_from_the_checkout():
    answer = _run("-c", "import kernels", cwd=ROOT)
    assert answer.returncode == 1 and "import fastiat.kernels" in answer.stderr


def test_fastiat_submodules_load_on_first_use_only():
    code = (
        "import sys, fastiat; assert 'torch' not in sys.modules;"
        "fastiat.models.build; fastiat.load; assert 'torch' in sys.modules;"
        "[getattr(fastiat, name) for name in dir(fastiat)];"
        "from fastiat.system.errors import InputError;"
        "assert issubclass(InputError, ValueError); print('ok')"
    )
    answer = _run("-c", code, cwd=ROOT)
    assert answer.stdout.strip() == "ok", answer.stderr
