"""The one exception that means "your input is wrong, and here is what would mend it"."""

import errno

MENDS = {
    errno.ENOSPC: "free some space on that disk",
    errno.EDQUOT: "free some of your quota on that disk",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EROFS: "choose a place that can be written to",
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
}


class InputError(ValueError):
    """What was asked for cannot be done; the message says what is wrong and how to mend it.

    The command line prints it as one line and exits with status 2. It is a `ValueError`, so
    library users need not know it.
    """


def explain_os(error: OSError) -> str:
    """Say in one line what the system refused, where, and what mends it."""
    where = f": {error.filename}" if error.filename else ""
    mend = MENDS.get(error.errno or 0)
    return f"{error.strerror or error}{where}" + (f": {mend}" if mend else "")
