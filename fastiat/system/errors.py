"""Exceptions that the command line reports in one line, and functions that write the line."""

import errno
import importlib
import sys
from collections.abc import Callable
from typing import Any

LONGEST_LINE = 2000
"""Maximum length of a message, in characters."""

REMEDIES = {
    errno.ENOSPC: "free some space on that disk",
    errno.EDQUOT: "free some of your quota on that disk",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EROFS: "choose a place that can be written to",
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.EISDIR: "move that folder away",
    errno.ELOOP: "remove that link",
}
"""Maps the errno of an `OSError` to the remedy that `explain_os` adds to its message."""


class InputError(ValueError):
    """The input is wrong; the message says what is wrong and how to correct it.

    The command line prints it as one line and exits with status 2.
    """


def optional(package: str, extra: str) -> Any:
    """Import a package of one of fastiat's extras; raise `InputError` if it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise InputError(
            f"the package {package} is needed: install it with pip install 'fastiat[{extra}]'"
        ) from None


class RankLostError(Exception):
    """A collective failed because another rank has ended, so this rank cannot continue."""


may_report: Callable[[], bool] = lambda: True  # noqa: E731
"""Whether this process prints its error message; of several ranks only one does."""


def complain(line: str) -> None:
    """Print an error message on stderr, if this process is the one that reports."""
    if may_report():
        print(line, file=sys.stderr, flush=True)


class DamagedError(InputError):
    """A file that fastiat wrote is damaged; the caller may read an older copy of it instead."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the host or the GPU has run out of memory.

    torch raises `RuntimeError` for this, also for other errors, so its text decides. The texts are
    those of torch's CPU and CUDA allocators, cuBLAS, the system and the C++ library.
    """
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
    """Return one line for a system error: the reason, the file and, if one is known, the remedy."""
    where = f": {error.filename}" if error.filename else ""
    remedy = REMEDIES.get(error.errno or 0)
    return f"{error.strerror or error}{where}" + (f": {remedy}" if remedy else "")


def printable(text: object) -> str:
    """Return a text as one line, with control characters escaped as in Python source."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def printable_lines(text: str) -> str:
    """Return a text of several lines, each of them `printable`."""
    return "\n".join(map(printable, text.split("\n")))


def one_line(text: object) -> str:
    """Return a `printable` text; if longer than `LONGEST_LINE`, " ... " replaces its middle."""
    line = printable(text)
    if len(line) <= LONGEST_LINE:
        return line
    return f"{line[: LONGEST_LINE // 2]} ... {line[5 - LONGEST_LINE // 2 :]}"
