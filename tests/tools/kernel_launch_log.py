"""A pytest plugin (`-p kernel_launch_log`) that notes which kernels the interpreter ran.

The names go to the file named by KERNEL_LAUNCH_LOG, for `test_kernel_gates.py` to read.
"""

import os
from pathlib import Path
from typing import Any

from triton.runtime.interpreter import InterpretedFunction

launched: set[str] = set()
_run = InterpretedFunction.run


def _noting_run(self: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
    launched.add(self.fn.__name__)
    return _run(self, *args, **kwargs)


def pytest_configure() -> None:
    InterpretedFunction.run = _noting_run


def pytest_sessionfinish() -> None:
    Path(os.environ["KERNEL_LAUNCH_LOG"]).write_text("\n".join(sorted(launched)))
