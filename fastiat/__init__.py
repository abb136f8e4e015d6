"""fastiat: Interpolated Adversarial Training with compiled steps, fused kernels, CUDA graphs.

A submodule is imported when it is first used, so that `fastiat --help` does not wait for torch.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "evaluate_model", "fit", "load"]

if TYPE_CHECKING:
    from fastiat.api import evaluate_model, fit
    from fastiat.runs.directory import load

_NAMES = {
    "evaluate_model": "fastiat.api",
    "fit": "fastiat.api",
    "load": "fastiat.runs.directory",
}
"""The module that defines each public function."""

_SUBMODULES = {module.name for module in pkgutil.iter_modules(__path__)} - {"__main__"}


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"fastiat.{name}")
    raise AttributeError(f"module 'fastiat' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
