"""Writing files whole or not at all, and checking where a file can be written."""

import errno
import os
from pathlib import Path

from fastiat.system.errors import InputError


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


def check_place(file: Path) -> None:
    """Raise `InputError` unless a file can be written at `file`, its folder made first."""
    if file.is_dir():
        raise InputError(f"{file} is a folder: name a file with --out")
    there = next(folder for folder in file.absolute().parents if folder.exists())
    if not there.is_dir():
        raise InputError(f"{there} is a file: choose another --out")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{there} cannot be written to: choose another --out")
