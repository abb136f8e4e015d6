"""FFCV as a package: whether it is here, what it lacks, and imported without its side effects."""

import importlib.util
import shutil
import subprocess
from functools import cache

import torch

from fastiat.system.errors import InputError, one_line

LIBRARIES = {"libturbojpeg": "libturbojpeg0-dev", "opencv4": "libopencv-dev"}
"""What FFCV is built with, by pkg-config's name, and the Debian packages that have it."""


def missing_packages() -> list[str]:
    """Return the Debian packages that building FFCV needs and that are not found here."""
    if shutil.which("pkg-config") is None:
        return ["pkg-config", *LIBRARIES.values()]
    return [
        package
        for library, package in LIBRARIES.items()
        if subprocess.run(["pkg-config", "--exists", library], capture_output=True).returncode
    ]


def install_hint() -> str:
    """Say in one line that FFCV is not installed, and how that is done here."""
    return f"FFCV is not installed: {_first()}pip install 'fastiat[ffcv]'"


def _first() -> str:
    missing = missing_packages()
    return f"apt-get install {' '.join(missing)}, then " if missing else ""


def obstacle() -> str | None:
    """Return in one line why FFCV cannot be used and what mends it, or None where it can be.

    It is imported, which takes a few seconds the first time.
    """
    if importlib.util.find_spec("ffcv") is None:
        return install_hint()
    try:
        import_ffcv()
    except InputError as error:
        return str(error)
    return None


def installed() -> bool:
    """Whether FFCV is there and can be imported."""
    return obstacle() is None


def import_ffcv() -> None:
    """Import FFCV, and keep it from what it does to all of torch.

    It sets torch's threads to its own number, when it is imported and in every pass, which would
    change how the CPU computes. And where there is a CUDA device, its thread records events on
    the stream of the training, which spoils a CUDA graph that is being captured there; all that is
    asked of it here is memory of the host. Raises `InputError` where it cannot be imported.
    """
    threads = torch.get_num_threads()
    try:
        _import()
    # Libraries that do not fit each other raise whatever makes them stumble.
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and (error.name or "ffcv") == "ffcv":
            raise InputError(install_hint()) from None
        reason = one_line(error) or type(error).__name__
        raise InputError(
            f"FFCV is installed but cannot be imported ({reason}): {_first()}"
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
