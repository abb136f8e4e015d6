"""SIGINT and SIGTERM while something must not be cut off in its middle."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastiat.system.ranks import ranks


class Now(BaseException):
    """A signal came in a block that it is to end."""


class Signals:
    """SIGINT and SIGTERM, noted instead of dying of the first; the second of a kind kills.

    Not where several ranks train: what SLURM sends to all processes torchrun then sends once more,
    and it kills by itself those that do not end within half a minute.
    """

    def __init__(self) -> None:
        self.received = 0
        self._at_once = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self.received and not ranks().alone:
            return  # the second may still be on its way
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        self.received = number
        if ranks().alone:
            signal.signal(number, self._before[number])
        if self._at_once:
            raise Now

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """End the block with `Now` as soon as a signal comes."""
        self._at_once = True
        try:
            if self.received:
                raise Now
            yield
        finally:
            self._at_once = False
