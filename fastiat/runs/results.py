"""The figures of a run: error rates with their interval, kept in its evaluation.json.

The file is a JSON list of entries, objects with these fields; a field that has no meaning for an
entry's attack is null.

    kind                 "evaluation", "sweep", "transfer" or "autoattack": the command's part
    dataset, split       the images: the data set's name, "test" or "train"
    data                 fingerprint of the data set's images and labels
    attack               "none", "fgsm", "pgd-K", "autoattack", or "worst", of several
    attacks              "worst": those, "none" first; "autoattack": its four
    eps, alpha           radius and step, in pixels of 0 to 1
    steps                gradient steps: fgsm 1, pgd-K K
    norm, loss           "linf" or "l2"; "ce" or "margin"
    restarts             random starts of PGD, of which each image keeps the worst
    random_start         whether PGD starts at a random point of the ball
    precision            arithmetic that crafts, "bf16" or "fp32"; classified in fp32 always
    seed                 of the random starts, and of the draw of `n` images where there are more;
                         null where neither was drawn
    source, source_model "transfer": the attacking run's directory name, and its `model`
    model                fingerprint of the measured weights, see `fingerprint`
    n                    images
    errors               how many of them are misclassified
    error_percent        100 * errors / n
    interval_95_percent  [low, high], Wilson's
    errors_after         "autoattack": {attack: errors after it and those before it}, "none" first
    warnings             "autoattack": what the library found suspicious
    batch_size           images attacked at a time, on which AutoAttack's random numbers depend
    device               what crafted and classified
    versions             {"fastiat", "torch", "autoattack": "name version", where it was used}
    seconds              of the pass that gave this figure, and others of the same pass
    time                 when it was written, ISO 8601 in UTC

Entries with the same settings replace each other, the newest last: those fields down to `n` are
an entry's identity. Entries of weights that the run no longer has are dropped. Tables and charts
compare figures whose `measurement` is the same, and tell the others apart by `differences`.
"""

import hashlib
import json
import math
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

from fastiat import __version__
from fastiat.runs.directory import MODEL
from fastiat.runs.lock import alone
from fastiat.system.errors import InputError
from fastiat.system.files import finite_json, write
from fastiat.system.settings import LARGEST, expanded, fits, steps_of
from fastiat.system.untrusted import read_json_text

EVALUATION = "evaluation.json"
KINDS = ("evaluation", "sweep", "transfer", "autoattack")
IDENTITY: tuple[str, ...] = (
    *("kind", "dataset", "data", "split", "attack", "attacks", "eps", "alpha", "steps", "norm"),
    *("loss", "restarts", "random_start", "precision", "seed"),
    *("source", "source_model", "model", "n"),
)
"""The fields that tell entries apart."""
MEASUREMENT = tuple(name for name in IDENTITY if name not in ("kind", "model"))
"""The fields that say what was measured: not of which weights, nor by which command."""
PGD = ("alpha", "steps", "restarts", "random_start")
MEANINGLESS: dict[str, tuple[str, ...]] = {
    "none": ("eps", "norm", "loss", "precision", *PGD),
    "fgsm": ("alpha", "restarts", "random_start"),
    "autoattack": ("loss", *PGD),
}
"""The fields that are null for an attack."""
_TYPES: dict[str, Any] = {
    **dict.fromkeys(("kind", "dataset", "split", "attack", "model"), str),
    **dict.fromkeys(("data", "norm", "loss", "precision", "source", "source_model"), str | None),
    **dict.fromkeys(("eps", "alpha"), float | None),
    **dict.fromkeys(("steps", "restarts", "seed", "batch_size"), int | None),
    **dict.fromkeys(("n", "errors"), int),
    "attacks": tuple[str, ...] | None,
    "random_start": bool | None,
    "error_percent": float,
    "interval_95_percent": tuple[float, ...],
}


Measurement = tuple[Any, ...]
"""What was measured: the values of the fields of `MEASUREMENT`."""


def measurement(entry: dict[str, Any]) -> Measurement:
    """Return what an entry measures. Figures compare where it is the same, and nowhere else."""
    return tuple(_comparable(entry.get(name)) for name in MEASUREMENT)


def measures(entry: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether an entry's measurement has all these values."""
    found = dict(zip(MEASUREMENT, measurement(entry), strict=True))
    return all(found[name] == _comparable(value) for name, value in wanted.items())


def _comparable(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.9g}")
    return tuple(value) if isinstance(value, list) else value


def differences(measurements: Iterable[Measurement]) -> dict[Measurement, str]:
    """Return, for each of several measurements, in what it differs from the others; "" if alone."""
    several = list(dict.fromkeys(measurements))
    differ = [len(set(values)) > 1 for values in zip(*several, strict=True)]
    return {
        one: ", ".join(
            _phrase(name, value)
            for name, value, differs in zip(MEASUREMENT, one, differ, strict=True)
            if differs and name not in _TOLD_BY_OTHERS
        )
        for one in several
    }


_TOLD_BY_OTHERS = ("steps",)  # by the attack's name


def _phrase(name: str, value: Any) -> str:
    """Write the value of a field of `MEASUREMENT` so that two different values read differently."""
    title = {"random_start": "random start", "source_model": "source", "n": "images"}.get(
        name, name
    )
    if value is None:
        return f"{title} not known" if name != "seed" else "no seed"
    if name == "random_start":
        return title if value else f"no {title}"
    if name in ("n", "restarts"):
        return f"{value} {title}"
    if name == "loss":
        return f"{value} loss"
    if name in ("dataset", "split", "attack", "norm", "precision"):
        return str(value)
    if name == "attacks":
        return f"of {', '.join(value)}"
    if isinstance(value, float):
        levels = round(255 * value)
        is_level = 0 < levels < 255 and value == _comparable(levels / 255)
        return f"{title} {levels}/255" if is_level else f"{title} {value:.9g}"
    return f"{title} {value}"


@dataclass(frozen=True)
class Rate:
    """An error rate measured on `n` images."""

    errors: int
    n: int

    @property
    def percent(self) -> float:
        """The rate in percent."""
        return 100 * self.errors / self.n

    def interval(self) -> tuple[float, float]:
        """Return the 95 % confidence interval in percent (Wilson 1927)."""
        return wilson(self.errors / self.n, self.n)

    def __str__(self) -> str:
        """Write the percentage and how far its interval reaches."""
        return f"{self.percent:.2f}±{max(abs(end - self.percent) for end in self.interval()):.2f}"


def wilson(share: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval in percent (Wilson 1927) of a share, 0 to 1, of `n` images."""
    z = 1.959964
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return 100 * max(middle - half, 0), 100 * min(middle + half, 1)


def read_results(run_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the entries of a run's evaluation.json, oldest first; [] if there are none.

    This module's docstring lists their fields. What was measured on weights that the run no longer
    has is left out. Raises `InputError` for a file that fastiat did not write.
    """
    run_dir = Path(expanded(run_dir))
    model = run_dir / MODEL
    if not model.is_file():
        return []
    mark = fingerprint(model)
    return [entry for entry in _read(run_dir / EVALUATION) if entry["model"] == mark]


def add_results(run_dir: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Add entries to a run's evaluation.json, in place of those with the same identity.

    The fields that have no meaning for an entry's attack become null, and "time" is set.
    """
    now = {"time": datetime.now(UTC).isoformat(timespec="seconds")}
    new = [
        dict.fromkeys(IDENTITY) | entry | dict.fromkeys(MEANINGLESS.get(entry["attack"], ())) | now
        for entry in entries
    ]
    with alone(run_dir):
        kept = {_identity(entry): entry for entry in read_results(run_dir)}
        for entry in new:
            kept.pop(_identity(entry), None)
            kept[_identity(entry)] = entry
        # An entry a line: diffs and eyes can follow.
        lines = ",\n".join(json.dumps(entry) for entry in kept.values())
        write(run_dir / EVALUATION, f"[\n{lines}\n]\n".encode())


def figures(rate: Rate) -> dict[str, Any]:
    """Return a rate as the fields of an entry."""
    return {
        "n": rate.n,
        "errors": rate.errors,
        "error_percent": round(rate.percent, 4),
        "interval_95_percent": [round(end, 4) for end in rate.interval()],
    }


def provenance(device: torch.device, seconds: float, **versions: str) -> dict[str, Any]:
    """Return where, with what and in what time a figure was measured, as the fields of an entry."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu()
    return {
        "device": f"{device.type} ({name})",
        "versions": {"fastiat": __version__, "torch": torch.__version__, **versions},
        "seconds": round(seconds, 3),
    }


def fingerprint(model: Path) -> str:
    """Return 16 hex digits of a SHA-256 over the weights in a model.safetensors.

    The header is left out: its order of metadata differs from save to save.
    """
    stat = model.stat()
    return _fingerprint(model, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_size)


@lru_cache(maxsize=64)
def _fingerprint(model: Path, *_: int) -> str:
    with open(model, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
        # What a damaged file claims may be more than can be skipped.
        file.seek(min(header, model.stat().st_size), os.SEEK_CUR)
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


@cache
def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _identity(entry: dict[str, Any]) -> str:
    return json.dumps([entry.get(name) for name in IDENTITY])


def _read(file: Path) -> list[dict[str, Any]]:
    try:
        entries = finite_json(read_json_text(file))
    except FileNotFoundError:
        return []
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    except (ValueError, RecursionError):
        raise InputError(
            f"{file} is damaged: it is not JSON with finite numbers; remove it and measure again"
        ) from None
    if not (isinstance(entries, list) and all(map(_is_entry, entries))):
        raise InputError(f"{file} was not written by fastiat: remove it and measure again")
    return entries


def _is_entry(entry: Any) -> bool:
    """Whether this has what a reader must rely on."""
    return isinstance(entry, dict) and set(IDENTITY) <= entry.keys() and is_figure(entry)


def is_figure(entry: dict[str, Any]) -> bool:
    """Whether an entry's fields have their types and make sense; one that is missing is null."""
    values: dict[str, Any] = {name: entry.get(name) for name in _TYPES}
    values |= {name: tuple(v) for name, v in values.items() if isinstance(v, list)}
    if not all(fits(value, _TYPES[name]) for name, value in values.items()):
        return False
    span, percent = values["interval_95_percent"], values["error_percent"]
    numbers = [v for v in values.values() if isinstance(v, int | float)]
    # A comparison with NaN is false.
    return (
        values["kind"] in KINDS
        and _is_attack(values["attack"])
        and all(0 <= number <= LARGEST for number in numbers)
        and 0 <= values["errors"] <= values["n"] != 0
        and len(span) == 2
        and all(0 <= share <= 100 for share in (*span, percent))
    )


def _is_attack(name: str) -> bool:
    try:
        return name in ("worst", "autoattack") or steps_of(name) >= 0
    except InputError:
        return False
