"""What this machine has, and which engine, loader and precision a run would take."""

import importlib.metadata
import os
import platform

import torch

from fastiat import __version__, data
from fastiat.engine.device import free_memory, has_fast_bf16, pick_device, pick_precision
from fastiat.engine.graphs import pick_engine
from fastiat.images.ffcv import obstacle
from fastiat.queries import DoctorConfig
from fastiat.system.errors import InputError
from fastiat.system.ranks import ranks

PACKAGES = ("torch", "torchvision", "triton", "numpy", "ffcv", "torchattacks", "foolbox")


def doctor(config: DoctorConfig) -> None:
    """Print the machine, the packages and what `fastiat train` would choose here."""
    device = pick_device(config.device)
    rows = [
        ("fastiat", __version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"),
    ]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        seen = torch.cuda.get_device_properties(index)
        rows.append((f"cuda:{index}", f"{seen.name}, {seen.total_memory / 2**30:.0f} GiB"))
    if not torch.cuda.is_available():
        rows.append(("cuda", "no device"))
    rows += [(package, _version(package)) for package in PACKAGES]
    fast = "fast bf16" if has_fast_bf16(device) else "no fast bf16"
    rows += [
        ("processes", f"{ranks().count} started by torchrun" if not ranks().alone else "1"),
        ("data", config.data_dir or _data_dir()),
        ("device", f"a run takes {device} ({fast})"),
        ("precision", f"a run takes {pick_precision('auto', device)}"),
        ("engine", f"a run takes {pick_engine('auto', device)}"),
        ("loader", _loader(device)),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def _data_dir() -> str:
    try:
        return str(data.default_dir())
    except InputError as error:
        return str(error)


def _loader(device: torch.device) -> str:
    """Say which loader a run takes, and why."""
    if reason := obstacle():
        return f"a run takes resident; {reason}"
    if device.type == "cpu":
        most, where = "is in memory anyway", "memory"
    else:
        most, where = "fits", "the device's memory"
    half = free_memory(device) / 2 / 2**30
    return (
        f"a run takes resident for what {most}, ffcv for a .beton and for what takes more than "
        f"half of {where}'s free part, {half:.1f} GiB now"
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
