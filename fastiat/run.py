"""The run directory: configuration, metrics, weights and everything that a resume needs."""

import io
import json
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastiat import __version__, models
from fastiat.config import TrainConfig, from_json
from fastiat.errors import InputError

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
    name = f"{config.dataset}-{config.arch}-{config.adv}-{config.mix}-s{config.seed}"
    return Path("runs") / name


class Run:
    """A run directory, `path`, and the configuration in it."""

    def __init__(self, path: Path, config: TrainConfig) -> None:
        self.path = path
        self.config = config

    @classmethod
    def create(cls, path: Path, config: TrainConfig) -> "Run":
        """Make the directory; raise `InputError` if it already holds a run or is a file."""
        check_free(path)
        path.mkdir(parents=True, exist_ok=True)
        kept = asdict(replace(config, **MOVABLE))
        # The data's place is no setting of the method, but `evaluate` must find them again.
        if config.data_dir is not None:
            kept["data_dir"] = str(Path(config.data_dir).absolute())
        write(path / CONFIG, json.dumps(kept, indent=1).encode() + b"\n")
        return cls(path, config)

    @classmethod
    def open(cls, path: Path) -> "Run":
        """Open an existing run; raise `InputError` if there is none or its config is damaged."""
        file = path / CONFIG
        try:
            values = json.loads(file.read_text())
        except FileNotFoundError:
            raise InputError(f"{path} holds no run: there is no {CONFIG} in it") from None
        except (NotADirectoryError, IsADirectoryError):
            raise InputError(f"{path} is no run directory") from None
        except (ValueError, RecursionError):
            raise InputError(f"{file} is damaged: it is not JSON") from None
        if not isinstance(values, dict):
            raise InputError(f"{file} is damaged: it is not a JSON object")
        try:
            config = from_json(TrainConfig, values)
            config.check()
            return cls(path, config)
        except InputError as error:
            raise InputError(f"{file}: {error}") from None

    def check_same(self, config: TrainConfig) -> None:
        """Raise `InputError`, naming the first difference, unless `config` is this run's."""
        mine, theirs = (asdict(replace(c, **MOVABLE)) for c in (self.config, config))
        for name, value in mine.items():
            if theirs[name] != value:
                raise InputError(
                    f"{self.path} was started with {name} {value}, not {theirs[name]}: "
                    f"resume without that flag, or start a new run with another --out"
                )

    def log(self, kind: str, **values: Any) -> None:
        """Append one row, a JSON object on a line, to metrics.jsonl."""
        row = json.dumps({"kind": kind, **values})
        with open(self.path / METRICS, "a") as file:
            file.write(row + "\n")

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of metrics.jsonl; raise `InputError` at a line that is none."""
        file = self.path / METRICS
        if not file.exists():
            return
        with open(file, errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                if not isinstance(row, dict):
                    raise InputError(f"{file}, line {number} is not a JSON object")
                yield row

    def rewind(self, step: int) -> None:
        """Drop the rows that a training wrote after `step`, so that a resume does not double them.

        A last line cut short by a crash goes too.
        """
        file = self.path / METRICS
        if not file.exists():
            return
        kept = []
        for line in file.read_text(errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if row.get("kind") == "evaluation" or row.get("step", 0) <= step:
                kept.append(line + "\n")
        write(file, "".join(kept).encode())

    def say(self, line: str) -> None:
        """Print a line, and keep it in stdout.log."""
        print(line, flush=True)
        with open(self.path / LOG, "a") as file:
            file.write(line + "\n")

    def save_model(self, weights: Mapping[str, Tensor], card: ModelCard) -> None:
        """Write model.safetensors: the weights, and the card that rebuilds the network."""
        metadata = {"format": "pt", "fastiat": __version__, "card": json.dumps(asdict(card))}
        tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
        write(self.path / MODEL, safetensors.torch.save(tensors, metadata))

    def save_state(self, state: dict[str, Any]) -> None:
        """Write state.pt: everything that a resume needs."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write(self.path / STATE, buffer.getbuffer())

    def load_state(self) -> dict[str, Any]:
        """Read state.pt without executing anything in it; raise `InputError` if that fails."""
        file = self.path / STATE
        if not file.exists():
            raise InputError(
                f"{self.path} has no checkpoint yet: start again with another --out, "
                f"or remove the folder"
            )
        state = _read(file, lambda: torch.load(file, map_location="cpu", weights_only=True))
        if not isinstance(state, dict):
            raise InputError(f"{file} is not a checkpoint of fastiat")
        return state


def check_free(path: Path) -> None:
    """Raise `InputError` unless a new run can be made at `path`."""
    if (path / CONFIG).exists():
        raise InputError(
            f"{path} already holds a run: continue it with --resume, or choose another --out"
        )
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file: choose another --out")
    if path.is_dir() and any(path.iterdir()):
        raise InputError(f"{path} is a folder with other files in it: choose another --out")


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
        hint = "no trained model in it yet" if file.parent.is_dir() else "no such run"
        raise InputError(f"{file.parent if file.name == MODEL else file}: {hint}")
    card, weights = _read(file, lambda: _read_model(file))
    # Built without memory, so that a file cannot ask for more than it brings.
    with torch.device("meta"):
        model = card.build()
    expected = {name: (t.shape, t.dtype) for name, t in model.state_dict().items()}
    if {name: (t.shape, t.dtype) for name, t in weights.items()} != expected:
        raise InputError(f"{file} does not hold the weights of {card.arch} of width {card.width}")
    model.load_state_dict(weights, assign=True)
    model = model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    return model.requires_grad_(True), card


def _read_model(file: Path) -> tuple[ModelCard, dict[str, Tensor]]:
    with safe_open(file, "pt") as opened:
        card = json.loads((opened.metadata() or {}).get("card", "null"))
        if not isinstance(card, dict):
            raise InputError(f"{file} is not a model of fastiat: it does not say which network")
        card = from_json(ModelCard, card)
        return card, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def _read(file: Path, reader: Callable[[], T]) -> T:
    """Run `reader`, turning what a damaged or foreign file can raise into `InputError`."""
    try:
        return reader()
    except InputError:
        raise
    except pickle.UnpicklingError:
        raise InputError(
            f"{file} is refused: it is damaged, or holds code that loading would run"
        ) from None
    except (SafetensorError, RuntimeError, ValueError, KeyError, EOFError, TypeError) as error:
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
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
