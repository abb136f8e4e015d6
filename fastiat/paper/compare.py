"""One's own figures beside the paper's: found among the runs' results, written as a table.

A `Comparison` is kept as NAME.json, which the report reads, and shown as NAME.md and NAME.csv.
"""

import csv
import io
import json
import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from scipy import stats

from fastiat.paper.published import ROWS, SOURCE, Cell
from fastiat.runs.directory import METRICS, MODEL, Run
from fastiat.runs.results import (
    IDENTITY,
    fingerprint,
    is_figure,
    measures,
    read_results,
    wilson,
)
from fastiat.system.errors import InputError, printable
from fastiat.system.files import write
from fastiat.system.settings import fits, flag_of
from fastiat.system.untrusted import read_json

HEAD = ("row", "measure", "paper", "ours", "difference", "95 % interval")


@dataclass(frozen=True)
class Line:
    """A figure of the paper and ours; errors in %, the difference in points."""

    row: str
    measure: str
    paper: float
    ours: float | None = None
    """None where it is not measured: cited from elsewhere by the paper, or left out."""
    low: float | None = None
    high: float | None = None
    """The 95 % interval of `ours`."""
    errors: int | None = None
    n: int | None = None
    """Misclassified images, and all; of all seeds together."""

    @property
    def difference(self) -> float | None:
        """Ours minus the paper's."""
        return None if self.ours is None else self.ours - self.paper


@dataclass(frozen=True)
class Comparison:
    """A table of the paper beside ours."""

    name: str
    title: str
    caption: str
    command: str
    lines: tuple[Line, ...]

    def write(self, folder: Path) -> list[Path]:
        """Write NAME.md, NAME.csv and NAME.json into a folder and return their paths."""
        kept = json.dumps({"format": 1, "source": SOURCE, **asdict(self)}, indent=1) + "\n"
        texts = {"md": self.markdown(), "csv": self.csv(), "json": kept}
        files = {folder / f"{self.name}.{kind}": text for kind, text in texts.items()}
        for file, text in files.items():
            write(file, text.encode())
        return list(files)

    def markdown(self) -> str:
        """Return the table as Markdown, its caption above."""
        rows = [_texts(line) for line in self.lines]
        return (
            f"**{self.title}.** {self.caption}\n\n{markdown(HEAD, rows, left=2)}\n"
            f"Paper: {SOURCE}.\n\n    {self.command}\n"
        )

    def csv(self) -> str:
        """Return the table as CSV with a line of names, unknown figures empty."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        names = ("row", "measure", "paper", "ours", "difference", "low", "high", "errors", "n")
        writer.writerow(names)
        for line in self.lines:
            values = [getattr(line, name) for name in names]
            writer.writerow([round(v, 4) if isinstance(v, float) else v for v in values])
        return out.getvalue()


def read(file: Path) -> Comparison:
    """Read what `Comparison.write` wrote as JSON; raise `InputError` for anything else."""
    try:
        values = read_json(file)
        lines = tuple(_build(Line, line) for line in values["lines"])
        return _build(Comparison, {**values, "lines": lines})
    except (ValueError, TypeError, KeyError, RecursionError):
        raise InputError(
            f"{file} is not a table of fastiat: remove it, or run fastiat reproduce again"
        ) from None


def _build(kind: type[Any], values: dict[str, Any]) -> Any:
    hints = get_type_hints(kind)
    taken = {field.name: values[field.name] for field in fields(kind)}
    for name, value in taken.items():
        # The lines are built already.
        if name != "lines" and not fits(value, hints[name]):
            raise ValueError(name)
    if kind is Line and len({taken[name] is None for name in ("ours", "low", "high")}) > 1:
        raise ValueError("ours")
    return kind(**taken)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table, its columns padded, the first `left` of them aligned left."""
    # A bar would end its cell.
    rows = [[printable(cell).replace("|", r"\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |\n"

    rules = [
        "-" * width if number < left else "-" * (width - 1) + ":"
        for number, width in enumerate(widths)
    ]
    return line(head) + line(rules) + "".join(map(line, rows))


def _texts(line: Line) -> tuple[str, ...]:
    """Write a line's cells, the columns of `HEAD`."""
    cells = (line.row, line.measure, f"{line.paper:.2f}")
    if line.ours is None or line.low is None or line.high is None:
        return (*cells, "", "", "")
    span = f"{line.low:.2f} to {line.high:.2f}"
    return (*cells, f"{line.ours:.2f}", f"{line.ours - line.paper:+.2f}", span)


def results(run: Run) -> list[dict[str, Any]]:
    """Return the measurements of the weights that a run has now, oldest first.

    Those of evaluation.json, and before them what earlier versions wrote to metrics.jsonl alone,
    after the last epoch: what stands before it belongs to weights that are no more. All have every
    field of `results.IDENTITY`. Raises `InputError` for rows that fastiat did not write.
    """
    # Earlier versions did not say which images, and measured on the run's own.
    unsaid = dict.fromkeys(IDENTITY) | {"dataset": run.config.dataset, "model": ""}
    rows: list[dict[str, Any]] = []
    for row in run.rows():
        if row.get("kind") == "epoch":
            rows.clear()
        elif row.get("kind") == "evaluation" and "model" not in row:
            rows.append(unsaid | row)
    if not all(map(is_figure, rows)):
        raise InputError(
            f"{run.path / METRICS} has a row that fastiat did not write, of kind evaluation but "
            f"without its figures: remove it"
        )
    return rows + read_results(run.path)


def find(
    cell: Cell,
    found: list[dict[str, Any]],
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
    precision: arithmetic that crafts; "auto" takes any, so that machines can share the work.
    source: the run that the examples are crafted on: `run` itself in a white-box attack.
    """
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
    model = source / MODEL
    if not model.exists():
        return None
    origins = {(source.name, fingerprint(model)), *([(None, None)] if source == run else [])}

    def fitting(row: dict[str, Any]) -> bool:
        origin = row.get("source"), row.get("source_model")
        # A draw of images with another seed is of other images.
        return origin in origins and row.get("seed") in (None, 0) and measures(row, wanted)

    return next(filter(fitting, reversed(found)), None)


def line(cell: Cell, found: Sequence[dict[str, Any] | None]) -> Line:
    """Put the results of a cell, one for each seed, beside the paper's figure.

    One seed has the interval of its counts (Wilson 1927), which is about the choice of images.
    Several see the same images, so that this stays as it is for one; independent of it is the
    spread of trainings, with the mean's interval from Student's t over the seeds, and the reaches
    of both add up in squares. The line stays without figures of ours until all seeds are measured.
    """
    title, measured = ROWS[cell.row].title, [row for row in found if row is not None]
    if not measured or len(measured) < len(found):
        return Line(title, cell.measure, cell.error_percent)
    errors, n = (sum(int(row[name]) for row in measured) for name in ("errors", "n"))
    rates = [100 * row["errors"] / row["n"] for row in measured]
    mean = sum(rates) / len(rates)
    seeds = len(rates)
    low, high = wilson(mean / 100, n // seeds)
    if seeds > 1:
        spread = math.sqrt(sum((rate - mean) ** 2 for rate in rates) / (seeds - 1))
        half = float(stats.t.ppf(0.975, seeds - 1)) * spread / math.sqrt(seeds)
        low = max(mean - math.hypot(mean - low, half), 0.0)
        high = min(mean + math.hypot(high - mean, half), 100.0)
    return Line(title, cell.measure, cell.error_percent, mean, low, high, errors, n)


def command_of(name: str, config: Any, default: Any) -> str:
    """Return the command line whose settings are `config`, those of `default` left out."""
    words = ["fastiat", name]
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in config.positional:
            words += map(str, value if isinstance(value, tuple) else (value,))
        elif value != getattr(default, field.name) and value is not None:
            words += _flag(field.name, value)
    return " ".join(words)


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [flag_of(name) if value else "--no-" + flag_of(name)[2:]]
    values = value if isinstance(value, tuple) else (value,)
    return [flag_of(name), *(shlex.quote(_word(one)) for one in values)]


def _word(value: Any) -> str:
    """Write a value so that the command line reads the same one back."""
    if isinstance(value, float):
        levels = round(255 * value)
        return f"{levels}/255" if 0 < levels < 255 and value == levels / 255 else repr(value)
    return str(value)
