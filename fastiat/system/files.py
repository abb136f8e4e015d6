"""Writing files whole or not at all, and checking where a file can be written."""

import errno
import os
from pathlib import Path

from fastiat.system.errors import InputError


def no_link(file: str, flags: int) -> int:
    """Open a file, for `open(..., opener=no_link)`; raise `OSError` for a symbolic link.

    A link in a folder that somebody else made may lead to any file. A pipe is opened without
    waiting for its other end.
    """
    return os.open(file, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def write(file: Path, content: bytes | memoryview, older: Path | None = None) -> None:
    """Write a file whole or not at all: to a file beside it, fsync, then rename onto it.

    With `older`, the file's previous content is kept under that name. Raises `OSError` that names
    the file that could not be written.
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
    """fsync a folder: a rename in it is on the disk only after that."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _keep(file: Path, older: Path) -> None:
    """Give `file` the second name `older`; `file` exists at every moment."""
    if older.is_dir():
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(older))
    beside = older.with_name(f".{older.name}.{os.getpid()}")
    try:
        # A hard link, renamed, replaces `older` in one step.
        os.link(file, beside)
    except OSError:  # the file system has no hard links
        os.replace(file, older)
        return
    os.replace(beside, older)
    # `rename` does nothing, and leaves both names, where they were one file already.
    beside.unlink(missing_ok=True)


def check_place(file: Path) -> None:
    """Raise `InputError` unless a file can be written at `file`; its folder may not exist yet."""
    if file.is_dir():
        raise InputError(f"{file} is a folder: name a file with --out")
    check_writable(file.absolute().parent)


def check_writable(folder: Path) -> None:
    """Raise `InputError` unless files can be made in `folder`, or `folder` itself can be made."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise InputError(f"{there} is a file: choose another --out")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{there} cannot be written to: choose another --out")
