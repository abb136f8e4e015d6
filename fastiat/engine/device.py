"""The device and the precision of a run."""

import os
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import torch

from fastiat.system.errors import InputError
from fastiat.system.ranks import ranks


def pick_device(name: str) -> torch.device:
    """Turn "auto", "cpu", "cuda" or "cuda:N" into a device that exists, or raise `InputError`.

    "auto" is "cuda" where there is a GPU. Under torchrun "cuda" is the GPU of this process: each
    process of a machine has its own.
    """
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if available else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"unknown --device {name!r}: choose from auto, cpu, cuda, cuda:N")
    if device.type == "cpu":
        return device
    processes = ranks().local_count
    if processes > 1 and device.index is not None:
        raise InputError(
            f"--device {name} would be shared by the {processes} processes of this machine: "
            f"leave it out, and each takes a GPU of its own"
        )
    if (device.index or 0) >= available:
        there = (
            f"{available} CUDA device{'s' * (available != 1)}" if available else "no CUDA device"
        )
        raise InputError(f"--device {name}: this machine has {there}; use --device cpu or auto")
    if processes > available:
        raise InputError(
            f"{processes} processes on this machine need a GPU each, and it has {available}: "
            f"give torchrun --nproc-per-node {available}, or fastiat --device cpu"
        )
    if ranks().alone or device.index is not None:
        return device
    return torch.device(f"cuda:{ranks().local_rank}")


@contextmanager
def own_defaults(*, keep_device: bool = False) -> Iterator[None]:
    """Make fp32 the default type and the CPU the default device of new tensors; also a decorator.

    A caller may have changed the defaults by `torch.set_default_dtype`, `torch.set_default_device`
    or `with torch.device(...)`. `keep_device` leaves the device as it is.
    """
    # A device context slows down every call of torch, so it is entered only where needed.
    keep_device = keep_device or torch.get_default_device().type == "cpu"
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with nullcontext() if keep_device else torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free: of a CUDA device's memory, or of the system's.

    Of the system the least of what the kernel reports and what the container's limit leaves.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = []
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        limits.append(1024 * int(lines["MemAvailable"].split()[0]))
    except (OSError, KeyError, ValueError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))
    group = Path("/sys/fs/cgroup")  # the limit of this container
    try:
        most = int((group / "memory.max").read_text())
        limits.append(max(most - int((group / "memory.current").read_text()), 0))
    except (OSError, ValueError):  # no cgroup v2, or "max": no limit
        pass
    return min(limits)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device has instructions that multiply bf16 matrices."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return False
    flags = {"x86_64": ("amx_bf16", "avx512_bf16"), "aarch64": ("bf16",)}
    words = set(cpuinfo.read_text().split())
    return any(flag in words for flag in flags.get(platform.machine(), ()))


def pick_precision(name: str, device: torch.device) -> Literal["bf16", "fp32"]:
    """Turn "auto" into "bf16" where the device has fast bf16, else "fp32"; keep the others."""
    if name == "auto":
        name = "bf16" if has_fast_bf16(device) else "fp32"
    return "bf16" if name == "bf16" else "fp32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """Return a context in which a network computes in `precision`, "bf16" or "fp32".

    Leave it before the weights change: autocast keeps its bf16 copies of them until then.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
