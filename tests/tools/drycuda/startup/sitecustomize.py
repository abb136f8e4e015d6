"""Python runs this at the start of every process whose PYTHONPATH has this folder.

It prepares the process, and hides packages that a rented GPU machine does not have.
"""

import sys

from drycuda import inside

ABSENT = ("pyautoattack", "ffcv", "timm", "sklearn", "onnx", "xdist", "torchattacks", "foolbox")
sys.modules.update(dict.fromkeys(ABSENT))  # type: ignore[arg-type]
inside.prepare()
