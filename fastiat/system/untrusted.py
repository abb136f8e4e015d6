"""Readers for files from other people, which check a file before a parser reads it."""

import codecs
import json
import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from numpy.lib import format as npy
from numpy.typing import NDArray

from fastiat.system.errors import InputError, printable
from fastiat.system.settings import validated

LARGEST_JSON = 16 * 2**20
"""Largest JSON that is parsed, in bytes; the parsed values can take forty times as many bytes."""
T = TypeVar("T")


def is_endless(path: Path) -> bool:
    """Whether `path` is a pipe or a device, which may block a reader forever."""
    return path.exists() and not (path.is_file() or path.is_dir())


def finite_json(text: str) -> Any:
    """Parse JSON; raise `ValueError` also for NaN, infinity and numbers too large for a float."""

    def number(word: str) -> float:
        value = float(word)
        if not math.isfinite(value):
            raise ValueError(f"{word[:20]} is not a finite number")
        return value

    def whole(word: str) -> int:
        number(word)
        return int(word)

    return json.loads(text, parse_constant=number, parse_float=number, parse_int=whole)


def read_json(file: Path, remedy: str = "restore the original file") -> Any:
    """Return the parsed content of a JSON file.

    Raises `InputError`, which names the file and ends with `remedy`, for a file that is too large
    or not JSON with finite numbers, and `OSError` where the file cannot be read.
    """
    try:
        if is_endless(file):
            raise InputError("it is a pipe or a device: remove it")
        if file.stat().st_size > LARGEST_JSON:
            raise InputError("it is larger than any JSON file that fastiat writes: remove it")
        return finite_json(file.read_text())
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    # Deep nesting raises a RecursionError; text that is not UTF-8 raises a ValueError.
    except (ValueError, RecursionError):
        raise InputError(f"{file} is damaged, not JSON with finite numbers: {remedy}") from None


def read_as(file: Path, kind: type[T], remedy: str = "restore the original file") -> T:
    """Read a JSON file as `kind`: a dataclass, or `list[...]` of one (see `settings.validated`).

    Raises what `read_json` raises, and `InputError` for missing, unknown or ill-typed fields.
    """
    values = read_json(file, remedy)
    try:
        return validated(values, kind)
    except InputError as error:
        raise InputError(f"{file}: {error}; {remedy}") from None


def read_npz(
    file: Any, largest: int, names: Sequence[str] | None = None
) -> dict[str, NDArray[Any]]:
    """Return the arrays of a .npz by name; `file` is a path or an open file.

    names: the arrays to read; None means all.

    Nothing is unpickled, and an array is decompressed only if the archive and the array's own
    header give the same size. Raises `InputError` for an array larger than `largest` bytes and for
    an archive that lacks one of `names`, and `InputError` or an exception of `zipfile` or NumPy for
    a damaged file.
    """
    arrays = {}
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
        if absent := set(names or ()) - entries.keys():
            held = ", ".join(map(printable, entries))[:200] or "no array"
            wanted = " and ".join(names or ())
            raise InputError(f"it has no array {min(absent)!r}, it has {held}: give {wanted}")
        for name in names or entries:
            with archive.open(entries[name]) as member:
                arrays[name] = _array(member, entries[name], largest)
    return arrays


def _array(member: Any, entry: zipfile.ZipInfo, largest: int) -> NDArray[Any]:
    """Return the array in `member`, a .npy file whose size in the archive is that of `entry`."""
    if member.read(8) != b"\x93NUMPY\x01\x00":
        raise InputError("it holds other data than arrays")
    shape, fortran_order, dtype = npy.read_array_header_1_0(member)
    if dtype.hasobject:
        raise InputError("it holds other data than arrays of numbers")
    if fortran_order:
        raise InputError("an array is in Fortran order: write it with numpy.ascontiguousarray")
    count = math.prod(shape) * dtype.itemsize
    if entry.file_size != member.tell() + count:
        raise InputError("an array's size is not the one in its header")
    if count > largest:
        raise InputError(f"an array of {count / 2**20:,.0f} MiB does not fit: give a smaller one")
    member.seek(0)
    array: NDArray[Any] = npy.read_array(member, allow_pickle=False)
    member.read(1)  # at the end of the data `zipfile` checks the checksum
    return array


_FORMATS = {
    b"\x93NUMPY": "a NumPy array",
    b"\x80\x02": "a pickle, such as an old PyTorch checkpoint (torch.save)",
}
"""Maps the first bytes of a file to its format, as `kind_of` names it."""


def kind_of(file: Path) -> str | None:
    """Return, as text, the format of a file that is not safetensors; None if it may be one."""
    with open(file, "rb") as opened:
        head = opened.read(512)
    # Safetensors: eight bytes with the length of the header, then the header, which is JSON.
    if head[8:9] == b"{":
        return None
    if not head:
        return "an empty file"
    if head.startswith((b"PK\3\4", b"PK\5\6")):
        return _kind_of_zip(file)
    for start, kind in _FORMATS.items():
        if head.startswith(start):
            return kind
    try:  # an incremental decoder accepts a character that the 512 bytes cut
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        text = "\0"
    is_text = all(c.isprintable() or c in "\t\n\r\f" for c in text)
    return "a text file" if is_text else "another kind of file"


def _kind_of_zip(file: Path) -> str:
    """Return the format of a zip archive, as text."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return "a damaged zip archive or PyTorch checkpoint"
    if any(name.endswith("constants.pkl") for name in names):
        return "a TorchScript model (torch.jit.save)"
    if any(name.endswith("data.pkl") for name in names):
        return "a PyTorch checkpoint (torch.save)"
    return "a zip archive"
