"""Files of ours: written whole or not at all, JSON lines, and where a file may be put."""

import errno
import io
import json
import math
import os
from pathlib import Path
from typing import Any

from fastiat.system.errors import InputError
from fastiat.system.untrusted import LARGEST_ROW, is_endless


def no_link(file: str, flags: int) -> int:
    """Open a file, but no link, which might lead elsewhere, and no pipe, which might wait.

    For `open(..., opener=no_link)`.
    """
    return os.open(file, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def write(file: Path, content: bytes | memoryview, older: Path | None = None) -> None:
    """Write a file whole or not at all: beside it, flushed to the disk, then renamed onto it.

    What was there before is `older` from then on, if that is given.
    """
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with open(beside, "wb", opener=no_link) as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        if older is not None and file.exists():
            _keep(file, older)
        os.replace(beside, file)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            place = older if older is not None and error.filename == str(older) else file
            raise OSError(error.errno, error.strerror, str(place)) from None
        raise
    flush_folder(file.parent)


def flush_folder(folder: Path) -> None:
    """Have the disk keep the names in a folder, such as one that a file was just renamed to."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _keep(file: Path, older: Path) -> None:
    """Make `file` be `older` too, without a moment in which it is not there."""
    if older.is_dir():
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(older))
    beside = older.with_name(f".{older.name}.{os.getpid()}")
    try:
        os.link(file, beside)
    except OSError:  # this file system has no links
        os.replace(file, older)
        return
    os.replace(beside, older)
    # The system leaves both names where they were the same file already.
    beside.unlink(missing_ok=True)


def drop_cut_line(file: Path) -> None:
    """Cut a file after its last whole line."""
    try:
        with open(file, "r+b", opener=no_link) as opened:
            end = opened.seek(0, os.SEEK_END)
            opened.seek(max(end - 1, 0))
            if opened.read(1) in (b"", b"\n"):
                return
            opened.seek(0)
            opened.truncate(opened.read().rfind(b"\n") + 1)
    except FileNotFoundError:
        pass


def lines_of(file: Path) -> list[str]:
    """Return the lines of a file, with their ends, or nothing if it is not there.

    Raises `InputError` for a pipe or a device.
    """
    if is_endless(file):
        raise InputError(f"{file} is a pipe or a device: remove it")
    # Only "\n" ends a line: `str.splitlines` knows more.
    text = file.read_text(errors="replace") if file.exists() else ""
    return list(io.StringIO(text, newline="\n"))


def row_of(line: str) -> dict[str, Any] | None:
    """Read a line of metrics.jsonl, or return None if it is damaged."""
    try:
        row = json.loads(line) if len(line) <= LARGEST_ROW else None
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and line.endswith("\n") else None


def finite_json(text: str) -> Any:
    """Read JSON; raise `ValueError` also for NaN, infinity and numbers too large for a float."""

    def number(word: str) -> float:
        value = float(word)
        if not math.isfinite(value):
            raise ValueError(f"{word[:20]} is not finite")
        return value

    def whole(word: str) -> int:
        number(word)
        return int(word)

    return json.loads(text, parse_constant=number, parse_float=number, parse_int=whole)


def check_place(file: Path) -> None:
    """Raise `InputError` unless a file can be written at `file`, its folder made first."""
    if file.is_dir():
        raise InputError(f"{file} is a folder: name a file with --out")
    there = next(folder for folder in file.absolute().parents if folder.exists())
    if not there.is_dir():
        raise InputError(f"{there} is a file: choose another --out")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{there} cannot be written to: choose another --out")
