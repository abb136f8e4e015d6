"""Files of strangers: what is checked before a parser may see them."""

import ast
import io
import math
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastiat.system.errors import Damaged, InputError

LARGEST_JSON = 16 * 2**20
"""Bytes, of a pickle too; parsed, they can take forty times as many."""
LARGEST_ROW = 2**20
"""Characters of a line of JSON."""


def is_endless(path: Path) -> bool:
    """Whether this is a pipe or a device, from which a reader might never come back."""
    return path.exists() and not (path.is_file() or path.is_dir())


def read_json_text(file: Path) -> str:
    """Return a JSON file's text.

    Raises `InputError` for what cannot be a file of ours, and what `Path.read_text` raises.
    """
    if is_endless(file):
        raise InputError("it is a pipe or a device: remove it")
    if file.stat().st_size > LARGEST_JSON:
        raise InputError("it is larger than any that fastiat writes: remove it")
    return file.read_text()


# The opcodes and names in a checkpoint, as torch writes it. None runs code, none takes more memory
# than its bytes in the file; among those that torch lets pass besides are some that do.
_OPCODES = {
    *("MARK", "STOP", "PROTO", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2"),
    *("LONG1", "BINFLOAT", "BINUNICODE", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_TUPLE"),
    *("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_DICT", "SETITEM", "SETITEMS", "GLOBAL"),
    *("REDUCE", "BUILD", "BINPERSID", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
}
_ITEM_BYTES = {
    **dict.fromkeys(("DoubleStorage", "LongStorage"), 8),
    **dict.fromkeys(("FloatStorage", "IntStorage"), 4),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    **dict.fromkeys(("ByteStorage", "CharStorage", "BoolStorage"), 1),
}


def check_checkpoint(file: Path) -> None:
    """Raise `Damaged` unless `torch.load` can read a file without harm.

    Its archive is stored, with right checksums; its pickle has nothing but containers, numbers,
    text and dense tensors, and every tensor's storage as many bytes as the pickle says, which
    torch believes without looking. An archive that is none raises what `zipfile` raises.
    """
    if is_endless(file):
        raise Damaged("it is a pipe or a device")
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        pickles = [name for name in names if name.endswith(".pkl")]
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        total = sum(entry.file_size for entry in entries)
        if not stored or total > file.stat().st_size or len(set(names)) < len(names):
            raise Damaged("it is not a checkpoint of fastiat")
        wrong = archive.testzip()
        if wrong is not None:
            raise Damaged(f"it is damaged: {wrong[:50]} has a wrong checksum")
        sizes = {entry.filename: entry.file_size for entry in entries}
        one = len(pickles) == 1 and pickles[0].endswith("/data.pkl")
        if not one or sizes[pickles[0]] > LARGEST_JSON:
            raise Damaged("it is not a checkpoint of fastiat")
        folder = pickles[0].removesuffix("data.pkl")
        content = archive.read(pickles[0])
    _check_opcodes(content)
    _Scan(content, sizes, f"{folder}data/").load()


def _check_opcodes(content: bytes) -> None:
    kept = 0
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name not in _OPCODES:
            raise pickle.UnpicklingError(f"opcode {opcode.name}")
        if opcode.name.endswith("PUT"):
            # The reader makes room for as many as the largest number says.
            if argument != kept:
                raise pickle.UnpicklingError("memo")
            kept += 1


class _Scan(pickle.Unpickler):
    """Builds a checkpoint's containers, with None for every tensor."""

    def __init__(self, content: bytes, sizes: dict[str, int], folder: str) -> None:
        super().__init__(io.BytesIO(content))
        self._sizes, self._folder = sizes, folder

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _no_tensor
        if module == "torch" and name in _ITEM_BYTES:
            return name
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> None:
        kind, storage, key, _, count = pid
        if kind != "storage" or count * _ITEM_BYTES[storage] != self._sizes[self._folder + key]:
            raise Damaged("it is damaged: a tensor has another size than its data")


def _no_tensor(*_: Any) -> None:
    pass


def alike(one: Any, other: Any) -> bool:
    """Whether two states have the same keys, and tensors of the same shapes and types.

    What is neither a container nor a tensor is not looked at.
    """
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        same = isinstance(one, Tensor) and isinstance(other, Tensor)
        return same and (one.shape, one.dtype) == (other.shape, other.dtype)
    if isinstance(one, dict) or isinstance(other, dict):
        same = isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys()
        return same and all(alike(value, other[key]) for key, value in one.items())
    return True


def read_npz(file: Any, largest: int) -> dict[str, NDArray[Any]]:
    """Return the arrays of a .npz, a path or an open file, none of them above `largest` bytes.

    Nothing is unpickled, and nothing unpacked beyond what the archive and the array's own head
    say alike. Raises `InputError`, or what `zipfile` and NumPy raise, for a damaged file.
    """
    arrays = {}
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            with archive.open(entry) as member:
                arrays[entry.filename.removesuffix(".npy")] = _array(member, entry, largest)
    return arrays


def _array(member: Any, entry: zipfile.ZipInfo, largest: int) -> NDArray[Any]:
    magic = member.read(10)
    if magic[:8] != b"\x93NUMPY\x01\x00":
        raise InputError("it holds something else than arrays")
    size = int.from_bytes(magic[8:], "little")
    head = ast.literal_eval(member.read(size).decode("latin1").strip())
    dtype, shape = np.dtype(head["descr"]), head["shape"]
    if dtype.hasobject or not all(type(n) is int and n >= 0 for n in shape):
        raise InputError("it holds something else than arrays of numbers")
    count = math.prod(shape) * dtype.itemsize
    if head["fortran_order"] or count > largest or entry.file_size != 10 + size + count:
        raise InputError("an array's size is not what its head says")
    raw, done = np.empty(count, np.uint8), 0
    while done < count:
        part = member.read(min(2**24, count - done))
        if not part:
            raise InputError("an array is cut short")
        raw[done : done + len(part)] = np.frombuffer(part, np.uint8)
        done += len(part)
    member.read(1)  # to the end, where the checksum is compared
    array: NDArray[Any] = raw.view(dtype).reshape(shape)
    return array
