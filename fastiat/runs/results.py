"""The error rates of a run, with their intervals: evaluation.json.

The file is a JSON list of entries, one for each error rate, with the fields of `Entry`; a field
that has no meaning for the entry's attack is null. An entry may also have

    errors_after  "autoattack": {attack: errors after this and all earlier attacks}, "none" first
    warnings      "autoattack": the warnings of the library
    batch_size    images attacked at a time, which changes AutoAttack's random numbers
    device        device of attack and classification, as text
    versions      {"fastiat", "torch"; "autoattack": "name version" where it was used}
    seconds       duration of the pass over the images; one pass may give several entries
    time          when the entry was written, ISO 8601 in UTC

An entry replaces the one with the same `IDENTITY`, and is appended as the newest. Entries of
weights that the run no longer has are dropped. Tables and charts compare entries with the same
`measurement`, and label different measurements by their `differences`.
"""

import json
import math
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastiat import __version__
from fastiat.runs.directory import MODEL
from fastiat.runs.lock import alone
from fastiat.runs.weights import data_sha256
from fastiat.system.errors import InputError
from fastiat.system.files import write
from fastiat.system.settings import LARGEST, expanded, hints_of, steps_of, validated
from fastiat.system.untrusted import read_json

EVALUATION = "evaluation.json"


@dataclass(frozen=True)
class Entry:
    """The fields of an entry that its readers rely on."""

    kind: Literal["evaluation", "sweep", "transfer", "autoattack"]
    """The command that measured, or "autoattack"."""
    dataset: str
    """Name of the data set."""
    data: str | None
    """Fingerprint of the data set's images and labels."""
    split: str
    """"test" or "train"."""
    attack: str
    """"none", "fgsm", "pgd-K", "autoattack", or "worst": for each image the worst attack counts."""
    attacks: tuple[str, ...] | None
    """"worst": its attacks, "none" first; "autoattack": its four."""
    eps: float | None
    """Radius of the eps ball, for pixels in [0, 1]."""
    alpha: float | None
    """PGD step size, for pixels in [0, 1]."""
    steps: int | None
    """Gradient steps: fgsm 1, pgd-K K."""
    norm: str | None
    """Norm of the eps ball, "linf" or "l2"."""
    loss: str | None
    """Loss that the attack maximises, "ce" or "margin"."""
    restarts: int | None
    """Number of random starts of PGD; for each image the worst result counts."""
    random_start: bool | None
    """Whether PGD starts at a random point of the ball."""
    precision: str | None
    """Precision of the attack, "bf16" or "fp32"; classification is always in fp32."""
    seed: int | None
    """Seed of the random starts, and of the choice of `n` images if the split has more."""
    source: str | None
    """"transfer": directory name of the attacking run."""
    source_model: str | None
    """"transfer": `model` of the attacking run."""
    model: str
    """Fingerprint of the measured weights (see `fingerprint`)."""
    n: int
    """Number of images."""
    errors: int
    """Number of misclassified images."""
    error_percent: float
    """100 * errors / n."""
    interval_95_percent: tuple[float, ...]
    """Wilson's interval of `error_percent`, (low, high)."""

    def __post_init__(self) -> None:
        """Raise `InputError` for values that no measurement has."""
        numbers = [v for v in vars(self).values() if isinstance(v, int | float)]
        shares = (self.error_percent, *self.interval_95_percent)
        if self.attack not in ("worst", "autoattack"):
            steps_of(self.attack)
        if not (
            all(0 <= number <= LARGEST for number in numbers)
            and 0 <= self.errors <= self.n != 0
            and len(shares) == 3
            and all(0 <= share <= 100 for share in shares)
        ):
            raise InputError("its figures are impossible")


FIELDS = tuple(hints_of(Entry))
IDENTITY = tuple(n for n in FIELDS if n not in ("errors", "error_percent", "interval_95_percent"))
"""The fields that identify an entry."""
MEASUREMENT = tuple(name for name in IDENTITY if name not in ("kind", "model"))
"""The fields that define a measurement: all that identify an entry, except weights and command."""
PGD = ("alpha", "steps", "restarts", "random_start")
MEANINGLESS: dict[str, tuple[str, ...]] = {
    "none": ("eps", "norm", "loss", "precision", *PGD),
    "fgsm": ("alpha", "restarts", "random_start"),
    "autoattack": ("loss", *PGD),
}
"""Maps an attack to its fields without meaning, which are null."""
Measurement = tuple[Any, ...]
"""The values of the fields of `MEASUREMENT`."""


def measurement(entry: dict[str, Any]) -> Measurement:
    """Return the measurement of an entry; only entries with equal measurements may be compared."""
    return tuple(_comparable(entry.get(name)) for name in MEASUREMENT)


def measures(entry: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether an entry's measurement has all these values."""
    found = dict(zip(MEASUREMENT, measurement(entry), strict=True))
    return all(found[name] == _comparable(value) for name, value in wanted.items())


def _comparable(value: Any) -> Any:
    """Return floats rounded to 9 significant digits, lists as tuples, other values unchanged."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    return tuple(value) if isinstance(value, list) else value


def differences(measurements: Iterable[Measurement]) -> dict[Measurement, str]:
    """Map each of several measurements to text that says how it differs from the others."""
    several = list(dict.fromkeys(measurements))
    differ = [len(set(values)) > 1 for values in zip(*several, strict=True)]
    return {
        one: ", ".join(
            _phrase(name, value)
            for name, value, differs in zip(MEASUREMENT, one, differ, strict=True)
            if differs and name != "steps"  # the attack's name has them: pgd-20
        )
        for one in several
    }


def _phrase(name: str, value: Any) -> str:
    """Return a field of `MEASUREMENT` as text; different values give different texts."""
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

    @classmethod
    def of(cls, wrong: Tensor) -> "Rate":
        """Return the rate of (N,) bool, which images are misclassified."""
        return cls(int(wrong.sum()), len(wrong))

    @property
    def percent(self) -> float:
        """The rate in percent."""
        return 100 * self.errors / self.n

    def interval(self) -> tuple[float, float]:
        """Return the 95 % confidence interval in percent, see `wilson`."""
        return wilson(self.errors / self.n, self.n)

    def __str__(self) -> str:
        """Return the percentage, "±" and its distance to the farther end of its interval."""
        return f"{self.percent:.2f}±{max(abs(end - self.percent) for end in self.interval()):.2f}"


def wilson(share: float, n: int) -> tuple[float, float]:
    """Return Wilson's (1927) 95 % interval, in percent, of a share in [0, 1] of `n` images."""
    z = 1.959964
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return 100 * max(middle - half, 0), 100 * min(middle + half, 1)


def read_results(run_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the entries of a run's evaluation.json, see `Entry`, oldest first.

    Entries of weights that the run no longer has are left out. Raises `InputError` for a file that
    fastiat did not write.
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
        kept: dict[str, dict[str, Any]] = {}
        for entry in (*read_results(run_dir), *new):
            identity = json.dumps([entry.get(name) for name in IDENTITY])
            kept.pop(identity, None)  # so that the new entry comes last
            kept[identity] = entry
        # One entry on each line, so that diffs are readable.
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
    """Return device, versions and duration of a measurement, as the fields of an entry."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu()
    return {
        "device": f"{device.type} ({name})",
        "versions": {"fastiat": __version__, "torch": torch.__version__, **versions},
        "seconds": round(seconds, 3),
    }


def fingerprint(model: Path) -> str:
    """Return 16 hex digits of the SHA-256 of the weights in a model.safetensors.

    The header, which holds the version of fastiat, does not change the fingerprint.
    """
    stat = model.stat()
    return _fingerprint(model, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_size)


@lru_cache(maxsize=64)
def _fingerprint(model: Path, *_: int) -> str:
    """Hash a file; the other arguments, from `stat`, make the cache miss after a change."""
    return data_sha256(model)[:16]


@cache
def _cpu() -> str:
    """Return the model name of the CPU, or the machine type if the name is unknown."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _read(file: Path) -> list[dict[str, Any]]:
    remedy = "remove it and measure again"
    try:
        entries = read_json(file, remedy)
    except FileNotFoundError:
        return []
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and set(IDENTITY) <= entry.keys() and is_figure(entry)
        for entry in entries
    ):
        raise InputError(f"{file} was not written by fastiat: {remedy}")
    return entries


def is_figure(entry: dict[str, Any]) -> bool:
    """Whether the fields of an entry are those of a valid `Entry`; a missing field is null."""
    try:
        validated({name: entry.get(name) for name in FIELDS}, Entry)
    except InputError:
        return False
    return True
