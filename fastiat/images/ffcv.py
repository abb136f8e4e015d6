"""The FFCV package: whether it is usable, what is missing, and its import without side effects."""

import ctypes
import importlib.util
from functools import cache
from pathlib import Path

import torch

from fastiat.system.errors import InputError, one_line

BUILD = "apt-get install pkg-config libturbojpeg0-dev libopencv-dev, then "
"""The Debian packages that FFCV is built with."""


def _not_installed() -> str:
    return f"FFCV is not installed: {BUILD}pip install 'fastiat[ffcv]'"


def _broken(reason: str) -> str:
    return (
        f"FFCV is installed but cannot be imported ({reason}): {BUILD}"
        "pip install --force-reinstall --no-deps ffcv"
    )


def obstacle() -> str | None:
    """Return one line that says why FFCV cannot be used and how to correct that, else None.

    The first call imports FFCV, which takes a few seconds.
    """
    try:
        import_ffcv()
    except InputError as error:
        return str(error)
    return None


def apparent_obstacle() -> str | None:
    """Return what `obstacle` returns, judged by FFCV's C library alone, without the import."""
    spec = importlib.util.find_spec("ffcv")
    folders = spec.submodule_search_locations or () if spec else ()
    libraries = [file for folder in folders for file in Path(folder).glob("_libffcv*")]
    if not libraries:
        return _not_installed()
    try:
        ctypes.CDLL(str(libraries[0]))
    except OSError as error:
        return _broken(one_line(error))
    return None


def installed() -> bool:
    """Whether FFCV can be imported."""
    return obstacle() is None


def import_ffcv() -> None:
    """Import FFCV without its side effects on torch; raise `InputError` if that is not possible.

    When it is imported and in every pass, FFCV sets torch's number of threads, which would change
    results on the CPU. With CUDA, its thread also records events on the stream of the training,
    which would break a CUDA graph capture; decoding into host memory needs no events.
    """
    threads = torch.get_num_threads()
    try:
        _import()
    # Incompatible versions of FFCV, numba, NumPy and the C libraries raise errors of any type.
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and (error.name or "ffcv") == "ffcv":
            raise InputError(_not_installed()) from None
        raise InputError(_broken(one_line(error) or type(error).__name__)) from None
    finally:
        torch.set_num_threads(threads)


@cache
def _import() -> None:
    """Import FFCV and replace its code that sets torch's threads and records CUDA events."""
    import ffcv.loader.epoch_iterator
    import numba
    from ffcv.pipeline.compiler import Compiler

    def set_num_threads(count: int) -> None:
        Compiler.num_threads = count
        numba.set_num_threads(count)

    Compiler.set_num_threads = set_num_threads
    ffcv.loader.epoch_iterator.IS_CUDA = False
