"""What the tests of the command share: a small training, run once, and a check of complaints."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from fastiat import cli

SMALL = (
    *("--dataset", "digits", "--arch", "mlp6", "--width", "16", "--steps", "1"),
    *("--lr", "0.02", "--epochs", "2", "--device", "cpu", "--precision", "fp32"),
    *("--eval-limit", "40"),
)


@pytest.fixture(scope="session")
def small() -> tuple[str, ...]:
    """Flags of a training that takes a second, but not --out."""
    return SMALL


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished and evaluated run; not to be written to."""
    run = tmp_path_factory.mktemp("runs") / "trained"
    assert cli.main(["train", *SMALL, "--out", str(run)]) == 0
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def complaint(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command, check that it ends with status 2 and one line on stderr; return that."""

    def call(*argv: object) -> str:
        capsys.readouterr()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                status = cli.main([str(part) for part in argv])
            except SystemExit as exit_:
                status = exit_.code
        assert not [str(warning.message) for warning in warned]
        err = capsys.readouterr().err
        assert status == 2, err
        assert err.startswith("fastiat") and err.endswith("\n") and err.count("\n") == 1, err
        return err

    return call


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, bytes]]:
    """Return a folder's files with their bytes, to compare before and after."""

    def read(folder: Path) -> dict[str, bytes]:
        return {
            str(file.relative_to(folder)): file.read_bytes()
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }

    return read
