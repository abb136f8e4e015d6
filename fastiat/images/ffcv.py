"""The FFCV package: whether it is usable, what is missing, and its import without side effects."""

from functools import cache

import torch

from fastiat.system.errors import InputError, one_line

BUILD = "apt-get install pkg-config libturbojpeg0-dev libopencv-dev, then "
"""The Debian packages that FFCV is built with."""


def obstacle() -> str | None:
    """Return one line that says why FFCV cannot be used and how to correct that, else None.

    The first call imports FFCV, which takes a few seconds.
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
            raise InputError(f"FFCV is not installed: {BUILD}pip install 'fastiat[ffcv]'") from None
        reason = one_line(error) or type(error).__name__
        raise InputError(
            f"FFCV is installed but cannot be imported ({reason}): {BUILD}"
            "pip install --force-reinstall --no-deps ffcv"
        ) from None
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
