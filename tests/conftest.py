"""What all tests share.

The gpu marker, poisoned memory for the kernels' tests, a small training run once, and a check of
complaints. Under CI nothing may be skipped: what a test relies on must be there.
"""

import math
import os
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import drycuda
import hypothesis
import pytest
import torch
from disks import can_mount

from fastiat import cli
from fastiat.system import progress
from fastiat.train import Trainer

# No test may fail because the machine is busy.
hypothesis.settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("untimed")

pytest_plugins = ["archives"]

LONGEST = ("test_headline.py", "test_engine.py", "test_drycuda.py", "test_distributed.py")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    on_gpu = torch.cuda.is_available() and not INTERPRETED
    applies = {
        "gpu": on_gpu,
        "kernel_only": on_gpu or INTERPRETED,
        # The interpreter stands in for the CPU's reference.
        "reference_only": not INTERPRETED,
        "mounts": can_mount(),
        "drycuda": drycuda.missing() is None,
    }
    out = [marker for marker, here in applies.items() if not here]
    dropped = [item for item in items if any(map(item.get_closest_marker, out))]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in set(dropped)]
    # The longest files start first, so that all others run beside them under pytest-xdist.
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    # A new version of torch has no counts yet, see test_drycuda.py.
    skipped = [report for report in skipped if "no counts for torch" not in report.longrepr[-1]]
    if skipped and os.environ.get("CI") and session.exitstatus == pytest.ExitCode.OK:
        for report in skipped:
            reporter.write_line(f"skipped under CI: {report.nodeid}: {report.longrepr[-1]}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a kernel test runs; "cpu" is Triton's interpreter under TRITON_INTERPRET=1."""
    return request.param


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """In kernel tests fresh memory is NaN (ints: 0x55...), so that what is never written shows."""
    if not request.module.__name__.startswith("test_kernel_"):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(owner, name, _poisoning(getattr(owner, name)))
        yield


def _poisoning(allocate):  # type: ignore[no-untyped-def]
    def poisoned(*args, **kwargs):  # type: ignore[no-untyped-def]
        x = allocate(*args, **kwargs)
        if type(x) is not torch.Tensor or x.requires_grad:  # torch's own, while it traces
            return x
        return x.fill_(float("nan") if x.is_floating_point() else 0x55)

    return poisoned


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
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The training of `trained`, stopped at step 30, with checkpoints of steps 29 and 30."""
    out, original = tmp_path / "stopped", Trainer.update

    def update(self, *batch):  # type: ignore[no-untyped-def]
        result = original(self, *batch)
        if self.step == 30:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", update)
        command = ["train", *SMALL, "--checkpoint-every", "0", "--out", str(out)]
        assert cli.main(command) == 143
    return out


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that tells digits apart, most of the time; not to be written to."""
    out = tmp_path_factory.mktemp("runs") / "good"
    network = ("--arch", "preact18", "--width", "6", "--adv", "none", "--mix", "none")
    flags = (*network, "--lr", "0.1", "--schedule", "cosine", "--pad", "0", "--epochs", "4")
    assert cli.main(["train", *SMALL, *flags, "--out", str(out)]) == 0
    return out


@pytest.fixture
def complaint(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command, check that it ends with status 2 and one line on stderr; return that."""

    def call(*argv: object) -> str:
        capsys.readouterr()
        with (
            warnings.catch_warnings(record=True) as warned,
            # A slow machine would write progress lines above the complaint.
            pytest.MonkeyPatch.context() as patch,
        ):
            warnings.simplefilter("always")
            patch.setattr(progress, "PLAIN_EVERY", math.inf)
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
