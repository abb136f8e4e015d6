"""Locks between processes: one training per run directory, one writer of its shared files.

The locks are `flock` locks: the system releases them when the process ends, also after kill -9.
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
"""The file descriptors of the locks that this process holds."""


def _forget() -> None:
    """In a forked child, close the inherited descriptors, which would keep the parent's locks."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)


class Lock:
    """A lock file, which one process at a time can lock; its content names that process.

    Neither forked children nor started programs inherit the lock.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._descriptor = -1

    def take(self) -> bool:
        """Make the file and lock it; return False if another process holds the lock.

        If the file system does not support locks, print a warning on stderr and return True.
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
            # Another process removed the file between `open` and `flock`: lock the new one.
            self.release()
        with suppress(OSError):  # on a full disk the file stays empty
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()} on {socket.gethostname()}".encode(), 0)
        return True

    def intact(self) -> bool:
        """Whether the locked file is still the one at its path."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self.file))
        except OSError:
            return False

    def release(self) -> None:
        """Release the lock; the file stays."""
        if self._descriptor in _held:
            _held.remove(self._descriptor)
            os.close(self._descriptor)
        self._descriptor = -1


def check_unused(file: Path) -> None:
    """Raise `InputError`, which names the process, if another one holds the lock on `file`."""
    with suppress(OSError):  # there is no such file, or it cannot be locked
        descriptor = os.open(file, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            name = os.pread(descriptor, 300, 0).decode(errors="replace") or "unknown"
            raise InputError(
                f"{file.parent} is in training by another process ({name}): wait for it, stop it, "
                f"or choose another --out"
            ) from None
        finally:
            os.close(descriptor)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the lock on `folder` while changing a file that trainings and measurements share."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # the file system does not support locks
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)
