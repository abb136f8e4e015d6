"""fastiat: Interpolated Adversarial Training with compiled steps, fused kernels, CUDA graphs.

A submodule is imported when it is first used, so that `fastiat --help` does not wait for torch.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

if TYPE_CHECKING:
    from fastiat.runs.directory import load

_SUBMODULES = {module.name for module in pkgutil.iter_modules(__path__)} - {"__main__"}


def __getattr__(name: str) -> Any:
    if name == "load":
        return importlib.import_module("fastiat.runs.directory").load
    if name in _SUBMODULES:
        return importlib.import_module(f"fastiat.{name}")
    raise AttributeError(f"module 'fastiat' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
