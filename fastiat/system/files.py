"""Functions that write files atomically and check whether a place is writable."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from fastiat.system.errors import InputError


def no_link(file: str, flags: int) -> int:
    """Open a file as `open(..., opener=no_link)`; raise `OSError` for a symbolic link.

    In a folder that another person made, a link may point to any file of the user. Opening a pipe
    does not wait for its other end.
    """
    return os.open(file, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def write(file: Path, content: bytes | memoryview, older: Path | None = None) -> None:
    """Write a file atomically, as `replacing` does."""
    with replacing(file, older) as out:
        out.write(content)


@contextmanager
def replacing(file: Path, older: Path | None = None) -> Iterator[IO[bytes]]:
    """Yield a new file beside `file`; after the block, fsync it and rename it onto `file`.

    After an error the new file is removed. With `older`, the previous content of `file` is kept in
    that file. Raises `OSError`, which names the file that could not be written.
    """
    beside = file.with_name(f"{temporary_prefix(file)}{os.getpid()}.part")
    try:
        with open(beside, "w+b", opener=no_link) as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        if older is not None and file.exists():
            _keep(file, older)
        os.replace(beside, file)
    except BaseException as error:
        with suppress(OSError):  # on a read-only file system this fails too
            beside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            place = older if older is not None and error.filename == str(older) else file
            raise OSError(error.errno, error.strerror, str(place)) from None
        raise
    flush_folder(file.parent)


def temporary_prefix(file: Path) -> str:
    """Return how the names of this machine's unfinished copies of a file begin; a PID follows."""
    return f".{file.name}.{socket.gethostname().replace('.', '-')}."


def flush_folder(folder: Path) -> None:
    """fsync a folder, so that a rename in it survives a power cut."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _keep(file: Path, older: Path) -> None:
    """Keep the content of `file` as `older`.

    With hard links `file` exists at every moment; on a file system without them it is renamed.
    """
    if older.is_dir():
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(older))
    beside = older.with_name(f".{older.name}.{os.getpid()}")
    try:
        # Renaming a hard link onto `older` replaces it in one step.
        os.link(file, beside)
    except OSError:  # the file system has no hard links
        os.replace(file, older)
        return
    os.replace(beside, older)
    # `rename` does nothing and leaves `beside` if both names are links to the same file.
    beside.unlink(missing_ok=True)


def check_new(file: Path, force: bool) -> None:
    """Raise `InputError` unless `file` can be made; with `force` it may be a file already."""
    if os.path.lexists(file) and not force:
        raise InputError(f"{file} exists already: choose another name, or replace it with --force")
    if file.is_dir():
        raise InputError(f"{file} is a folder: name a file in it")
    if not file.parent.is_dir():
        raise InputError(f"the folder of {file} does not exist: create it, or choose another")


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
