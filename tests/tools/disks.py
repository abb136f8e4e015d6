"""File systems that a test mounts for itself."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path


@contextmanager
def disk(folder: Path, *options: str) -> Iterator[None]:
    """Make `folder` a disk of its own while the block runs."""
    mount = ["mount", "-t", "tmpfs", *(f"-o{option}" for option in options), "tmpfs", str(folder)]
    subprocess.run(mount, check=True, capture_output=True)
    try:
        yield
    finally:
        if os.path.ismount(folder):
            subprocess.run(["umount", str(folder)], check=True)


@cache
def can_mount() -> bool:
    """Whether we may mount: as root, where the container allows it."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with disk(Path(folder)):
                return True
        except (OSError, subprocess.SubprocessError):
            return False
