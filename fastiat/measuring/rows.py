"""A JSON list of dataclass objects in a run directory: norms.json and diagnosis.json."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from fastiat.system.errors import InputError
from fastiat.system.files import finite_json, write
from fastiat.system.settings import expanded, from_json
from fastiat.system.untrusted import read_json_text

T = TypeVar("T")


def read_rows(run_dir: str | os.PathLike[str], name: str, kind: type[T]) -> list[T]:
    """Return the objects of the dataclass `kind` in a run's file `name`, [] if it is not there.

    Raises `InputError`, naming the file, where it is damaged.
    """
    file = Path(expanded(run_dir)) / name
    try:
        rows = finite_json(read_json_text(file))
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise InputError("it is not a list of JSON objects")
        return [from_json(kind, row) for row in rows]
    except FileNotFoundError:
        return []
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    # TypeError: a field without a value, of which there is no default.
    except (ValueError, TypeError, RecursionError):
        raise InputError(f"{file} is damaged: remove it and make it again") from None


def write_rows(file: Path, rows: Sequence[Any]) -> None:
    """Write dataclass objects as a JSON list, the whole file or nothing."""
    text = json.dumps([asdict(row) for row in rows], indent=1, allow_nan=False)
    write(file, f"{text}\n".encode())
