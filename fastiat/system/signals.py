"""SIGINT and SIGTERM: recorded until an update is done, or raised at once as an exception.

This module does not import torch, so that a wrong argument is reported without delay.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class SignalInterrupt(KeyboardInterrupt):
    """The signal `signum` has arrived in a block of `Signals.at_once`.

    It is a `KeyboardInterrupt`, so that no `except Exception` handles it as an error.
    """

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.signum = signum


class TrainingInterrupt(Exception):
    """The signal `signum` ended a training after a checkpoint; the message says how to resume."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


class Signals:
    """Handle SIGINT and SIGTERM in a `with` block; in other threads than the main one, do nothing.

    The first signal is recorded in `received` (0: none) so that the update can finish; a second
    signal with the same number ends the process. Under torchrun (`second_ends=False`) a second
    signal is recorded too, because every rank gets each signal twice: from SLURM, and from
    torchrun, which forwards the signal that it has received.
    """

    def __init__(self, second_ends: bool = True) -> None:
        self.received = 0
        self._second_ends = second_ends
        self._raising = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        # A rank that fails keeps the handlers: torchrun's SIGTERM must not cut off its message.
        if self._second_ends or error is None:
            for number, handler in self._previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, _: object) -> None:
        self.received = number
        # The previous handler, usually Python's default, handles the second signal.
        if self._second_ends:
            signal.signal(number, self._previous[number])
        if self._raising:
            raise SignalInterrupt(number)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise `SignalInterrupt` in the block when a signal arrives, or if one already has."""
        self._raising = True
        try:
            if self.received:
                raise SignalInterrupt(self.received)
            yield
        finally:
            self._raising = False


_interrupts: list[int] = []
"""The signals that have arrived in the latest block of `remembering_interrupts`."""


@contextmanager
def remembering_interrupts() -> Iterator[None]:
    """Remember every SIGINT of the block, so that a lost `KeyboardInterrupt` is raised again.

    torch imports NumPy from C, which swallows `KeyboardInterrupt` and leaves NumPy half imported:
    remember the signal, and raise it in place of the error that follows, or where
    `check_interrupts` is called.
    """

    def handle(number: int, _: object) -> None:
        _interrupts.append(number)
        raise KeyboardInterrupt

    _interrupts.clear()
    # Where SIGINT is ignored, as under nohup, it stays ignored.
    handled = threading.current_thread() is threading.main_thread() and (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if handled:
        signal.signal(signal.SIGINT, handle)
    try:
        yield
    except Exception as error:
        # An error with a signal number, a `TrainingInterrupt`, reports the signal itself.
        if not hasattr(error, "signum"):
            check_interrupts()
        raise
    finally:
        if handled:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def check_interrupts() -> None:
    """Raise `KeyboardInterrupt` if a SIGINT arrived in the block of `remembering_interrupts`."""
    if _interrupts:
        raise KeyboardInterrupt
