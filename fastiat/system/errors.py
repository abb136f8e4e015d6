"""The one exception that means "your input is wrong, and here is what would mend it"."""

import errno
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LONGEST_LINE = 2000
"""Characters that a message may have."""

MENDS = {
    errno.ENOSPC: "free some space on that disk",
    errno.EDQUOT: "free some of your quota on that disk",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EROFS: "choose a place that can be written to",
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.EISDIR: "move that folder away",
    errno.ELOOP: "remove that link",
}


class InputError(ValueError):
    """What was asked for cannot be done; the message says what is wrong and how to mend it.

    The command line prints it as one line and exits with status 2. It is a `ValueError`, so
    library users need not know it.
    """


class Lost(Exception):
    """Another process of the same job ended before its time, so that this one cannot go on."""


# Of several processes that end together, one says why.
may_speak: Callable[[], bool] = lambda: True  # noqa: E731


def complain(line: str) -> None:
    """Print the line that a command ends with."""
    if may_speak():
        print(line, file=sys.stderr, flush=True)


_interrupts: list[int] = []


@contextmanager
def noting_interrupts() -> Iterator[None]:
    """Note what SIGINT raises: `import numpy` from torch's C code swallows it, and is left half."""

    def note(number: int, _: object) -> None:
        _interrupts.append(number)
        raise KeyboardInterrupt

    _interrupts.clear()
    # Where SIGINT is ignored, as under nohup, it stays so.
    ours = threading.current_thread() is threading.main_thread() and (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def interrupted() -> bool:
    """Whether a `KeyboardInterrupt` was noted."""
    return bool(_interrupts)


def check_interrupts() -> None:
    """Raise `KeyboardInterrupt` if one was noted."""
    if interrupted():
        raise KeyboardInterrupt


class Damaged(InputError):
    """A file that we wrote is not what it was; where there is an older one, that may do."""


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the host or, which torch tells by a `RuntimeError`, elsewhere."""
    signs = (
        "out of memory",
        "not enough memory",
        "can't allocate memory",
        "calculation overflowed",
        "bad_alloc",
        "ALLOC_FAILED",
    )
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    )


def explain_os(error: OSError) -> str:
    """Say in one line what the system refused, where, and what mends it."""
    where = f": {error.filename}" if error.filename else ""
    mend = MENDS.get(error.errno or 0)
    return f"{error.strerror or error}{where}" + (f": {mend}" if mend else "")


def printable(text: object) -> str:
    """Return a text as one line; what a terminal would act on is written as Python writes it."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def printable_lines(text: str) -> str:
    """Return a text of several lines, each of them `printable`."""
    return "\n".join(map(printable, text.split("\n")))


def one_line(text: object) -> str:
    """Return a text as a message: `printable`, and cut in its middle where it is very long."""
    line = printable(text)
    if len(line) <= LONGEST_LINE:
        return line
    return f"{line[: LONGEST_LINE // 2]} ... {line[5 - LONGEST_LINE // 2 :]}"
