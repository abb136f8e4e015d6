"""metrics.jsonl: one row, a JSON object, on each line."""

import io
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastiat.system.errors import InputError
from fastiat.system.files import no_link, write
from fastiat.system.untrusted import is_endless

LARGEST_ROW = 2**20
"""Longest line that is parsed, in characters."""


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows; raise `InputError` for a damaged line.

    An incomplete last line, which a crash leaves, is skipped.
    """
    for number, line in enumerate(_lines(file), 1):
        row = _row(line)
        if row is None and line.endswith("\n"):
            raise InputError(f"{file}, line {number} is damaged, it is no JSON object: remove it")
        if row is not None:
            yield row


def has_row(file: Path, values: dict[str, Any]) -> bool:
    """Whether a row has all these values; damaged lines are skipped."""
    # The values as JSON returns them: tuples become lists.
    wanted = json.loads(json.dumps(values))
    rows = map(_row, _lines(file))
    return any(row is not None and row | wanted == row for row in rows)


def drop_cut_line(file: Path) -> None:
    """Remove an incomplete last line: the text after the last newline."""
    with suppress(FileNotFoundError), open(file, "r+b", opener=no_link) as opened:
        end = opened.seek(0, os.SEEK_END)
        opened.seek(max(end - 1, 0))
        # The whole file is read only if its last line is incomplete.
        if opened.read(1) not in (b"", b"\n"):
            opened.seek(0)
            opened.truncate(opened.read().rfind(b"\n") + 1)


def drop_later_rows(file: Path, step: int, epoch: int) -> None:
    """Remove damaged lines, step rows after `step` and epoch rows after `epoch`."""

    def keep(line: str) -> bool:
        row = _row(line)
        if row is None or row.get("kind") not in ("step", "epoch"):
            return row is not None
        number = row.get(row["kind"])
        return isinstance(number, int) and number <= (epoch if row["kind"] == "epoch" else step)

    lines = _lines(file)
    kept = list(filter(keep, lines))
    if kept != lines:
        write(file, "".join(kept).encode())


def _lines(file: Path) -> list[str]:
    """Return the lines with their newlines, or [] if there is no file."""
    if is_endless(file):
        raise InputError(f"{file} is a pipe or a device: remove it")
    # Only "\n" ends a line: `str.splitlines` splits at other characters too.
    text = file.read_text(errors="replace") if file.exists() else ""
    return list(io.StringIO(text, newline="\n"))


def _row(line: str) -> dict[str, Any] | None:
    """Return the row on a line, or None if the line is damaged or incomplete."""
    try:
        row = json.loads(line) if len(line) <= LARGEST_ROW else None
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and line.endswith("\n") else None
