"""The run directory: configuration, metrics, weights and everything that a resume needs."""

import io
import json
import os
import pickle
import reprlib
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from fastiat import __version__, models
from fastiat.config import TrainConfig
from fastiat.engine.device import own_defaults
from fastiat.runs.lock import Lock, alone, check_unused
from fastiat.system.errors import Damaged, InputError, one_line, printable, printable_lines
from fastiat.system.files import drop_cut_line, lines_of, no_link, row_of, write
from fastiat.system.ranks import ranks
from fastiat.system.settings import expanded, flag_of, from_json, is_beton
from fastiat.system.untrusted import LARGEST_JSON, check_checkpoint, read_json_text

CONFIG, METRICS, MODEL, STATE, PREVIOUS, LOG, LOCK = (
    "config.json",
    "metrics.jsonl",
    "model.safetensors",
    "state.pt",
    "state.previous.pt",
    "stdout.log",
    ".lock",
)
T = TypeVar("T")
# What may change between stop and resume, as it changes no weight: where a run and its data lie,
# how these are read, when it is saved, and what follows an update that cannot be made.
MOVABLE = {"out", "data_dir", "loader", "resume", "checkpoint_every", "on_nan"}


@dataclass(frozen=True)
class ModelCard:
    """What it takes to rebuild a network around its weights; the metadata of model.safetensors."""

    arch: str
    width: int
    num_classes: int
    in_channels: int
    image_size: int
    classes: tuple[str, ...]
    variant: str = "standard"

    def build(self) -> models.Network:
        """Return a freshly initialised network of this kind."""
        return models.build(
            self.arch,
            self.num_classes,
            self.in_channels,
            self.image_size,
            self.width,
            variant=self.variant,
        )


def default_out(config: TrainConfig) -> Path:
    """Return the directory of a run that was given none."""
    images = Path(config.dataset).stem
    return Path("runs") / f"{images}-{config.arch}-{config.adv}-{config.mix}-s{config.seed}"


class Run:
    """A run directory, `path`, and the configuration in it.

    Who trains in it holds its lock, from `create` or `lock` to `unlock`.
    """

    def __init__(self, path: Path, config: TrainConfig) -> None:
        self.path = path
        self.config = config
        self._lock: Lock | None = None
        self._newest_damaged = False

    @classmethod
    def create(cls, path: Path, config: TrainConfig) -> "Run":
        """Make the directory and lock it; raise `InputError` if it holds a run or is a file."""
        check_free(path)
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        run = cls(path, config)
        try:
            path.mkdir(parents=True, exist_ok=True)
            run.lock()
            try:
                if (path / CONFIG).exists():
                    raise InputError(f"{path} has become another's run: choose another --out")
                write(path / CONFIG, _text(config))
            except BaseException:
                (path / LOCK).unlink(missing_ok=True)
                run.unlock()
                raise
        except BaseException:
            for folder in made:
                with suppress(OSError):
                    folder.rmdir()
            raise
        return run

    @classmethod
    def open(cls, path: Path) -> "Run":
        """Open an existing run; raise `InputError` if there is none or its config is damaged."""
        file = path / CONFIG
        try:
            values = json.loads(read_json_text(file))
            if not isinstance(values, dict):
                raise InputError("it is not a JSON object")
            config = from_json(TrainConfig, values)
            config.check()
            for field in fields(TrainConfig):
                if field.name not in values and field.name not in TrainConfig.added:
                    raise InputError(f"it lacks the setting {field.name!r}: put the run's own back")
        except FileNotFoundError:
            raise InputError(f"{path} holds no run: there is no {CONFIG} in it") from None
        except (NotADirectoryError, IsADirectoryError):
            raise InputError(f"{path} is no run directory") from None
        except InputError as error:
            raise InputError(f"{file}: {error}") from None
        except (ValueError, RecursionError):
            raise InputError(f"{file} is damaged: it is not JSON") from None
        return cls(path, config)

    def follow(self, config: TrainConfig) -> None:
        """Keep where a resume has found the data, as measuring must find them again."""
        moved = replace(self.config, dataset=config.dataset, data_dir=config.data_dir)
        if _text(moved) != _text(self.config):
            with alone(self.path):
                write(self.path / CONFIG, _text(moved))
        self.config = moved

    def check_same(self, config: TrainConfig) -> None:
        """Raise `InputError`, naming the first difference, unless `config` is this run's."""
        difference = _difference(_settings(self.config), _settings(config))
        if difference:
            name, mine, theirs = difference
            raise InputError(
                f"{self.path} was started with {flag_of(name)} {mine}, not {theirs}: "
                f"resume without that flag, or start a new run with another --out"
            )

    def lock(self) -> None:
        """Lock the directory for training; raise `InputError` where another process trains in it.

        What a killed process has left half written is removed.
        """
        lock = Lock(self.path / LOCK)
        if not lock.take():
            check_unused(self.path / LOCK)
            # It was let go in between.
            raise InputError(f"{self.path} is in training by another process")
        self._lock = lock
        with alone(self.path):  # an evaluation may be writing
            for name in (CONFIG, METRICS, MODEL, STATE, PREVIOUS, "evaluation.json"):
                for file in self.path.glob(f".{name}.*"):
                    file.unlink(missing_ok=True)

    def unlock(self) -> None:
        """Let others train here."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _check_there(self) -> None:
        """Raise `InputError` if the directory that we train in is no longer at its place."""
        if self._lock is not None and not self._lock.intact():
            raise InputError(
                f"{self.path} was removed, replaced or unmounted while it was trained in: "
                f"put it back and resume it, or start again with another --out"
            )

    def log(self, kind: str, **values: Any) -> None:
        """Append one row, a JSON object on a line, to metrics.jsonl.

        A last line that a crash cut short is removed first.
        """
        self._check_there()
        with alone(self.path):
            drop_cut_line(self.path / METRICS)
            self.append(METRICS, json.dumps({"kind": kind, **values}).encode() + b"\n")

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of metrics.jsonl; raise `InputError` at a line that is none.

        A last line that a crash cut short is left out.
        """
        file = self.path / METRICS
        for number, line in enumerate(lines_of(file), 1):
            row = row_of(line)
            if row is None and line.endswith("\n"):
                raise InputError(f"{file}, line {number} is damaged: it is not a JSON object")
            if row is not None:
                yield row

    def has_row(self, values: dict[str, Any]) -> bool:
        """Whether a row of metrics.jsonl has all these values."""
        wanted = json.loads(json.dumps(values))
        rows = map(row_of, lines_of(self.path / METRICS))
        return any(row is not None and row | wanted == row for row in rows)

    def rewind(self, step: int, epoch: int) -> None:
        """Drop the rows of later steps and epochs, so that a resume does not double them.

        Lines that a crash left damaged go too.
        """

        def before(row: dict[str, Any]) -> bool:
            if row.get("kind") not in ("step", "epoch"):
                return True
            name, last = ("epoch", epoch) if row.get("kind") == "epoch" else ("step", step)
            return isinstance(row.get(name), int) and row[name] <= last

        with alone(self.path):
            lines = lines_of(self.path / METRICS)
            kept = [line for line in lines if (row := row_of(line)) is not None and before(row)]
            if kept != lines:
                write(self.path / METRICS, "".join(kept).encode())

    def log_line(self, text: str) -> None:
        """Print a text, and keep it in stdout.log."""
        text = printable_lines(text)
        print(text, flush=True)
        self.append(LOG, f"{text}\n".encode())

    def append(self, name: str, content: bytes) -> None:
        """Append to a file of the run; an `OSError` says which."""
        file = self.path / name
        self._check_there()
        try:
            with open(file, "ab", opener=no_link) as out:
                out.write(content)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(file)) from None

    def save_model(self, weights: Mapping[str, Tensor], card: ModelCard) -> None:
        """Write model.safetensors: the weights, and the card that rebuilds the network."""
        metadata = {"format": "pt", "fastiat": __version__, "card": json.dumps(asdict(card))}
        self._check_there()
        tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
        write(self.path / MODEL, _ordered(safetensors.torch.save(tensors, metadata)))

    def save_state(self, state: dict[str, Any]) -> None:
        """Write state.pt, everything that a resume needs; the one before is state.previous.pt."""
        self._check_there()
        buffer = io.BytesIO()
        torch.save(state | {"config": _settings(self.config)}, buffer)
        # What the checkpoint has behind it must not be lost with the machine's memory.
        if (self.path / METRICS).exists():
            with open(self.path / METRICS, "rb", opener=no_link) as metrics:
                os.fsync(metrics.fileno())
        older = None if self._newest_damaged else self.path / PREVIOUS
        write(self.path / STATE, buffer.getbuffer(), older)
        self._newest_damaged = False

    def has_state(self) -> bool:
        """Whether there is a checkpoint, readable or not."""
        return (self.path / STATE).exists() or (self.path / PREVIOUS).exists()

    def load_state(self, take: Callable[[dict[str, Any]], T]) -> T:
        """Hand the checkpoint to `take` and return what that does.

        It is state.pt or, with a line of warning, state.previous.pt where that one is missing or
        `Damaged`, which `take` may raise too. Nothing in the files is executed. Raises
        `InputError` where neither does, or where the file is another run's.
        """
        if not self.has_state():
            raise InputError(f"{self.path} has no checkpoint yet: resume it, or remove the folder")
        wrong = []
        for file in (self.path / STATE, self.path / PREVIOUS):
            try:
                if not file.exists():
                    raise Damaged(f"{file} is missing")
                state = _read(file, lambda file=file: self._read_state(file))  # type: ignore[misc]
            except Damaged as error:
                wrong.append(str(error))
                continue
            try:
                taken = take(state)
            except Damaged as error:
                wrong.append(f"{file}: {error}")
                continue
            if wrong and ranks().first:
                warning = one_line(f"warning: {wrong[0]}; taking {file.name}")
                print(f"fastiat: {warning}", file=sys.stderr)
            self._newest_damaged = bool(wrong)
            return taken
        raise InputError(f"{'; '.join(wrong)}: put one back, or start again with another --out")

    def _read_state(self, file: Path) -> dict[str, Any]:
        check_checkpoint(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not isinstance(state.get("config"), dict):
            raise Damaged("it is not a checkpoint of fastiat")
        difference = _difference(_settings(self.config), state["config"])
        if difference:
            name, mine, theirs = difference
            raise InputError(
                f"it is of another run, with {flag_of(name)} {theirs} instead of {mine}: "
                "put the run's own back"
            )
        return state


class Onlooker(Run):
    """A run directory that another process of the same training writes."""

    def lock(self) -> None:
        """Leave it to the other."""

    def follow(self, config: TrainConfig) -> None:
        """Leave it to the other."""

    def append(self, name: str, content: bytes) -> None:
        """Leave it to the other."""

    def log(self, kind: str, **values: Any) -> None:
        """Leave it to the other."""

    def rewind(self, step: int, epoch: int) -> None:
        """Leave it to the other."""

    def save_model(self, weights: Mapping[str, Tensor], card: ModelCard) -> None:
        """Leave it to the other."""

    def save_state(self, state: dict[str, Any]) -> None:
        """Leave it to the other."""


def _ordered(model: bytes) -> bytes:
    """Return a safetensors file with its metadata sorted: the library's order is another each time,
    and equal networks are to be equal files.
    """
    data = 8 + int.from_bytes(model[:8], "little")
    header = json.loads(model[8:data])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + memoryview(model)[data:]


def _text(config: TrainConfig) -> bytes:
    """Return config.json: `config` with the data's places as they are from anywhere."""
    kept = asdict(config) | {"out": None, "resume": False}
    if config.data_dir is not None:
        kept["data_dir"] = os.path.abspath(config.data_dir)
    if is_beton(config.dataset):
        kept["dataset"] = os.path.abspath(config.dataset)
    return json.dumps(kept, indent=1).encode() + b"\n"


def _settings(config: TrainConfig) -> dict[str, Any]:
    """Return what makes the training, and so must be the same after a resume."""
    settings = {name: value for name, value in asdict(config).items() if name not in MOVABLE}
    return settings | {"dataset": Path(config.dataset).name}  # a .beton may have moved


def _difference(mine: dict[str, Any], theirs: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """Return the name and both values of the first setting that differs."""
    theirs = {name: getattr(TrainConfig, name) for name in TrainConfig.added} | theirs
    for name, value in mine.items():
        if theirs.get(name) != value:
            other = theirs.get(name)
            # A file of a stranger may hold what has no end when written out.
            return name, value, other if isinstance(other, str | float) else reprlib.repr(other)
    return None


def check_free(path: Path) -> None:
    """Raise `InputError` unless a new run can be made at `path`."""
    if (path / CONFIG).exists():
        check_unused(path / LOCK)
        raise InputError(
            f"{path} already holds a run: continue it with --resume, or choose another --out"
        )
    # A process that was killed while it made the run may have left two files.
    if path.is_dir() and any(
        file.name != LOCK and not file.name.startswith(f".{CONFIG}.") for file in path.iterdir()
    ):
        raise InputError(f"{path} is a folder with other files in it: choose another --out")
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise InputError(f"{there} is a file: choose another --out")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{there} cannot be written to: choose another --out")


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> nn.Module:
    """Return the trained network of a run directory or a model.safetensors, in eval mode.

    It takes pixels in [0, 1], (B, C, H, W), and returns logits: attack libraries take it as it is.
    Raises `InputError` if the file is missing, damaged or of another network than it says.
    """
    return load_with_card(path, device)[0]


@own_defaults()
def load_with_card(
    path: str | os.PathLike[str], device: torch.device | str = "cpu"
) -> tuple[nn.Module, ModelCard]:
    """`load`, with what the network is and the names of its classes."""
    path = expanded(path)
    file = Path(path) / MODEL if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise InputError(f"{path}: {_why_no_model(Path(path))}")
    if other := kind_of(file):
        raise InputError(f"{file} is {other}, not a model of fastiat: {EXPECTED}")
    model, card = _read(file, lambda: _read_model(file))
    model = model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    return model, card


EXPECTED = f"name a run directory, or the {MODEL} in one"


def _why_no_model(path: Path) -> str:
    """Say what a path is that leads to no model, and what to name instead."""
    if not path.is_dir():
        return "no such run" if not path.exists() else f"it is a pipe or a device: {EXPECTED}"
    if (path / CONFIG).exists():
        return "no trained model in it yet"
    inner = sorted(str(file.parent) for file in path.glob(f"*/{CONFIG}"))
    if inner:
        return f"it is a folder of runs: name one of them, such as {inner[0]}"
    return f"it is a folder without a run: {EXPECTED}"


_SIGNATURES = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"BM": "a BMP image",
    b"II*\0": "a TIFF image",
    b"MM\0*": "a TIFF image",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"\x1f\x8b": "a gzip archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"%PDF": "a PDF",
    b"\x80\x02": "a pickle, such as an old PyTorch checkpoint (torch.save)",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
}


def kind_of(file: Path) -> str | None:
    """Say what a file is that is not in the safetensors format; None where it may be."""
    with open(file, "rb") as opened:
        head = opened.read(512)
    # The size of the JSON header, in eight bytes, then the header; a long one begins as others do.
    if head[8:9] == b"{":
        return None
    if head.startswith(b"PK\3\4") or head.startswith(b"PK\5\6"):
        return _kind_of_zip(file)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "a WebP image"
    if head[257:262] == b"ustar":
        return "a tar archive"
    if file.suffix == ".beton":
        return "a data set"
    for start, kind in _SIGNATURES.items():
        if head.startswith(start):
            return kind
    if not head:
        return "an empty file"
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        # The cut may lie within a character.
        text = head[: error.start].decode() if error.start > len(head) - 4 else "\0"
    if all(c.isprintable() or c in "\t\n\r\f" for c in text):
        return "a text file"
    return None


def _kind_of_zip(file: Path) -> str:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return "a damaged zip archive or PyTorch checkpoint"
    if any(name.endswith("constants.pkl") for name in names):
        return "a TorchScript model (torch.jit.save)"
    if any(name.endswith("data.pkl") for name in names):
        if file.name in (STATE, PREVIOUS):
            return "the training state of a run"
        return "a PyTorch checkpoint (torch.save)"
    if names and all(name.endswith(".npy") for name in names):
        return "an archive of NumPy arrays (.npz)"
    return "a zip archive"


def _read_model(file: Path) -> tuple[nn.Module, ModelCard]:
    with safe_open(file, "pt") as opened:
        text = (opened.metadata() or {}).get("card", "null")
        values = json.loads(text) if len(text) <= LARGEST_JSON else None
        if not isinstance(values, dict):
            raise InputError(
                f"it is in the safetensors format, but not a model of fastiat, as it does not say "
                f"which network: {EXPECTED}"
            )
        card = from_json(ModelCard, values)
        # Built without memory, so that a file cannot ask for more than it brings.
        with torch.device("meta"):
            model = card.build()
        expected = {name: (t.shape, t.dtype) for name, t in model.state_dict().items()}
        ours = set(opened.keys()) == expected.keys()
        weights = {name: opened.get_tensor(name) for name in expected} if ours else {}
    if {name: (t.shape, t.dtype) for name, t in weights.items()} != expected:
        raise InputError(f"it does not hold the weights of {card.arch} of width {card.width}")
    if len(card.classes) != card.num_classes:
        raise InputError(f"it names {len(card.classes)} classes of {card.num_classes}")
    model.load_state_dict(weights, assign=True)
    return model, card


def _read(file: Path, reader: Callable[[], T]) -> T:
    """Run `reader`, turning what a damaged or foreign file can raise into `InputError`."""
    try:
        # torch also warns of what it then refuses.
        with warnings.catch_warnings(action="ignore"):
            return reader()
    except InputError as error:
        raise type(error)(f"{file}: {error}") from None
    except pickle.UnpicklingError:
        raise Damaged(
            f"{file} is refused: it is damaged, or holds code that loading would run"
        ) from None
    except OSError:
        raise
    # torch's and our own readers raise whatever a damaged file makes them stumble on.
    except Exception as error:
        reason = printable((str(error).splitlines() or [type(error).__name__])[0])
        raise Damaged(f"{file} is damaged or truncated ({reason[:100]})") from None
