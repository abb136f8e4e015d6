"""The run directory: configuration, metrics, weights and everything that a resume needs."""

import io
import json
import math
import os
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from fastiat import __version__, models
from fastiat.config import TrainConfig
from fastiat.errors import InputError
from fastiat.settings import flag_of, from_json, is_beton

CONFIG, METRICS, MODEL, STATE, LOG = (
    "config.json",
    "metrics.jsonl",
    "model.safetensors",
    "state.pt",
    "stdout.log",
)
T = TypeVar("T")
# Where a run lies and where its data lie may change between stop and resume.
MOVABLE: dict[str, Any] = {"out": None, "data_dir": None, "resume": False}
# All loaders make the same batches of the same images, which the checkpoint recognises.
INTERCHANGEABLE: dict[str, Any] = {"loader": "auto"}


@dataclass(frozen=True)
class ModelCard:
    """What it takes to rebuild a network around its weights; the metadata of model.safetensors."""

    arch: str
    width: int
    num_classes: int
    in_channels: int
    image_size: int
    classes: tuple[str, ...]

    def build(self) -> models.Network:
        """Return a freshly initialised network of this kind."""
        return models.build(
            self.arch, self.num_classes, self.in_channels, self.image_size, self.width
        )


def default_out(config: TrainConfig) -> Path:
    """Return the directory of a run that was given none."""
    images = Path(config.dataset).stem
    return Path("runs") / f"{images}-{config.arch}-{config.adv}-{config.mix}-s{config.seed}"


class Run:
    """A run directory, `path`, and the configuration in it."""

    def __init__(self, path: Path, config: TrainConfig) -> None:
        self.path = path
        self.config = config

    @classmethod
    def create(cls, path: Path, config: TrainConfig) -> "Run":
        """Make the directory; raise `InputError` if it already holds a run or is a file."""
        check_free(path)
        kept = asdict(replace(config, **MOVABLE))
        # The data's place is no setting of the method, but `evaluate` must find them again.
        if config.data_dir is not None:
            kept["data_dir"] = str(Path(config.data_dir).absolute())
        if is_beton(config.dataset):
            kept["dataset"] = str(Path(config.dataset).expanduser().absolute())
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        try:
            path.mkdir(parents=True, exist_ok=True)
            write(path / CONFIG, json.dumps(kept, indent=1).encode() + b"\n")
        except BaseException:
            for folder in made:
                with suppress(OSError):
                    folder.rmdir()
            raise
        return cls(path, config)

    @classmethod
    def open(cls, path: Path) -> "Run":
        """Open an existing run; raise `InputError` if there is none or its config is damaged."""
        file = path / CONFIG
        try:
            values = json.loads(file.read_text())
            if not isinstance(values, dict):
                raise InputError("it is not a JSON object")
            config = from_json(TrainConfig, values)
            config.check()
        except FileNotFoundError:
            raise InputError(f"{path} holds no run: there is no {CONFIG} in it") from None
        except (NotADirectoryError, IsADirectoryError):
            raise InputError(f"{path} is no run directory") from None
        except InputError as error:
            raise InputError(f"{file}: {error}") from None
        except (ValueError, RecursionError):
            raise InputError(f"{file} is damaged: it is not JSON") from None
        return cls(path, config)

    def check_same(self, config: TrainConfig) -> None:
        """Raise `InputError`, naming the first difference, unless `config` is this run's."""
        difference = _difference(_settings(self.config), _settings(config))
        if difference:
            name, mine, theirs = difference
            raise InputError(
                f"{self.path} was started with {flag_of(name)} {mine}, not {theirs}: "
                f"resume without that flag, or start a new run with another --out"
            )

    def log(self, kind: str, **values: Any) -> None:
        """Append one row, a JSON object on a line, to metrics.jsonl."""
        file = self.path / METRICS
        if file.exists() and _last_byte(file) not in (b"", b"\n"):
            self._keep_rows(lambda row: True)
        self.append(METRICS, json.dumps({"kind": kind, **values}).encode() + b"\n")

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of metrics.jsonl; raise `InputError` at a line that is none.

        A last line that a crash cut short is left out.
        """
        file = self.path / METRICS
        for number, line in enumerate(_lines(file), 1):
            row = _row(line)
            if row is None and line.endswith("\n"):
                raise InputError(f"{file}, line {number} is damaged: it is not a JSON object")
            if row is not None:
                yield row

    def rewind(self, step: int, epoch: int) -> None:
        """Drop the rows of later steps and epochs, so that a resume does not double them.

        Lines that a crash left damaged go too.
        """

        def before(row: dict[str, Any]) -> bool:
            if row.get("kind") not in ("step", "epoch"):
                return True
            name, last = ("epoch", epoch) if row.get("kind") == "epoch" else ("step", step)
            return isinstance(row.get(name), int) and row[name] <= last

        self._keep_rows(before)

    def _keep_rows(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        lines = _lines(self.path / METRICS)
        kept = [line for line in lines if (row := _row(line)) is not None and keep(row)]
        if kept != lines:
            write(self.path / METRICS, "".join(kept).encode())

    def say(self, text: str) -> None:
        """Print a text, and keep it in stdout.log."""
        print(text, flush=True)
        self.append(LOG, f"{text}\n".encode())

    def append(self, name: str, content: bytes) -> None:
        """Append to a file of the run; an `OSError` says which."""
        file = self.path / name
        try:
            with open(file, "ab") as out:
                out.write(content)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(file)) from None

    def save_model(self, weights: Mapping[str, Tensor], card: ModelCard) -> None:
        """Write model.safetensors: the weights, and the card that rebuilds the network."""
        metadata = {"format": "pt", "fastiat": __version__, "card": json.dumps(asdict(card))}
        tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
        write(self.path / MODEL, safetensors.torch.save(tensors, metadata))

    def save_state(self, state: dict[str, Any]) -> None:
        """Write state.pt: everything that a resume needs."""
        buffer = io.BytesIO()
        torch.save(state | {"config": _settings(self.config)}, buffer)
        write(self.path / STATE, buffer.getbuffer())

    def load_state(self) -> dict[str, Any]:
        """Read state.pt without executing anything in it; raise `InputError` if that fails."""
        file = self.path / STATE
        if not file.exists():
            raise InputError(
                f"{self.path} has no checkpoint yet: start again with another --out, "
                f"or remove the folder"
            )
        return _read(file, lambda: self._read_state(file))

    def _read_state(self, file: Path) -> dict[str, Any]:
        state = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not isinstance(state.get("config"), dict):
            raise InputError("it is not a checkpoint of fastiat: put the run's own back")
        difference = _difference(_settings(self.config), state["config"])
        if difference:
            name, mine, theirs = difference
            raise InputError(
                f"it is of another run, with {flag_of(name)} {theirs} instead of {mine}: "
                "put the run's own back"
            )
        return state


def _settings(config: TrainConfig) -> dict[str, Any]:
    """Return what makes a training this one, wherever its data lie."""
    settings = asdict(replace(config, **MOVABLE, **INTERCHANGEABLE))
    return settings | {"dataset": Path(config.dataset).name}


def _difference(mine: dict[str, Any], theirs: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """Return the name and both values of the first setting that differs."""
    for name, value in mine.items():
        if theirs.get(name) != value:
            return name, value, theirs.get(name)
    return None


def _last_byte(file: Path) -> bytes:
    with open(file, "rb") as opened:
        opened.seek(max(opened.seek(0, os.SEEK_END) - 1, 0))
        return opened.read(1)


def _lines(file: Path) -> list[str]:
    """Return the lines of a file, with their ends, or nothing if it is not there."""
    # Only "\n" ends a line: `str.splitlines` knows more.
    text = file.read_text(errors="replace") if file.exists() else ""
    return list(io.StringIO(text, newline="\n"))


def finite_json(text: str) -> Any:
    """Read JSON; raise `ValueError` also for NaN, infinity and numbers too large for a float."""

    def number(word: str) -> float:
        value = float(word)
        if not math.isfinite(value):
            raise ValueError(f"{word[:20]} is not finite")
        return value

    def whole(word: str) -> int:
        number(word)
        return int(word)

    return json.loads(text, parse_constant=number, parse_float=number, parse_int=whole)


def _row(line: str) -> dict[str, Any] | None:
    """Read a line of metrics.jsonl, or return None if it is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and line.endswith("\n") else None


def check_free(path: Path) -> None:
    """Raise `InputError` unless a new run can be made at `path`."""
    if (path / CONFIG).exists():
        raise InputError(
            f"{path} already holds a run: continue it with --resume, or choose another --out"
        )
    if path.is_dir() and any(path.iterdir()):
        raise InputError(f"{path} is a folder with other files in it: choose another --out")
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise InputError(f"{there} is a file: choose another --out")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{there} cannot be written to: choose another --out")


def check_place(file: Path) -> None:
    """Raise `InputError` unless a file can be written at `file`, its folder made first."""
    if file.is_dir():
        raise InputError(f"{file} is a folder: name a file with --out")
    there = next(folder for folder in file.absolute().parents if folder.exists())
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


def load_with_card(
    path: str | os.PathLike[str], device: torch.device | str = "cpu"
) -> tuple[nn.Module, ModelCard]:
    """`load`, with what the network is and the names of its classes."""
    file = Path(path) / MODEL if Path(path).is_dir() else Path(path)
    if not file.is_file():
        hint = "no trained model in it yet" if Path(path).is_dir() else "no such run"
        raise InputError(f"{path}: {hint}")
    model, card = _read(file, lambda: _read_model(file))
    model = model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    return model, card


def _read_model(file: Path) -> tuple[nn.Module, ModelCard]:
    with safe_open(file, "pt") as opened:
        values = json.loads((opened.metadata() or {}).get("card", "null"))
        if not isinstance(values, dict):
            raise InputError("it is not a model of fastiat: it does not say which network")
        card = from_json(ModelCard, values)
        weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    # Built without memory, so that a file cannot ask for more than it brings.
    with torch.device("meta"):
        model = card.build()
    expected = {name: (t.shape, t.dtype) for name, t in model.state_dict().items()}
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
        raise InputError(f"{file}: {error}") from None
    except pickle.UnpicklingError:
        raise InputError(
            f"{file} is refused: it is damaged, or holds code that loading would run"
        ) from None
    except OSError:
        raise
    # torch's and our own readers raise whatever a damaged file makes them stumble on.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{file} is damaged or truncated ({reason[:100]})") from None


def write(file: Path, content: bytes | memoryview) -> None:
    """Write a file whole or not at all: beside it, flushed to the disk, then renamed onto it."""
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        os.replace(beside, file)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(file)) from None
        raise
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
