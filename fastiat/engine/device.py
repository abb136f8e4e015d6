"""The device and the precision of a run."""

import itertools
import os
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fastiat.system.errors import InputError
from fastiat.system.ranks import ranks


def pick_device(name: str) -> torch.device:
    """Return the device for "auto", "cpu", "cuda" or "cuda:N"; raise `InputError` if it is missing.

    "auto" is "cuda" if a GPU is available, else "cpu". Under torchrun, "cuda" is the GPU of this
    process: each process of a machine has its own GPU.
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
            f"leave --device out, so that each process uses its own GPU"
        )
    if (device.index or 0) >= available:
        there = (
            f"{available} CUDA device{'s' * (available != 1)}" if available else "no CUDA device"
        )
        raise InputError(f"--device {name}: this machine has {there}; use --device cpu or auto")
    if processes > available:
        raise InputError(
            f"{processes} processes on this machine need a GPU each, but it has {available}: "
            f"give torchrun --nproc-per-node {available}, or fastiat --device cpu"
        )
    if ranks().alone or device.index is not None:
        return device
    return torch.device(f"cuda:{ranks().local_rank}")


def to_device(model: nn.Module, device: torch.device | str) -> nn.Module:
    """Move `model` to `device`, in place, with weights of four dimensions in channels-last.

    `nn.Module.to(memory_format=torch.channels_last)` fails for weights of five dimensions.
    """
    model.to(device)
    with torch.no_grad():
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            if not is_lazy(tensor) and tensor.dim() == 4:
                # Not `contiguous`, which leaves the strides of a 1x1 kernel as they are.
                tensor.data = tensor.to(memory_format=torch.channels_last)
    return model


@contextmanager
def own_defaults(*, keep_device: bool = False) -> Iterator[None]:
    """Make fp32 the default dtype and the CPU the default device of new tensors; also a decorator.

    The caller may have changed the defaults by `torch.set_default_dtype`,
    `torch.set_default_device` or `with torch.device(...)`. The default dtype is restored at the
    end. `keep_device` leaves the default device unchanged.
    """
    # A device context slows down every PyTorch call, so it is entered only if the default differs.
    keep_device = keep_device or torch.get_default_device().type == "cpu"
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with nullcontext() if keep_device else torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def free_memory(device: torch.device) -> int:
    """Return the free memory of a CUDA device, or of the system for the CPU, in bytes.

    For the system this is the smaller of the memory that the kernel reports as available and the
    memory that is left below the container's limit.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = []
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        limits.append(1024 * int(lines["MemAvailable"].split()[0]))
    except (OSError, KeyError, ValueError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))
    group = Path("/sys/fs/cgroup")  # holds the memory limit of this container
    try:
        most = int((group / "memory.max").read_text())
        limits.append(max(most - int((group / "memory.current").read_text()), 0))
    except (OSError, ValueError):  # no cgroup v2, or "max", which means no limit
        pass
    return min(limits)


def has_fast_bf16(device: torch.device) -> bool:
    """Return whether the device has instructions that multiply bf16 matrices."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return False
    flags = {"x86_64": ("amx_bf16", "avx512_bf16"), "aarch64": ("bf16",)}
    words = set(cpuinfo.read_text().split())
    return any(flag in words for flag in flags.get(platform.machine(), ()))


def pick_precision(name: str, device: torch.device) -> Literal["bf16", "fp32"]:
    """Return the precision `name`; "auto" is "bf16" on a device with fast bf16, else "fp32"."""
    if name == "auto":
        name = "bf16" if has_fast_bf16(device) else "fp32"
    return "bf16" if name == "bf16" else "fp32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """Return a context in which a network computes in `precision`, "bf16" or "fp32".

    Leave the context before the weights change: autocast caches bf16 copies of the weights until
    the context ends.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
