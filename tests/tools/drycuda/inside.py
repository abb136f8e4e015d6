"""For a process that runs on the dry CUDA: its log, and replacements for what needs values."""

import ctypes
import os
import re
from collections import Counter
from typing import Any, NamedTuple

import torch

_library = ctypes.CDLL(os.environ["DRYCUDA"])
_library.dry_size.restype = ctypes.c_size_t
_library.dry_entry.restype = ctypes.c_char_p
_library.dry_entry.argtypes = [ctypes.c_size_t]
_library.dry_note.argtypes = [ctypes.c_char_p, ctypes.c_char_p]

NODES = ("kernel", "copy", "fill", "product", "convolution", "normalisation")
"""Kinds of entries that are nodes of a graph if they are in a capture."""


class Entry(NamedTuple):
    """A call."""

    kind: str
    in_capture: bool
    what: str


def log() -> list[Entry]:
    """Return all calls since the last `clear`."""
    lines = [_library.dry_entry(i).decode(errors="replace") for i in range(_library.dry_size())]
    parts = [line.split("\t", 2) for line in lines]
    return [Entry(kind, inside == "1", what) for kind, inside, what in parts]


def clear() -> None:
    """Empty the log."""
    _library.dry_clear()


def note(kind: str, what: str) -> None:
    """Add an entry to the log."""
    _library.dry_note(kind.encode(), what.encode())


class Graph(NamedTuple):
    """What a capture recorded."""

    name: str
    """The piece that was noted last before the capture."""
    nodes: list[str]
    """A name of every node, without what differs from one compilation to another."""
    faults: list[str]
    """Calls and compilations that must not be in a capture."""


def graphs(entries: list[Entry]) -> list[Graph]:
    """Return the captures in a log, in their order."""
    found: list[Graph] = []
    name = ""
    for entry in entries:
        if entry.kind == "piece":
            name = entry.what
        elif entry == ("capture", True, "begin"):
            found.append(Graph(name, [], []))
        elif not entry.in_capture or entry.kind == "capture":
            continue
        elif entry.kind in NODES:
            found[-1].nodes.append(node_name(entry))
        elif entry.kind in ("illegal", "compile", "search", "sync"):
            found[-1].faults.append(f"{entry.kind}: {entry.what}")
    return found


def node_name(entry: Entry) -> str:
    """Return the name of a node without sizes, template arguments and Inductor's numbers."""
    name = entry.what
    if entry.kind == "kernel":
        name = name.rsplit(" x", 1)[0]
        name = name if name.startswith("triton_") else _short(name)
        return re.sub(r"(_\d+)+$", "", name)
    return f"{entry.kind} {re.split(r' [|]|  *[0-9]', name)[0]}"


def _short(name: str) -> str:
    """Return the name of a C++ kernel with what tells ATen's kernels apart."""
    outer = re.match(r"(?:void )?(?:[\w() ]+::)*(\w+)", name)
    functors = re.findall(r"(\w+(?:Functor|Ops|kernel_cuda|kernel_impl|_kernel)\w*)", name)
    words = [outer[1] if outer else name[:60], *dict.fromkeys(functors)]
    return " ".join(dict.fromkeys(words))[:120]


def count(nodes: list[str]) -> dict[str, int]:
    """Return how many nodes have each name."""
    return dict(sorted(Counter(nodes).items()))


def prepare() -> None:
    """Replace what cannot work without values, and log compilations.

    This comes before other modules of fastiat import what is replaced.

    - `torch.erfinv` is compiled at run time by a part of torch that the library does not stand for.
    - SGD reads the value of a learning rate that is a tensor, and refuses one below 0.
    - The check of a network, and `torch.equal`, read memory that no kernel has written.
    """
    from fastiat.networks import check

    check.check_network = lambda *args, **kwargs: None
    torch.erfinv = lambda x: x * 1.5  # type: ignore[assignment]
    equal = torch.equal
    torch.equal = lambda a, b: True if a.is_cuda else equal(a, b)  # type: ignore[assignment]
    original = torch.optim.SGD.__init__

    def init(self: Any, params: Any, lr: Any = 1e-3, **settings: Any) -> None:
        original(self, params, lr=1e-3, **settings)
        for group in self.param_groups:
            group["lr"] = lr

    torch.optim.SGD.__init__ = init  # type: ignore[method-assign]
    _log_compilations()


def _log_compilations() -> None:
    """Note every program that TorchDynamo compiles, and every kernel that Triton compiles."""
    import triton
    from torch._dynamo import convert_frame

    compile_frame, compile_kernel = convert_frame.compile_frame, triton.compile

    def frame(code: Any, *args: Any, **kwargs: Any) -> Any:
        note("compile", f"the function {code.co_name}")
        return compile_frame(code, *args, **kwargs)

    def kernel(source: Any, *args: Any, **kwargs: Any) -> Any:
        note("compile", f"the kernel {getattr(source, 'name', source)}")
        return compile_kernel(source, *args, **kwargs)

    convert_frame.compile_frame = frame
    triton.compile = kernel
