"""The safetensors files of a run: the model with its card, and the checkpoint of a training.

A safetensors file is the length of its header (8 bytes, little-endian), the header (JSON: names,
types, shapes and positions of the tensors, and text under "__metadata__"), and the data section.

    model.safetensors   weights; metadata "card": the `ModelCard` as JSON
    state.safetensors   tensors, called GROUP/NAME where the state has a dictionary of tensors;
                        metadata "state": all other values as JSON, and "sha256": the SHA-256 of
                        that JSON followed by the data section
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from fastiat import __version__
from fastiat.models import ModelCard
from fastiat.networks.sources import put_tensors
from fastiat.system.errors import DamagedError, InputError, printable
from fastiat.system.settings import ARCHS, is_own_arch, validated
from fastiat.system.untrusted import LARGEST_JSON, finite_json, is_endless

EXPECTED = "name a run directory, or the model.safetensors in one"
T = TypeVar("T")
P = ParamSpec("P")
OwnNetwork = Callable[[ModelCard], nn.Module]


def _explains_damage(reader: Callable[P, T]) -> Callable[P, T]:
    """Decorate `reader` to raise `DamagedError` instead of the errors that a damaged file causes.

    `InputError` is raised unchanged, and so is `OSError`, which is a fault of the disk.
    """

    @functools.wraps(reader)
    def read(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return reader(*args, **kwargs)
        except (InputError, OSError):
            raise
        # Damaged files cause too many errors to list, in safetensors and in our own code.
        except Exception as error:
            reason = printable((str(error).splitlines() or [type(error).__name__])[0])
            raise DamagedError(f"it is damaged or truncated ({reason[:100]})") from None

    return read


@_explains_damage
def read_weights(file: Path) -> tuple[dict[str, Tensor], ModelCard | None]:
    """Return the tensors of a safetensors file, on the CPU, and its card if it has one."""
    metadata, tensors = _unpack(file)
    if "card" not in metadata:
        return tensors, None
    card: ModelCard = validated(_parsed(metadata["card"]), ModelCard)
    if len(card.classes) != card.num_classes:
        raise InputError(f"its card names {len(card.classes)} classes, not {card.num_classes}")
    return tensors, card


@_explains_damage
def read_model(file: Path, own: OwnNetwork | None = None) -> tuple[nn.Module, ModelCard]:
    """Return the network of a model.safetensors, on the CPU, and its card.

    own: returns the network of the user for a card whose network no file can build.

    Raises `InputError` for a file that is damaged or whose weights do not fit its card.
    """
    tensors, card = read_weights(file)
    if card is None:
        with safe_open(file, "pt") as opened:
            state = "state" in (opened.metadata() or {})
        what = "the training state of a run" if state else "a safetensors file"
        raise InputError(
            f"it is {what}, not a model of fastiat: it does not say which network; {EXPECTED}"
        )
    if is_own_arch(card.arch) and own is not None:
        model = own(card)
        card.check(model)
    elif card.arch in ARCHS:
        # On the meta device a network takes no memory, even if a damaged card has a huge width.
        with torch.device("meta"):
            model = card.build()
    else:
        # Networks of a library may compute values in their constructors, which the meta device
        # does not hold. Their size is fixed by their names.
        with torch.random.fork_rng(devices=[]):
            model = card.build()
    if not alike(tensors, model.state_dict()):
        width = "" if card.width is None else f" of width {card.width}"
        raise InputError(f"it does not hold the weights of {card.arch}{width}")
    put_tensors(model, tensors, assign=card.arch in ARCHS)
    return model, card


def pack_model(weights: Mapping[str, Tensor], card: ModelCard) -> bytes:
    """Return the content of a model.safetensors; equal weights and cards give equal bytes."""
    metadata = {"format": "pt", "fastiat": __version__, "card": json.dumps(asdict(card))}
    return _pack(weights, metadata)


def pack_state(state: Mapping[str, Any]) -> bytes:
    """Return the content of a state.safetensors.

    The values of `state` are tensors, dictionaries of tensors, or values for JSON.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for name, value in state.items():
        group = value if isinstance(value, Mapping) else {}
        if isinstance(value, Tensor):
            tensors[name] = value
        elif any(isinstance(item, Tensor) for item in group.values()):
            tensors |= {f"{name}/{key}": tensor for key, tensor in group.items()}
        else:
            values[name] = value
    return _pack(tensors, {"state": json.dumps(values)})


@_explains_damage
def read_state(file: Path) -> dict[str, Any]:
    """Return the state in a state.safetensors, see `pack_state`.

    Raises `DamagedError` for other files. The caller has to check names, shapes and values.
    """
    if is_endless(file):
        raise DamagedError("it is a pipe or a device")
    metadata, tensors = _unpack(file)
    text = metadata.get("state")
    if text is None:
        raise DamagedError("it is not a checkpoint of fastiat")
    if metadata.get("sha256") != data_sha256(file, text):
        raise DamagedError("it is damaged: it has a wrong checksum")
    state = _parsed(text)
    for name, tensor in tensors.items():
        group, slash, key = name.partition("/")
        if slash:
            state.setdefault(group, {})[key] = tensor
        else:
            state[name] = tensor
    return state


def data_sha256(file: Path, text: str = "") -> str:
    """Return the SHA-256, in hexadecimal, of `text` and the data section of a safetensors file."""
    checksum = hashlib.sha256(text.encode())
    with open(file, "rb") as opened:
        header = int.from_bytes(opened.read(8), "little")
        # A damaged length may be larger than `seek` accepts.
        opened.seek(min(header, file.stat().st_size), os.SEEK_CUR)
        hashlib.file_digest(opened, lambda: checksum)
    return checksum.hexdigest()


def _pack(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Return the content of a safetensors file; with "state" in its metadata, with their "sha256".

    safetensors writes metadata in an order that differs between calls, so they are sorted here.
    """
    apart: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        # safetensors refuses tensors that share memory, such as tied weights.
        address = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if address in storages else tensor
        storages.add(address)
    packed = safetensors.torch.save(apart)
    start = 8 + int.from_bytes(packed[:8], "little")
    header, data = json.loads(packed[8:start]), memoryview(packed)[start:]
    if "state" in metadata:
        # Names and shapes need no checksum: `alike` compares them with the training's own.
        checksum = hashlib.sha256(metadata["state"].encode())
        checksum.update(data)
        metadata = metadata | {"sha256": checksum.hexdigest()}
    header = {"__metadata__": dict(sorted(metadata.items()))} | header
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the data section to 8 bytes, as safetensors does
    return len(text).to_bytes(8, "little") + text + data


def _unpack(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the metadata and the tensors of a safetensors file."""
    with open(file, "rb") as opened:
        if int.from_bytes(opened.read(8), "little") > LARGEST_JSON:
            raise DamagedError("it is damaged: its header is larger than any that fastiat writes")
    with safe_open(file, "pt") as opened:
        names = opened.keys()
        # Cloned, as safetensors maps the file into memory: if the file is truncated later, SIGBUS
        # ends a process that reads a mapped tensor.
        return opened.metadata() or {}, {name: opened.get_tensor(name).clone() for name in names}


def _parsed(text: str) -> dict[str, Any]:
    """Return the JSON object in a metadata text; raise `DamagedError` for another JSON value."""
    values = finite_json(text)
    if not isinstance(values, dict):
        raise DamagedError("it is damaged: its metadata is not a JSON object")
    return values


def alike(one: Any, other: Any) -> bool:
    """Whether two values are tensors of equal shape and dtype, dictionaries of these, or None."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return (one.shape, one.dtype) == (other.shape, other.dtype)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(alike(one[name], other[name]) for name in other)
    return one is None and other is None
