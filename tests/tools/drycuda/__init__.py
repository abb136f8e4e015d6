"""A CUDA that computes nothing: it runs the GPU code of torch on a machine without a GPU.

A library stands in for the CUDA runtime, driver, cuBLAS and cuDNN. The allocator, autograd,
TorchDynamo, Inductor, Triton and the capture of CUDA graphs are the real ones. Kernels compute
nothing, but the library logs every call, and a call that a stream capture forbids fails. So it
shows illegal calls, the kernels of a graph, and the memory that a graph keeps; it shows neither
values nor times, and the choices of Inductor's autotuning are those of the first configuration.

Start a process with the environment that `make` returns, which `startup/sitecustomize.py` prepares.
There `drycuda.inside` reads the log.
"""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


def missing() -> str | None:
    """Return why the library cannot be built here, or None."""
    version = torch.version.cuda
    if version is None or not version.startswith("13."):
        return f"torch is built for CUDA {version}, and the dry CUDA has the interface of CUDA 13"
    if shutil.which("g++") is None:
        return "there is no g++"
    needed = ("cublas_v2.h", "cudnn.h", "cuda_runtime_api.h", "crt/host_defines.h")
    absent = [name for name in needed if not any((f / name).exists() for f in _includes())]
    return f"there is no {', '.join(absent)}" if absent else None


def build(folder: Path) -> Path:
    """Compile the library in `folder` with g++ and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libcuda.so.1"
    command = ["g++", "-O1", "-fPIC", "-shared", "-std=c++17", "-Wl,-soname,libcuda.so.1"]
    # System headers, as their warnings are not ours.
    command += [word for include in _includes() for word in ("-isystem", str(include))]
    command += [*map(str, sorted(HERE.glob("*.cpp"))), "-o", str(library), "-ldl"]
    subprocess.run(command, check=True)
    (folder / "libcuda.so").symlink_to(library.name)
    return folder


def _includes() -> list[Path]:
    """Return the folders with CUDA headers that torch's and Triton's packages bring."""
    found = importlib.util.find_spec("nvidia")
    roots = [] if found is None else [Path(p) for p in found.submodule_search_locations or ()]
    folders = [folder for root in roots for folder in sorted(root.glob("*/include"))]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        # Last: its CUDA may be older than torch's. It has headers that torch's packages lack.
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "include")
    return folders


def make(folder: Path) -> dict[str, str]:
    """Build the library in `folder`; return the environment of processes that use it."""
    return environment(build(folder / "library"), folder / "cache")


def environment(library: Path, cache: Path) -> dict[str, str]:
    """Return the environment of a process that uses the library in the folder `library`.

    cache: a folder for compiled kernels. Entries of caches that a GPU uses would be wrong here.
    """
    paths = [HERE / "startup", HERE.parent, ROOT]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "LD_PRELOAD": str(library / "libcuda.so.1"),
        "LD_LIBRARY_PATH": str(library),
        "TRITON_LIBCUDA_PATH": str(library),
        "DRYCUDA": str(library / "libcuda.so.1"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "0",
    }
