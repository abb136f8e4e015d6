"""Set up the process of the `fastiat` command: standard streams and cache folders."""

import io
import os
import stat
import sys
import tempfile


def open_standard_streams() -> None:
    """Open /dev/null for each standard stream that the shell has closed (`2>&-`).

    Otherwise the next file that is opened gets the descriptor of the closed stream: a checkpoint
    with descriptor 2 would receive the text that libraries write to stderr.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            # Characters that the terminal's encoding lacks are written as Python escapes.
            stream.reconfigure(errors="backslashreplace")


def find_caches() -> None:
    """Set cache folders for libraries if the user has no writable home directory.

    Without a cache folder matplotlib warns, and torch's compiler and Triton fail. Environment
    variables that are already set keep their values.
    """
    home = os.path.expanduser("~")
    if home != "~" and os.path.isdir(home) and os.access(home, os.W_OK | os.X_OK):
        return
    folder = os.path.join(tempfile.gettempdir(), f"fastiat-cache-{os.getuid()}")
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        # The compilers run code from this folder, so no other user may have write access to it.
        there = os.lstat(folder)
        ours = stat.S_ISDIR(there.st_mode) and there.st_uid == os.getuid()
        if not ours or there.st_mode & 0o022:
            folder = tempfile.mkdtemp(prefix="fastiat-cache-")
    except OSError:
        return  # there is no temporary folder either; the libraries report that themselves
    names = {
        "MPLCONFIGDIR": "matplotlib",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "TRITON_CACHE_DIR": "triton",
    }
    # XDG_CACHE_HOME is where data sets and .beton files are cached. It is not set for an existing
    # home, which may hold them already, nor for an unknown home ("~"): for that, a later error
    # names the variable to set.
    if home != "~" and not os.path.isdir(home):
        names["XDG_CACHE_HOME"] = "cache"
    for variable, name in names.items():
        if variable not in os.environ:
            os.environ[variable] = os.path.join(folder, name)
            os.makedirs(os.environ[variable], exist_ok=True)
