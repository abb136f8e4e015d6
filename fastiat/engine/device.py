"""The device and the arithmetic a run takes."""

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
    """Turn "auto", "cpu", "cuda" or "cuda:N" into a device that is there, or raise `InputError`.

    Where torchrun has started several processes on this machine, each takes a GPU of its own.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    shared = ranks().local_count > 1 and name.startswith("cuda:")
    if (not ranks().alone and name == "cuda") or shared:
        return _own_gpu(name)
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"unknown --device {name!r}: choose from auto, cpu, cuda, cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            there = f"{count} CUDA device{'s' * (count != 1)}" if count else "no CUDA device"
            raise InputError(f"--device {name}: this machine has {there}; use --device cpu or auto")
    return device


@contextmanager
def own_defaults(*, keep_device: bool = False) -> Iterator[None]:
    """Make fp32 and, but for `keep_device`, the CPU the defaults of new tensors; a decorator too.

    The caller may have changed them by `torch.set_default_dtype`, `torch.set_default_device` or
    `with torch.device(...)`.
    """
    # A device context slows down every call of torch, so there is none where it changes nothing.
    keep_device = keep_device or torch.get_default_device().type == "cpu"
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with nullcontext() if keep_device else torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a CUDA device, or for this process in the system."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = []
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        limits.append(1024 * int(lines["MemAvailable"].split()[0]))
    except (OSError, KeyError, ValueError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))
    group = Path("/sys/fs/cgroup")  # a container's own limit
    try:
        most = int((group / "memory.max").read_text())
        limits.append(max(most - int((group / "memory.current").read_text()), 0))
    except (OSError, ValueError):  # there is none
        pass
    return min(limits)


def _own_gpu(name: str) -> torch.device:
    """Return the GPU of this process among those that share a machine."""
    processes = ranks().local_count
    if name != "cuda":
        raise InputError(
            f"--device {name} would be shared by the {processes} processes of this machine: "
            f"leave it out, and each takes a GPU of its own"
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if processes > count:
        raise InputError(
            f"{processes} processes on this machine need a GPU each, and it has {count}: "
            f"give torchrun --nproc-per-node {count}, or fastiat --device cpu"
        )
    return torch.device(f"cuda:{ranks().local_rank}")


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return False
    flags = {"x86_64": ("amx_bf16", "avx512_bf16"), "aarch64": ("bf16",)}
    words = set(cpuinfo.read_text().split())
    return any(flag in words for flag in flags.get(platform.machine(), ()))


def pick_precision(name: str, device: torch.device) -> Literal["bf16", "fp32"]:
    """Turn "auto", "bf16" or "fp32" into the arithmetic to use: "bf16" or "fp32"."""
    if name == "auto":
        name = "bf16" if has_fast_bf16(device) else "fp32"
    return "bf16" if name == "bf16" else "fp32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """A context in which a network computes in `precision`; enter it anew after every update.

    Leaving it drops the bf16 copies of the weights, which would otherwise outlive an update.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
