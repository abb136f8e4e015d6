"""The package FFCV: whether it can be used, what is missing, and import without side effects."""

import shutil
import subprocess
from functools import cache

import torch

from fastiat.system.errors import InputError, one_line

LIBRARIES = {"libturbojpeg": "libturbojpeg0-dev", "opencv4": "libopencv-dev"}
"""The libraries that FFCV is built with: {name for pkg-config: Debian package}."""


def _install_first() -> str:
    """Return the command that installs the Debian packages that building FFCV needs, or ""."""
    if shutil.which("pkg-config") is None:
        missing = ["pkg-config", *LIBRARIES.values()]
    else:
        missing = [
            package
            for library, package in LIBRARIES.items()
            if subprocess.run(["pkg-config", "--exists", library], capture_output=True).returncode
        ]
    return f"apt-get install {' '.join(missing)}, then " if missing else ""


def obstacle() -> str | None:
    """Return in one line why FFCV cannot be used and how to correct that; None if it can be used.

    This imports FFCV, which takes a few seconds the first time.
    """
    try:
        import_ffcv()
    except InputError as error:
        return str(error)
    return None


def installed() -> bool:
    """Whether FFCV can be imported."""
    return obstacle() is None


def import_ffcv() -> None:
    """Import FFCV without its side effects on torch.

    FFCV sets torch's number of threads, when it is imported and in every pass, which would change
    the results of the CPU. On a machine with a CUDA device its thread also records events on the
    stream of the training, which would break a CUDA graph that is being captured; fastiat uses
    FFCV for host memory only. Raises `InputError` if FFCV cannot be imported.
    """
    threads = torch.get_num_threads()
    try:
        _import()
    # Libraries that do not fit each other raise whatever makes them stumble.
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and (error.name or "ffcv") == "ffcv":
            raise InputError(
                f"FFCV is not installed: {_install_first()}pip install 'fastiat[ffcv]'"
            ) from None
        reason = one_line(error) or type(error).__name__
        raise InputError(
            f"FFCV is installed but cannot be imported ({reason}): {_install_first()}"
            "pip install --force-reinstall --no-deps ffcv"
        ) from None
    finally:
        torch.set_num_threads(threads)


@cache
def _import() -> None:
    import ffcv.loader.epoch_iterator
    import numba
    from ffcv.pipeline.compiler import Compiler

    def set_num_threads(count: int) -> None:
        Compiler.num_threads = count
        numba.set_num_threads(count)

    Compiler.set_num_threads = set_num_threads
    ffcv.loader.epoch_iterator.IS_CUDA = False
