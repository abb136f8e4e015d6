"""The run directory: configuration, metrics, weights and checkpoints of one training."""

import json
import os
import reprlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastiat.config import TrainConfig
from fastiat.engine.device import own_defaults, to_device
from fastiat.models import ModelCard, Network
from fastiat.networks.normalise import inner
from fastiat.networks.sources import load_weights
from fastiat.runs import metrics
from fastiat.runs.lock import Lock, alone, check_unused
from fastiat.runs.weights import (
    EXPECTED,
    OwnNetwork,
    pack_model,
    pack_state,
    read_model,
    read_state,
    read_weights,
)
from fastiat.system.errors import DamagedError, InputError, one_line, printable_lines
from fastiat.system.files import check_writable, no_link, write
from fastiat.system.ranks import ranks
from fastiat.system.settings import ARCHS, expanded, flag_of, is_beton, is_own_arch
from fastiat.system.untrusted import kind_of, read_as

CONFIG, METRICS, LOG, LOCK = "config.json", "metrics.jsonl", "stdout.log", ".lock"
MODEL, STATE = "model.safetensors", "state.safetensors"
PREVIOUS = "state.previous.safetensors"
T = TypeVar("T")
MOVABLE = {"init", "out", "data_dir", "loader", "resume", "checkpoint_every", "on_nan"}
"""Settings that a resume may change, because they do not change the weights."""


def default_out(config: TrainConfig) -> Path:
    """Return the directory of a run without --out: runs/DATASET-ARCH-METHOD-MIX-sSEED.

    DATASET of a folder of images is "folder-" and its name.
    """
    images = Path(config.dataset).stem
    if config.dataset == "folder" and config.data_dir:
        images = f"folder-{Path(config.data_dir).resolve().name}"
    # "nets/mine.py:make_net" becomes "mine-make_net", "timm:resnet50" "timm-resnet50", and
    # "torchvision:resnet50" "resnet50".
    module, _, name = config.arch.rpartition(":")
    arch = name if module in ("", "torchvision") else f"{Path(module).stem}-{name}"
    return Path("runs") / f"{images}-{arch}-{config.method_name}-{config.mix}-s{config.seed}"


class Run:
    """A run directory, `path`, and the configuration in it.

    A training holds the lock of the directory, from `create` or `lock` to `unlock`. Of several
    processes one writes; in the others `writes` is False: methods that write or lock do nothing.
    """

    def __init__(self, path: Path, config: TrainConfig, writes: bool = True) -> None:
        self.path = path
        self.config = config
        self.writes = writes
        self._lock: Lock | None = None
        self._newest_damaged = False

    @classmethod
    def create(cls, path: Path, config: TrainConfig) -> "Run":
        """Make the directory, lock it and write config.json; an error leaves no directory behind.

        Raises `InputError` if the directory holds a run or other files, or is a file.
        """
        check_free(path)
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        run = cls(path, config)
        try:
            path.mkdir(parents=True, exist_ok=True)
            run.lock()
            if (path / CONFIG).exists():
                raise InputError(f"{path} now holds a run of another process: choose another --out")
            write(path / CONFIG, _text(config))
        except BaseException:
            if run._lock is not None:
                (path / LOCK).unlink(missing_ok=True)
                run.unlock()
            for folder in made:
                with suppress(OSError):  # the folder is not empty, or was not made
                    folder.rmdir()
            raise
        return run

    @classmethod
    def open(cls, path: Path, writes: bool = True) -> "Run":
        """Open an existing run; raise `InputError` if there is none or config.json is damaged."""
        file = path / CONFIG
        try:
            config = read_as(file, TrainConfig)
        except FileNotFoundError:
            raise InputError(f"{path} holds no run: there is no {CONFIG} in it") from None
        except (NotADirectoryError, IsADirectoryError):
            raise InputError(f"{path} is no run: name the directory of a run") from None
        try:
            config.check()
        except InputError as error:
            raise InputError(f"{file}: {error}") from None
        return cls(path, config, writes)

    def follow(self, config: TrainConfig) -> None:
        """Write the place of the data set at a resume to config.json, for later commands."""
        moved = replace(
            self.config, dataset=config.dataset, data_dir=config.data_dir, extra=config.extra
        )
        if self.writes and _text(moved) != _text(self.config):
            with alone(self.path):
                write(self.path / CONFIG, _text(moved))
        self.config = moved

    def check_same(self, config: TrainConfig) -> None:
        """Raise `InputError`, which names the first difference, unless `config` is this run's."""
        difference = _difference(_settings(self.config), _settings(config))
        if difference:
            name, mine, theirs = difference
            raise InputError(
                f"{self.path} was started with {flag_of(name)} {mine}, not {theirs}: "
                f"resume without that flag, or start a new run with another --out"
            )

    def lock(self) -> None:
        """Lock the directory for training; raise `InputError` if another process trains in it.

        Temporary files that a killed process has left are removed.
        """
        if not self.writes:
            return
        lock = Lock(self.path / LOCK)
        if not lock.take():
            check_unused(self.path / LOCK)
            # The other process released the lock after `take` failed.
            raise InputError(f"{self.path} is in training by another process: try again")
        self._lock = lock
        with alone(self.path):  # an evaluation may be writing one of the files
            for name in (CONFIG, METRICS, MODEL, STATE, PREVIOUS, "evaluation.json"):
                for file in self.path.glob(f".{name}.*"):
                    file.unlink(missing_ok=True)

    def unlock(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _check_there(self) -> None:
        """Raise `InputError` if the locked directory is no longer at `path`."""
        if self._lock is not None and not self._lock.intact():
            raise InputError(
                f"{self.path} was removed, replaced or unmounted during training: "
                f"restore it and resume the run, or start again with another --out"
            )

    def log(self, kind: str, **values: Any) -> None:
        """Append one row, a JSON object on a line, to metrics.jsonl.

        An incomplete last line, which a crash leaves, is removed first.
        """
        if not self.writes:
            return
        self._check_there()
        with alone(self.path):
            metrics.drop_cut_line(self.path / METRICS)
            self.append(METRICS, json.dumps({"kind": kind, **values}).encode() + b"\n")

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of metrics.jsonl; raise `InputError` for a damaged line.

        An incomplete last line, which a crash leaves, is skipped.
        """
        return metrics.read_rows(self.path / METRICS)

    def has_row(self, values: dict[str, Any]) -> bool:
        """Whether a row of metrics.jsonl has all these values."""
        return metrics.has_row(self.path / METRICS, values)

    def rewind(self, step: int, epoch: int) -> None:
        """Remove damaged rows, and rows after `step` and `epoch`, which the resume writes again."""
        if self.writes:
            with alone(self.path):
                metrics.drop_later_rows(self.path / METRICS, step, epoch)

    def log_line(self, text: str) -> None:
        """Print a text, and append it to stdout.log."""
        text = printable_lines(text)
        print(text, flush=True)
        self.append(LOG, f"{text}\n".encode())

    def append(self, name: str, content: bytes) -> None:
        """Append to a file of the run; an `OSError` names the file."""
        if not self.writes:
            return
        file = self.path / name
        self._check_there()
        try:
            with open(file, "ab", opener=no_link) as out:
                out.write(content)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(file)) from None

    def save_model(self, weights: Mapping[str, Tensor], card: ModelCard) -> None:
        """Write model.safetensors: the weights, and the card that rebuilds the network."""
        if self.writes:
            self._check_there()
            write(self.path / MODEL, pack_model(weights, card))

    def save_state(self, state: dict[str, Any]) -> None:
        """Write a checkpoint, state.safetensors, and keep the previous one; see `pack_state`."""
        if not self.writes:
            return
        self._check_there()
        content = pack_state(state | {"config": _settings(self.config)})
        # fsync metrics.jsonl first, so that a power cut cannot keep the checkpoint but lose rows
        # from before it.
        if (self.path / METRICS).exists():
            with open(self.path / METRICS, "rb", opener=no_link) as rows:
                os.fsync(rows.fileno())
        # A damaged STATE must not replace an intact PREVIOUS.
        older = None if self._newest_damaged else self.path / PREVIOUS
        write(self.path / STATE, content, older)
        self._newest_damaged = False

    def has_state(self) -> bool:
        """Whether there is a checkpoint; it may be damaged."""
        return (self.path / STATE).exists() or (self.path / PREVIOUS).exists()

    def load_state(self, take: Callable[[dict[str, Any]], T]) -> T:
        """Call `take` with STATE, or with PREVIOUS if STATE is damaged, and return its result.

        `take` may raise `DamagedError` for a checkpoint that it cannot use. Raises `InputError` if
        there is no usable checkpoint, or if it belongs to another run.
        """
        if not self.has_state():
            raise InputError(f"{self.path} has no checkpoint yet: resume it, or remove the folder")
        wrong = []
        for file in (self.path / STATE, self.path / PREVIOUS):
            try:
                if not file.exists():
                    raise DamagedError("it is missing")
                taken = take(self._read_state(file))
            except DamagedError as error:
                wrong.append(f"{file}: {error}")
                continue
            except InputError as error:
                raise InputError(f"{file}: {error}") from None
            if wrong and ranks().first:
                warning = one_line(f"warning: {wrong[0]}; using {file.name}")
                print(f"fastiat: {warning}", file=sys.stderr)
            self._newest_damaged = bool(wrong)
            return taken
        raise InputError(f"{'; '.join(wrong)}: put one back, or start again with another --out")

    def _read_state(self, file: Path) -> dict[str, Any]:
        """Return the state in `file`; raise `InputError` if it is damaged or of another run."""
        state = read_state(file)
        config = state.get("config")
        if not isinstance(config, dict):
            raise DamagedError("it is not a checkpoint of fastiat")
        difference = _difference(_settings(self.config), config)
        if difference:
            name, mine, theirs = difference
            raise InputError(
                f"it is of another run, with {flag_of(name)} {theirs} instead of {mine}: "
                "restore the checkpoint of this run"
            )
        return state


def _text(config: TrainConfig) -> bytes:
    """Return the content of config.json: the settings, with absolute paths to the data."""
    kept = asdict(config) | {"out": None, "resume": False}
    for name in ("init", "data_dir", "extra", *(["dataset"] if is_beton(config.dataset) else [])):
        if kept[name] is not None:
            kept[name] = os.path.abspath(kept[name])
    return json.dumps(kept, indent=1).encode() + b"\n"


def _settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that a resume must not change, as parsed JSON has them."""
    settings = {name: value for name, value in asdict(config).items() if name not in MOVABLE}
    if is_beton(config.dataset):  # it may have moved under another name
        settings["dataset"] = ".beton"
    if config.extra is not None:
        settings["extra"] = ".npz"
    # JSON has no tuples: a checkpoint has lists in their place.
    return {n: list(v) if isinstance(v, tuple) else v for n, v in settings.items()}


def _difference(mine: dict[str, Any], theirs: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """Return the name and both values of the first setting that differs."""
    for name, value in mine.items():
        other = theirs.get(name)
        if other != value:
            # The value from a file may be very long.
            return name, value, other if isinstance(other, str | float) else reprlib.repr(other)
    return None


def check_free(path: Path) -> None:
    """Raise `InputError` unless a new run can be made at `path`."""
    if (path / CONFIG).exists():
        check_unused(path / LOCK)
        raise InputError(f"{path} already holds a run: add --resume, or choose another --out")
    # A process that was killed in `create` may have left its lock and a temporary config file.
    if path.is_dir() and any(
        file.name != LOCK and not file.name.startswith(f".{CONFIG}.") for file in path.iterdir()
    ):
        raise InputError(f"{path} is a folder with other files in it: choose another --out")
    check_writable(path)


def load(
    path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    *,
    model: nn.Module | None = None,
) -> nn.Module:
    """Return the trained network of a run directory or a model.safetensors, in eval mode.

    The network takes pixels in [0, 1], (B, C, H, W), and returns logits, (B, num_classes), as
    attack libraries expect. A network of your own needs `model`, the network that the weights are
    loaded into: a file never names code to import. Raises `InputError` if the file is missing or
    damaged, if its weights do not fit its card, and for a `model` that it has no use for.
    """
    own = None if model is None else lambda card: card.behind_normalisation(model)
    loaded, card = load_with_card(path, device, own=own)
    if model is not None and not is_own_arch(card.arch):
        raise InputError(f"{path} holds {card.arch}, which fastiat builds itself: leave out model")
    return loaded


@own_defaults()
def load_with_card(
    path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    *,
    arch: str | None = None,
    own: OwnNetwork | None = None,
) -> tuple[nn.Module, ModelCard]:
    """Return the network, as `load` does, and its card: architecture, image size, class names.

    arch: function of the user's own network, MODULE:FUNCTION; or `own` returns that network.
    """
    file = model_file(path)
    if arch is not None:
        own = lambda card: card.own(arch)  # noqa: E731
    try:
        model, card = read_model(file, own)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    return to_device(model, device).eval(), card


def load_initial(model: nn.Module, path: str) -> list[str]:
    """Copy the weights at `path`, a run or a .safetensors file, into `model`.

    The normalisation of `model` stays as it is; the file need not have one. Returns the names of
    the classifier's tensors if they are left as they are, see `sources.load_weights`.
    """
    file = model_file(path)
    try:
        weights, card = read_weights(file)
        if card is not None and card.wraps:
            prefix = "network."
            weights = {
                n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)
            }
        elif card is not None and card.arch in ARCHS:
            weights = {n: t for n, t in weights.items() if not n.startswith("normalise.")}
        model = inner(model)
        # A built-in network holds its normalisation, which may have buffers, as `normalise`.
        kept = model.normalise.state_dict() if isinstance(model, Network) else {}
        return load_weights(model, weights | {f"normalise.{n}": t for n, t in kept.items()})
    except InputError as error:
        raise InputError(f"--init {file}: {error}") from None


def model_file(path: str | os.PathLike[str]) -> Path:
    """Return the path of a run's weights or of a file of weights; raise `InputError` for others."""
    path = Path(expanded(path))
    file = path / MODEL if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{path}: {_why_no_model(path)}")
    if other := kind_of(file):
        raise InputError(f"{file} is {other}, not a model of fastiat: {EXPECTED}")
    return file


def _why_no_model(path: Path) -> str:
    """Return why there is no model at `path`, and which path to give instead."""
    if not path.exists():
        return "it is a link to nothing" if path.is_symlink() else "no such run"
    if not path.is_dir():
        return f"it is a pipe or a device: {EXPECTED}"
    if (path / CONFIG).exists():
        return "no trained model in it yet"
    inner = sorted(str(file.parent) for file in path.glob(f"*/{CONFIG}"))
    if inner:
        return f"it is a folder of runs: name one of them, such as {inner[0]}"
    return f"it is a folder without a run: {EXPECTED}"
