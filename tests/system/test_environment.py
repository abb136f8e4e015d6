"""Surroundings that a command must bear: ASCII terminals, no home, names that no font has."""

import html
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastiat import cli
from fastiat.page import figures
from fastiat.page.figures import Series

ROOT = Path(__file__).parents[2]
NAMES = ("\u732b", "\u0642\u0637", "\U0001f408", "caf\u00e9", "<i>&")
ASCII = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}


def fastiat(*arguments: object, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "fastiat", *map(str, arguments)]
    variables = {k: v for k, v in os.environ.items() if k not in ("HOME", "MPLCONFIGDIR")}
    variables |= {"PYTHONPATH": str(ROOT), "HOME": os.path.expanduser("~")} | environment
    return subprocess.run(command, env=variables, capture_output=True)


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on images whose classes have names in many scripts; not to be written to."""
    folder = tmp_path_factory.mktemp("scripts")
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in NAMES:
            (folder / "images" / split / name).mkdir(parents=True)
            for number in range(4):
                pixels = random.integers(0, 256, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "images" / split / name / f"{number}.png")
    flags = ["--arch", "mlp6", "--width", "8", "--epochs", "1", "--batch-size", "8"]
    flags += ["--steps", "1", "--device", "cpu"]
    data = ["--dataset", "folder", "--data-dir", str(folder / "images")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTIAT_CACHE", str(folder / "cache"))
        assert cli.main(["train", *flags, *data, "--out", str(folder / "\u732b")]) == 0
    return folder / "\u732b"


@pytest.mark.parametrize(
    "command",
    ["evaluate RUN --attacks none pgd-1", "sweep RUN --steps 1", "norms RUN", "report RUN"],
)
def test_an_ascii_terminal_gets_escapes_and_no_traceback(named, tmp_path, command):
    argv = command.replace("RUN", str(named)).split()
    if argv[0] in ("norms", "report"):
        argv += ["--out", str(tmp_path / "page.html")]
    ended = fastiat(*argv, PYTHONIOENCODING="ascii")
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert ended.stdout.isascii()


def test_help_and_doctor_run_in_the_c_locale(tmp_path):
    for argv in (["--help"], ["train", "--help"], ["doctor", "--device", "cpu"]):
        ended = fastiat(*argv, **ASCII)
        assert (ended.returncode, ended.stderr) == (0, b"")


def test_a_page_has_the_names_and_its_figures_no_warnings(named, tmp_path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cli.main(["report", str(named), "--out", str(tmp_path / "page.html")]) == 0
    assert not capfd.readouterr().err
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert all(html.escape(name) in page for name in NAMES) and "<i>&" not in page


def test_a_figure_writes_what_its_font_lacks_as_escapes():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = figures.lines("x", "caf\u00e9 \u732b", [Series("\U0001f408", [(1.0, 2.0)])], "x")
    assert "caf\u00e9 \\u732b" in picture.svg and "\\U0001f408" in picture.svg


@pytest.mark.parametrize("home", ["/nonexistent", "/dev/null"])
def test_without_a_home_a_report_has_no_warning(named, tmp_path, home):
    ended = fastiat(
        "report", named, "--out", tmp_path / "page.html", HOME=home, TMPDIR=str(tmp_path)
    )
    assert (ended.returncode, ended.stderr) == (0, b"")
    (folder,) = tmp_path.glob("fastiat-cache-*")
    assert folder.stat().st_mode & 0o777 == 0o700
