"""Our error rates next to the paper's: found in the results of runs, written as a table.

A `Comparison` is stored as NAME.json, which the report reads, and as NAME.md and NAME.csv.
"""

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy import stats

from fastiat.paper.published import ROWS, SOURCE, Cell
from fastiat.runs.directory import MODEL
from fastiat.runs.results import fingerprint, measures, wilson
from fastiat.system.errors import InputError
from fastiat.system.files import write
from fastiat.system.settings import flag_of, number_text
from fastiat.system.tables import csv_text, markdown
from fastiat.system.untrusted import read_as


@dataclass(frozen=True)
class Line:
    """An error rate of the paper and ours, in %; their difference in percentage points."""

    row: str
    measure: str
    paper: float
    ours: float | None = None
    """None if it is not measured: the paper cites it from elsewhere, or it was left out."""
    low: float | None = None
    high: float | None = None
    """The 95 % interval of `ours`."""
    errors: int | None = None
    n: int | None = None
    """Misclassified images, and all images, summed over the seeds."""

    def __post_init__(self) -> None:
        """Raise `InputError` for a figure without its interval, which a damaged file may hold."""
        if len({value is None for value in (self.ours, self.low, self.high)}) > 1:
            raise InputError("it has a figure without its 95 % interval")

    @property
    def difference(self) -> float | None:
        """Ours minus the paper's, None where ours is not measured."""
        return None if self.ours is None else self.ours - self.paper


@dataclass(frozen=True)
class Comparison:
    """A table of the paper with our results next to it."""

    name: str
    title: str
    caption: str
    command: str
    lines: tuple[Line, ...]
    source: str = SOURCE

    def write(self, folder: Path) -> None:
        """Write NAME.md, NAME.csv and NAME.json into a folder."""
        kept = json.dumps(asdict(self), indent=1) + "\n"
        for kind, text in {"md": self.markdown(), "csv": self.csv(), "json": kept}.items():
            write(folder / f"{self.name}.{kind}", text.encode())

    def markdown(self) -> str:
        """Return the table as Markdown, its caption above."""
        head = ("row", "measure", "paper", "ours", "difference", "95 % interval")
        rows = []
        for of in self.lines:
            ours = ("", "", "")
            if of.difference is not None:
                ours = (f"{of.ours:.2f}", f"{of.difference:+.2f}", f"{of.low:.2f} to {of.high:.2f}")
            rows.append((of.row, of.measure, f"{of.paper:.2f}", *ours))
        return (
            f"**{self.title}.** {self.caption}\n\n{markdown(head, rows, left=2)}\n"
            f"Paper: {self.source}.\n\n    {self.command}\n"
        )

    def csv(self) -> str:
        """Return the table as CSV with a line of names, unknown figures empty."""
        names = ("row", "measure", "paper", "ours", "difference", "low", "high", "errors", "n")
        values = ([getattr(line, name) for name in names] for line in self.lines)
        rows = [[round(v, 4) if isinstance(v, float) else v for v in row] for row in values]
        return csv_text(names, rows)


def read(file: Path) -> Comparison:
    """Read what `Comparison.write` wrote as JSON; raise `InputError` for anything else."""
    return read_as(file, Comparison, "remove it, or run fastiat reproduce again")


def find(
    cell: Cell,
    found: Sequence[dict[str, Any]],
    *,
    n: int,
    alpha: float,
    dataset: str,
    data: str | None = None,
    precision: str = "auto",
    run: Path,
    source: Path,
) -> dict[str, Any] | None:
    """Return the newest of the results of `run` that measures a cell on `n` images, or None.

    data: fingerprint of the images, None where it is not known.
    precision: arithmetic of the attack; "auto" accepts any, so that machines can share the work.
    source: the run that the examples are crafted on: `run` itself in a white-box attack.
    """
    model = source / MODEL
    if not model.exists():
        return None
    wanted: dict[str, Any] = {
        "dataset": dataset, "split": cell.split, "attack": cell.attack, "attacks": None, "n": n,
    }  # fmt: skip
    if data is not None:
        wanted["data"] = data
    if cell.attack != "none":
        wanted |= {"norm": "linf", "loss": "ce", "eps": cell.eps}
        wanted |= {} if precision == "auto" else {"precision": precision}
    if cell.attack.startswith("pgd"):
        wanted |= {"alpha": alpha, "random_start": True, "restarts": 1}
    # `fastiat transfer` names the source of a white-box attack too, `fastiat evaluate` does not.
    origins = [(source.name, fingerprint(model)), *[(None, None)] * (source == run)]
    # Another seed would draw other images.
    alternatives = [
        wanted | {"source": name, "source_model": weights, "seed": seed}
        for name, weights in origins
        for seed in (None, 0)
    ]
    return next(
        (row for row in reversed(found) if any(measures(row, one) for one in alternatives)), None
    )


def line(cell: Cell, found: Sequence[dict[str, Any] | None]) -> Line:
    """Put the results of a cell, one for each seed, next to the paper's error rate.

    The line has no error rate of ours until all seeds are measured. Seeds share the images, so
    Wilson's interval (1927) uses the number of images of one. With several seeds, Student's t gives
    the interval of the mean over trainings. The two are independent: half-widths add in quadrature.
    """
    title, measured = ROWS[cell.row].title, [row for row in found if row is not None]
    seeds = len(measured)
    if not measured or seeds < len(found):
        return Line(title, cell.measure, cell.error_percent)
    errors, n = (sum(int(row[name]) for row in measured) for name in ("errors", "n"))
    rates = [100 * row["errors"] / row["n"] for row in measured]
    mean = fmean(rates)
    low, high = wilson(mean / 100, n // seeds)
    if seeds > 1:
        half = float(stats.t.ppf(0.975, seeds - 1)) * stdev(rates) / math.sqrt(seeds)
        low = max(mean - math.hypot(mean - low, half), 0.0)
        high = min(mean + math.hypot(high - mean, half), 100.0)
    return Line(title, cell.measure, cell.error_percent, mean, low, high, errors, n)


def command_of(name: str, config: Any, default: Any) -> str:
    """Return the command line of `config`, without settings that equal those of `default`."""
    words = ["fastiat", name]
    # Positional arguments come first, as in the usage line; settings of several commands last.
    own, first = type(config).__annotations__, config.positional
    for field in sorted(fields(config), key=lambda f: (f.name not in first, f.name not in own)):
        value, flag = getattr(config, field.name), flag_of(field.name)
        values = value if isinstance(value, tuple) else (value,)
        if field.name in config.positional:
            words += map(str, values)
        elif value == getattr(default, field.name) or value is None:
            continue
        elif isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            texts = (number_text(v) if isinstance(v, float) else str(v) for v in values)
            words += [flag, *map(shlex.quote, texts)]
    return " ".join(words)
