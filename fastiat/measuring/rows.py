"""A JSON list of dataclass objects in a run directory: norms.json and diagnosis.json."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from fastiat.system.files import write
from fastiat.system.settings import expanded
from fastiat.system.untrusted import read_as

T = TypeVar("T")


def read_rows(run_dir: str | os.PathLike[str], name: str, kind: type[T]) -> list[T]:
    """Return the objects of the dataclass `kind` in a run's file `name`, [] if there is no file.

    Raises `InputError`, which names the file, if the file is damaged.
    """
    file = Path(expanded(run_dir)) / name
    if not file.exists():
        return []
    return read_as(file, list[kind], "remove it and make it again")  # type: ignore[valid-type]


def write_rows(file: Path, rows: Sequence[Any]) -> None:
    """Write dataclass objects as a JSON list, atomically: the whole file or nothing."""
    text = json.dumps([asdict(row) for row in rows], indent=1, allow_nan=False)
    write(file, f"{text}\n".encode())
