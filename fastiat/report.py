"""The report: one self-contained HTML page for a run or a folder of runs, and its figures as files.

This file gathers what the page shows; page/templates/ says how it looks. Each function below
returns the content of one section for the macro of the same name in sections.html; empty content
leaves the section out. Nothing is downloaded, neither to make the page nor to show it.
"""

import os
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined

from fastiat import __version__, data
from fastiat.config import ReportConfig, TrainConfig
from fastiat.measuring.verdicts import Finding, read_diagnosis
from fastiat.page import figure1, figures
from fastiat.page.charts import Label, Measured, label, norm_pictures, sweeps, tradeoff
from fastiat.page.examples import STEPS, examples, grid
from fastiat.paper import compare
from fastiat.runs.directory import CONFIG, METRICS, MODEL, Run
from fastiat.runs.results import MEASUREMENT, Measurement, differences, measurement, read_results
from fastiat.system.errors import InputError, printable
from fastiat.system.files import check_place, write

FIGURES = "figures"
"""Folder of the figures' files, beside the page."""
Labels = dict[Path, Label]


def _printable(value: Any) -> Any:
    """Return a value as one line without control characters; HTML of the templates unchanged."""
    return value if hasattr(value, "__html__") else printable(value)


TEMPLATES = Environment(
    loader=PackageLoader("fastiat.page"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=_printable,
)


def report(config: ReportConfig) -> Path:
    """Write the page, figures/*.png and *.svg beside it, and curves and examples in every run.

    A run directory without write permission is only read. Prints and returns the page's path.
    Raises `InputError` if there is no run, or if fastiat did not write one of the files.
    """
    folder = Path(config.dir)
    runs = find(folder)
    out = Path(config.out) if config.out else folder / "report.html"
    check_place(out)
    measured: Measured = {run.path: read_results(run.path) for run in runs}
    comparisons = [compare.read(file) for file in sorted(folder.glob("table[1-7].json"))]
    labels = label(runs)
    runs.sort(key=lambda run: (labels[run.path].colour, run.path.name))
    pictures = [
        *tradeoff(runs, measured, labels, comparisons),
        *sweeps(runs, measured, labels, comparisons),
    ]
    norms = norm_pictures(runs, labels)
    # Runs often share a data set: each is loaded once.
    load = cache(data.load)
    sections = [
        ("Errors", "errors", errors(runs, measured, labels)),
        ("Compared with the paper", "paper", [pivoted(of) for of in comparisons]),
        ("Robustness", "robustness", pictures),
        ("Norms of the weights", "norms", norms),
        ("Diagnosis", "diagnosis", diagnosis(runs, labels)),
        ("Examples", "examples", list(drawn_examples(runs, load, labels, config.arch))),
        ("Runs", "runs", [shown_run(run, labels[run.path]) for run in runs]),
        ("Environment", "environment", environment(measured)),
    ]
    page = TEMPLATES.get_template("page.html").render(
        title=f"fastiat: {folder.resolve().name}",
        count=len(runs),
        sections=[dict(title=t, name=n, content=content) for t, n, content in sections if content],
        colours=figures.COLOURS,
        figure1_of_the_paper=figure1.PAPER,
        version=__version__,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    for picture in [*pictures, *norms]:
        picture.save(out.parent / FIGURES)
    write(out, page.encode())
    print(out)
    return out


def find(folder: Path) -> list[Run]:
    """Return the run that a folder is, or those in it; raise `InputError` if there is none."""
    if (folder / CONFIG).exists():
        return [Run.open(folder)]
    found = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    if not found:
        raise InputError(f"{folder} holds no run: name a run directory or a folder of them")
    return [Run.open(path) for path in found]


def errors(runs: Sequence[Run], measured: Measured, labels: Labels) -> dict[str, Any]:
    """Return the newest error of every run in every measurement, without sweeps and transfers.

    {"columns": a heading for each measurement, "rows": (label, an entry or None for each column)}
    """
    newest = {
        run.path: {
            measurement(row): row
            for row in measured[run.path]
            if row["kind"] not in ("sweep", "transfer")
        }
        for run in runs
    }
    columns = _headings(dict.fromkeys(of for found in newest.values() for of in found))
    rows = [(labels[path], [of.get(column) for column in columns]) for path, of in newest.items()]
    return {"columns": list(columns.values()), "rows": rows}


def _headings(measurements: Iterable[Measurement]) -> dict[Measurement, list[str]]:
    """Return the heading of every measurement, a list of lines.

    The lines are the attack, its settings that are not the defaults, and its differences from the
    other measurements with the same attack.
    """
    groups: dict[tuple[str, ...], list[Measurement]] = {}
    for one in measurements:
        groups.setdefault(_attack(dict(zip(MEASUREMENT, one, strict=True))), []).append(one)
    headings = {}
    for attack, several in groups.items():
        for one, more in differences(several).items():
            unusual = _unusual(dict(zip(MEASUREMENT, one, strict=True)))
            told = [of for of in unusual if of not in more.split(", ")]
            headings[one] = [*attack, *told, *filter(None, [more])]
    return headings


def _unusual(row: dict[str, Any]) -> Iterator[str]:
    """Yield the settings of an attack that are not the defaults, in the words of `differences`."""
    if row["attack"] != "none" and row["eps"] is not None:
        if row["loss"] not in ("ce", None):
            yield f"{row['loss']} loss"
        if row["restarts"] not in (1, None):
            yield f"{row['restarts']} restarts"
        if row["random_start"] is False:
            yield "no random start"


def _attack(row: dict[str, Any]) -> tuple[str, ...]:
    """Return lines that name the split, the attack and its radius."""
    if row["attack"] == "none":
        return (f"{row['split']}, no attack",)
    lines = [f"{row['split']}, {row['attack']}"]
    if row["eps"] is not None:
        lines.append(f"{row['norm']} eps {row['eps']:.4g}")
    if row["attack"] == "worst" and row["attacks"]:
        lines.append(f"of {', '.join(row['attacks'])}")
    return tuple(lines)


def pivoted(of: compare.Comparison) -> tuple[compare.Comparison, list[str], dict[str, Any]]:
    """Lay out a table as the paper does: a row for each training, a column for each attack.

    Returns the table, its columns, and {row: {column: `compare.Line`}}.
    """
    rows: dict[str, dict[str, compare.Line]] = {}
    for line in of.lines:
        rows.setdefault(line.row, {})[line.measure] = line
    return of, list(dict.fromkeys(line.measure for line in of.lines)), rows


def diagnosis(runs: Sequence[Run], labels: Labels) -> list[tuple[Label, list[Finding]]]:
    """Return the findings of `fastiat diagnose`, for the runs that have some."""
    found = [(labels[run.path], read_diagnosis(run.path)) for run in runs]
    return [(label, findings) for label, findings in found if findings]


def figure(value: Any) -> str:
    """Format a value of a finding: floats with four digits, lists with commas."""
    if isinstance(value, list):
        return ", ".join(map(figure, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


TEMPLATES.filters["figure"] = figure


def drawn_examples(
    runs: Sequence[Run],
    load: Callable[..., data.Dataset],
    labels: Labels,
    arch: str | None = None,
) -> Iterator[tuple[Label, str, str, list[Any]]]:
    """Yield label, attack, enlargement and examples of every run, and write RUN/examples.png, .svg.

    arch: function of the user's own network. A run is left out if it has no model or no eps, if it
    trained a network of the user's own and `arch` is not given, or if its images are not on this
    machine.
    """
    for run in runs:
        found, eps = examples(run, load, arch), run.config.eps
        if found:
            attack, factor = f"PGD-{STEPS}, eps {eps:.4g}", f"{0.5 / eps:.3g}"
            if os.access(run.path, os.W_OK):
                grid(found, f"{run.path.name}: {attack}, difference x {factor}").save(run.path)
            yield labels[run.path], attack, factor, found


def shown_run(run: Run, label: Label) -> dict[str, Any]:
    """Return a run's settings, command, speed and curves, and write RUN/curves.png and .svg."""
    config, name = run.config, run.path.name
    # The command names the preset and the settings that differ from it.
    preset = TrainConfig(preset=config.preset)
    start = replace(preset, preset=TrainConfig.preset, dataset=TrainConfig.dataset)
    names = ("dataset", "arch", "width", "adv", "mix", "epochs", "batch_size", "eps", "seed")
    values = {name: getattr(config, name) for name in names}
    epochs = [row for row in run.rows() if row.get("kind") == "epoch"]
    curves, speed = [], None
    if epochs:
        try:
            together, alone = figures.curves(epochs, name)
            if (run.path / MODEL).exists() and "images_per_second" in epochs[-1]:
                of = epochs[-1]
                speed = (
                    f"{of['epoch']} epochs, {of['images_per_second']} images a second in the last."
                )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{run.path / METRICS} has a row that fastiat did not write ({error!r}): remove it"
            ) from None
        if os.access(run.path, os.W_OK):
            together.save(run.path)
        curves = [(_identifier(f"{name}-{one.name}"), one) for one in alone]
    return {
        "label": label,
        "settings": {name: value for name, value in values.items() if value is not None},
        "command": compare.command_of("train", replace(config, out=str(run.path)), start),
        "speed": speed,
        "curves": curves,
    }


def _identifier(name: str) -> str:
    """Return a name as characters that an id may have; different names stay different."""
    return "".join(c if c.isascii() and c.isalnum() else f"_{ord(c):x}_" for c in name)


def environment(measured: Measured) -> list[tuple[str, str]]:
    """Return (name, value) rows: versions and devices of the measurements, then of this page."""
    used: Counter[str] = Counter()
    for row in (row for rows in measured.values() for row in rows):
        if isinstance(versions := row.get("versions"), dict):
            names = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
            used[f"{names}; {row.get('device')}"] += 1
    here = f"fastiat {__version__}, Python {platform.python_version()}, torch {torch.__version__}"
    return [
        *((f"{count} measurements", how) for how, count in used.most_common()),
        ("this page", f"{here}; {platform.platform()}"),
        ("written", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")),
    ]
