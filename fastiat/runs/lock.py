"""Locks between processes: one training in a run directory, one writer of its shared files.

They are `flock`s, which the system drops with the process that holds them, however it dies.
"""

import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastiat.system.errors import InputError

_held: set[int] = set()


def _forget() -> None:
    """Close, in a forked child, what would keep its parent's locks beyond the parent's death."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)


class Lock:
    """A file that one process at a time holds; it says which one does.

    Neither a forked child nor a started program keeps the lock.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._descriptor = -1

    def take(self) -> bool:
        """Make the file and lock it; return False where another process has it.

        A file system that cannot lock gets a warning on stderr, and True.
        """
        while True:
            descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return False
            except OSError as error:
                print(
                    f"fastiat: warning: {self.file.parent} cannot be locked ({error.strerror}): "
                    f"make sure yourself that no other training writes to it",
                    file=sys.stderr,
                )
            self._descriptor = descriptor
            _held.add(descriptor)
            if self.intact():
                break
            self.release()  # it was removed while we waited to open it
        with suppress(OSError):  # on a full disk it does without a name
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()} on {socket.gethostname()}".encode(), 0)
        return True

    def intact(self) -> bool:
        """Whether the file that is locked is still the one at its place."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self.file))
        except OSError:
            return False

    def release(self) -> None:
        """Let go of the lock; the file stays."""
        if self._descriptor in _held:
            _held.remove(self._descriptor)
            os.close(self._descriptor)
        self._descriptor = -1


def holder(file: Path) -> str | None:
    """Return which process holds the lock on `file`, "PID on HOST", or None where none does."""
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(descriptor, 300, 0).decode(errors="replace") or "unknown"
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return None


def check_unused(file: Path) -> None:
    """Raise `InputError` where another process holds the lock of a run directory."""
    name = holder(file)
    if name is not None:
        raise InputError(
            f"{file.parent} is in training by another process ({name}): wait for it, stop it, "
            f"or choose another --out"
        )


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other commands from changing the files that trainings and measurements share."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # where it cannot be locked
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)
