"""Damage to valid files: of any bytes, of JSON, of zip archives, of safetensors.

Every function draws from a `random.Random`: the same state gives the same damage.
"""

import hashlib
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

EXTREMES = (0, 1, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
ESCAPE = "\x1b]0;owned\x07\x1b[2J"
SCRIPT = "\"'><script>alert('CANARY')</script>"
HOSTILE: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 3, 2**31, -(2**31), 2**53 + 1, 2**63, -(2**63), 10**400),
    *(0.5, -0.5, 1e-320, 1e308, -1e308, float("nan"), float("inf"), float("-inf")),
    *("", "x", "../../outside/x", "../" * 9 + "etc/passwd", "/etc/passwd", "~root", "a\0b"),
    *(ESCAPE, SCRIPT, "a|b\n|c|", "two\nlines", "\ud800", "\u202egnp.exe", "$(touch canary)"),
    *("y" * 100_000, "0.03", "8/255", "none", [], {}, [None], [1, 2], {"a": 1}, [[[]]]),
    *(["x"] * 50_000, ["\x1b[31m", SCRIPT]),
)
"""Values for JSON: of wrong type or size, paths, escape sequences, markup."""


def of_bytes(random: Random, seeds: Sequence[bytes]) -> bytes:
    """Damage one of the files in one to four places."""
    content = bytearray(random.choice(seeds))
    for _ in range(random.choice((1, 1, 1, 2, 2, 4))):
        content = random.choice(_OF_BYTES)(random, content, seeds)
    return bytes(content)


def _flip(random: Random, content: bytearray, _: Any) -> bytearray:
    for _ in range(random.choice((1, 1, 1, 3, 30)) if content else 0):
        content[_place(random, content)] ^= 1 << random.randrange(8)
    return content


def _truncate(random: Random, content: bytearray, _: Any) -> bytearray:
    return content[: _place(random, content)]


def _delete(random: Random, content: bytearray, _: Any) -> bytearray:
    start, stop = _span(random, content)
    return content[:start] + content[stop:]


def _double(random: Random, content: bytearray, _: Any) -> bytearray:
    start, stop = _span(random, content)
    return content[:stop] + content[start:stop] * random.choice((1, 1, 2, 50)) + content[stop:]


def _swap(random: Random, content: bytearray, _: Any) -> bytearray:
    a, b, c = sorted(random.randrange(len(content) + 1) for _ in range(3))
    return content[:a] + content[b:c] + content[a:b] + content[c:]


def _splice(random: Random, content: bytearray, seeds: Sequence[bytes]) -> bytearray:
    other = random.choice(seeds)
    return content[: _place(random, content)] + other[_place(random, other) :]


def _number(random: Random, content: bytearray, _: Any) -> bytearray:
    """Overwrite 1 to 8 bytes, which may be a number, with an extreme number."""
    size = random.choice((1, 2, 4, 4, 8))
    value = random.choice(EXTREMES) % 256**size
    at = _place(random, content)
    content[at : at + size] = value.to_bytes(size, random.choice(("little", "big")))
    return content


def _digits(random: Random, content: bytearray, _: Any) -> bytearray:
    """Replace a run of digits by another number."""
    at = [i for i, byte in enumerate(content[:4096]) if 48 <= byte < 58]
    if not at:
        return _number(random, content, _)
    start = stop = random.choice(at)
    while stop < len(content) and 48 <= content[stop] < 58:
        stop += 1
    word = str(random.choice((-1, *EXTREMES, 10**30))).encode()
    return content[:start] + word + content[stop:]


def _noise(random: Random, content: bytearray, _: Any) -> bytearray:
    at = _place(random, content)
    return content[:at] + random.randbytes(random.choice((1, 8, 100))) + content[at:]


_OF_BYTES: tuple[Callable[..., bytearray], ...] = (
    *(_flip, _flip, _truncate, _delete, _double, _swap, _splice, _number, _number, _digits),
    _noise,
)


def _place(random: Random, content: Sequence[int]) -> int:
    """Return an index, near the head half of the time, where formats keep their numbers."""
    reach = min(len(content), 64) if random.random() < 0.5 else len(content)
    return random.randrange(reach) if reach else 0


def _span(random: Random, content: bytearray) -> tuple[int, int]:
    start = _place(random, content)
    return start, min(len(content), start + random.choice((1, 2, 4, 16, 256, 4096)))


def of_json(random: Random, seeds: Sequence[bytes]) -> bytes:
    """Damage a JSON file: its values, its keys, its text, or its bytes."""
    if random.random() < 0.2:
        return of_bytes(random, seeds)
    value = json.loads(random.choice(seeds))
    for _ in range(random.choice((1, 1, 1, 2, 5))):
        value = of_value(random, value)
    return as_json(random, value).encode("utf-8", "surrogatepass")


def as_json(random: Random, value: Any) -> str:
    """Format a value as JSON, sometimes with hostile nesting, double keys or long numbers."""
    text = json.dumps(value, ensure_ascii=random.random() < 0.5)
    kind = random.random()
    if kind < 0.04:
        depth = random.choice((100, 5_000, 200_000))
        return text.replace(":", ": " + "[" * depth, 1) if kind < 0.02 else "[" * depth + text
    if kind < 0.07:  # a key twice
        return text.replace("{", '{"seed": 1, "kind": "epoch", "seed": 2, ', 1)
    if kind < 0.10:
        return text.replace(": ", ": 1" + "0" * random.choice((300, 5_000)) + " ", 1)
    return text


def of_jsonl(random: Random, seeds: Sequence[bytes]) -> bytes:
    """Damage a file of JSON lines."""
    if random.random() < 0.2:
        return of_bytes(random, seeds)
    lines = random.choice(seeds).decode().splitlines()
    at = random.randrange(len(lines))
    kind = random.random()
    if kind < 0.7:
        value = json.loads(lines[at])
        for _ in range(random.choice((1, 1, 2, 5))):
            value = of_value(random, value)
        lines[at] = as_json(random, value)
    elif kind < 0.8:
        lines.insert(at, random.choice(("", "null", "[]", "\x85", "{}", '{"kind": "epoch"}')))
    elif kind < 0.9:
        lines = lines[:at] + random.sample(lines, len(lines))
    else:
        lines[at] = json.dumps(random.choice(HOSTILE))
    return "\n".join([*lines, ""]).encode("utf-8", "surrogatepass")


def of_value(random: Random, value: Any) -> Any:
    """Replace, drop or add something anywhere in nested dictionaries and lists."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        key, kind = random.choice(list(value)), random.random()
        if kind < 0.75:
            return value | {key: of_value(random, value[key])}
        if kind < 0.85:
            return {name: item for name, item in value.items() if name != key}
        hostile = random.choice(HOSTILE)
        return value | {hostile if isinstance(hostile, str) else "colour": random.choice(HOSTILE)}
    if isinstance(value, list) and value and random.random() < 0.9:
        at, kind = random.randrange(len(value)), random.random()
        if kind < 0.8:
            return [*value[:at], of_value(random, value[at]), *value[at + 1 :]]
        return value[:at] if kind < 0.9 else value + [value[at]] * random.choice((1, 1000))
    if isinstance(value, int | float) and not isinstance(value, bool) and random.random() < 0.5:
        return random.choice((-value, value + 1, value - 1, value * 10, value // 2, value * 10**9))
    return random.choice(HOSTILE)


def of_zip(random: Random, seeds: Sequence[bytes]) -> bytes:
    """Damage a zip archive: its members' bytes, names and sizes, or the archive's own bytes."""
    kind = random.random()
    if kind < 0.2:
        return of_bytes(random, seeds)
    with zipfile.ZipFile(io.BytesIO(random.choice(seeds))) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    at = random.randrange(len(members))
    name, content = members[at]
    bomb = 0
    if kind < 0.75:
        content = of_bytes(random, [content, b""])
    elif kind < 0.82:
        name = random.choice(("../../outside/x", "/etc/passwd", "", "a/../b", "x" * 60_000, ESCAPE))
    elif kind < 0.88:
        members.pop(random.randrange(len(members)))
        at = min(at, len(members) - 1)
    elif kind < 0.94:
        bomb = random.choice((2**28, 3 * 2**30, 5 * 2**30))
    else:
        members.insert(0, (name, of_bytes(random, [content, b""])))
    members[at : at + 1] = [(name, content)]
    return zip_of(members, at if bomb else -1, bomb)


def zip_of(members: Sequence[tuple[str, bytes]], bomb_at: int = -1, bomb: int = 0) -> bytes:
    """Return an uncompressed archive; `bomb` compressed zeros replace the member `bomb_at`."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for number, (name, content) in enumerate(members):
            if number != bomb_at:
                # zipfile would warn about a name that it has written before.
                info = zipfile.ZipInfo(name[:65_000])
                archive.NameToInfo.pop(info.filename, None)
                archive.writestr(info, content)
                continue
            info = zipfile.ZipInfo(name)
            info.compress_type, info.header_offset = zipfile.ZIP_DEFLATED, out.tell()
            packed = zeros(bomb)
            info.CRC, info.file_size, info.compress_size = 0, bomb, len(packed)
            out.write(info.FileHeader(zip64=True) + packed)
            archive.filelist.append(info)
            archive.start_dir = out.tell()
            archive._didModify = True  # type: ignore[attr-defined]
    return out.getvalue()


def zeros(count: int) -> bytes:
    """Return a raw deflate stream of about `count` zero bytes; it is a thousandth as long."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return block * (count // 2**20) + packer.flush(zlib.Z_FINISH)


def npy(shape: str, dtype: str, content: bytes) -> bytes:
    """Return a .npy file with any header."""
    header = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) % 65536) + header + content


def of_safetensors(random: Random, seeds: Sequence[bytes]) -> bytes:
    """Damage a safetensors file: the length of its header, the header's values, or any bytes."""
    content, kind = random.choice(seeds), random.random()
    size = int.from_bytes(content[:8], "little")
    if kind < 0.25:
        return of_bytes(random, seeds)
    if kind < 0.35:
        return struct.pack("<Q", random.choice((*EXTREMES, size - 1, size + 1))) + content[8:]
    header = json.loads(content[8 : 8 + size])
    if kind < 0.7:
        metadata = header["__metadata__"]
        key = "card" if "card" in metadata else "state"
        values = json.loads(metadata[key])
        for _ in range(random.choice((1, 1, 2))):
            values = of_value(random, values)
        metadata[key] = as_json(random, values)
    else:
        _of_header(random, header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


def _of_header(random: Random, header: dict[str, Any]) -> None:
    """Replace a field of a tensor in a safetensors header, its name, or the metadata."""
    tensor = random.choice([name for name in header if name != "__metadata__"])
    choices: dict[str, Any] = {
        "dtype": ("F64", "I8", "BF16", "U8", "F4", "BOOL", "", 3),
        "shape": ([], [0], [2**63], [2**40, 2**40], [-1], [1.5], "x", [10**30]),
        "data_offsets": ([0, 0], [4, 0], [0, 2**63], [-4, 4], [2**64, 2**64], [], [0]),
    }
    field = random.choice(list(choices))
    header[tensor][field] = random.choice(choices[field])
    if random.random() < 0.2:
        header[random.choice(("../x", "", "step/x", "model", ESCAPE))] = header.pop(tensor)
    if random.random() < 0.1:
        header["__metadata__"] = random.choice(({}, None, [], {"state": ESCAPE}, {"card": 3}))


def sealed(content: bytes) -> bytes:
    """Return a damaged checkpoint with a right checksum, if its header can still be read."""
    size = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + size])
        metadata = header["__metadata__"]
        text = metadata["state"].encode()
        metadata["sha256"] = hashlib.sha256(text + content[8 + size :]).hexdigest()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return content
    packed = json.dumps(header).encode()
    return struct.pack("<Q", len(packed)) + packed + content[8 + size :]
