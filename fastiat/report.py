"""Showing: one self-contained HTML page for a run or a folder of runs, and its figures as files.

A section without data is left out. Nothing is loaded from a network, neither by the page nor to
make it.
"""

import os
import platform
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fastiat import __version__, data
from fastiat.analyse import read_diagnosis
from fastiat.config import ReportConfig, TrainConfig
from fastiat.page import figure1, figures
from fastiat.page.charts import Label, Measured, label, norm_pictures, sweeps, tradeoff
from fastiat.page.examples import STEPS, data_uri, examples, grid
from fastiat.page.figures import Picture
from fastiat.page.html import Safe, element, join, page, section, table, text
from fastiat.paper import compare as tables
from fastiat.runs.directory import CONFIG, METRICS, MODEL, Run
from fastiat.runs.results import MEASUREMENT, Measurement, differences, measurement
from fastiat.system.errors import InputError
from fastiat.system.files import check_place, write

FIGURES = "figures"
"""Folder of the figures' files, beside the page."""


def report(config: ReportConfig) -> Path:
    """Write the page, figures/*.png and *.svg beside it, and curves and examples in every run.

    A run that cannot be written to is only read. Prints and returns the page's path. Raises
    `InputError` where there is no run, or a file that fastiat did not write.
    """
    folder = Path(config.dir)
    runs = find(folder)
    out = Path(config.out) if config.out else folder / "report.html"
    check_place(out)
    measured: Measured = {run.path: tables.results(run) for run in runs}
    files = sorted(folder.glob("table[1-7].json"))
    comparisons = [tables.read(file) for file in files]
    labels = label(runs)
    runs.sort(key=lambda run: (labels[run.path].colour, run.path.name))
    pictures = [
        *tradeoff(runs, measured, labels, comparisons),
        *sweeps(runs, measured, labels, comparisons),
    ]
    norms = norm_pictures(runs, labels)
    load = cache(data.load)
    parts = [
        ("Errors", "errors", _errors(runs, measured, labels)),
        ("Beside the paper", "paper", join(map(_comparison, comparisons))),
        ("Robustness", "robustness", _show(pictures)),
        ("Norms of the weights", "norms", _norms(norms)),
        ("Diagnosis", "diagnosis", join(_diagnosis(run, labels) for run in runs)),
        ("Examples", "examples", join(_examples(run, load, labels) for run in runs)),
        ("Runs", "runs", join(_section(run, labels) for run in runs)),
        ("Environment", "environment", _environment(measured)),
    ]
    sections = [
        (title, name, section(title, name, content))
        for title, name, content in parts
        if content.strip()
    ]
    lead = f"{len(runs)} run{'s' * (len(runs) != 1)}, errors in % with their 95 % intervals."
    document = page(f"fastiat: {folder.resolve().name}", lead, sections, f"fastiat {__version__}")
    out.parent.mkdir(parents=True, exist_ok=True)
    for picture in [*pictures, *norms]:
        picture.save(out.parent / FIGURES)
    write(out, document.encode())
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


@contextmanager
def _readable(run: Run) -> Iterator[None]:
    """Turn what rows without the usual figures make this file stumble on into `InputError`."""
    try:
        yield
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{run.path / METRICS} has a row that fastiat did not write ({error!r}): remove it"
        ) from None


def _errors(
    runs: Sequence[Run],
    measured: Measured,
    labels: dict[Path, Label],
) -> Safe:
    """Return the newest error of every run in every measurement, sweeps and transfers apart."""
    shown = dict.fromkeys(
        measurement(row) for run in runs for row in measured[run.path] if _direct(row)
    )
    newest = {
        run.path: {measurement(row): _cell(row) for row in measured[run.path]} for run in runs
    }
    columns = _headings(shown)
    if not columns:
        return element("p", "Nothing is evaluated yet: ", element("code", "fastiat evaluate RUN"))
    rows = [
        [_named(path, labels), *(cells.get(column, "") for column in columns)]
        for path, cells in newest.items()
    ]
    return table(["error in %", *columns.values()], rows)


def _named(path: Path, labels: dict[Path, Label]) -> Safe:
    """Return a run's name, and below it its directory where that is another."""
    name = labels[path].name
    return join([name, *([element("small", path.name)] if name != path.name else [])], "")


def _direct(row: dict[str, Any]) -> bool:
    return row["kind"] not in ("sweep", "transfer")


def _headings(measurements: Iterable[Measurement]) -> dict[Measurement, Safe]:
    """Name every measurement by its attack, and by what else sets it apart from the others."""
    groups: dict[Safe, list[Measurement]] = {}
    for one in measurements:
        groups.setdefault(_attack(dict(zip(MEASUREMENT, one, strict=True))), []).append(one)
    headings = {}
    for attack, several in groups.items():
        for one, more in differences(several).items():
            told = more.split(", ")
            unusual = [
                of for of in _unusual(dict(zip(MEASUREMENT, one, strict=True))) if of not in told
            ]
            headings[one] = join([attack, *unusual, *([more] if more else [])], "<br>")
    return headings


def _unusual(row: dict[str, Any]) -> Iterator[str]:
    """Say what of an attack is not its default, in the words of `differences`."""
    if row["attack"] != "none" and row["eps"] is not None:
        if row["loss"] not in ("ce", None):
            yield f"{row['loss']} loss"
        if row["restarts"] not in (1, None):
            yield f"{row['restarts']} restarts"
        if row["random_start"] is False:
            yield "no random start"


def _attack(row: dict[str, Any]) -> Safe:
    """Name an attack and its radius."""
    details = []
    if row["eps"] is not None and row["attack"] != "none":
        details.append(f"{row['norm']} eps {row['eps']:.4g}")
    if row["attack"] == "worst" and row["attacks"]:
        details.append(f"of {', '.join(row['attacks'])}")
    title = "no attack" if row["attack"] == "none" else row["attack"]
    return join([f"{row['split']}, {title}", *details], "<br>")


def _cell(row: dict[str, Any]) -> Safe:
    low, high = row["interval_95_percent"]
    span = element("small", f"{low:.1f} to {high:.1f}, n {row['n']}")
    return join([f"{row['error_percent']:.2f}", span], "")


def _comparison(of: tables.Comparison) -> Safe:
    """Return a table as the paper has it: a row for each training, a column for each attack."""
    columns = list(dict.fromkeys(line.measure for line in of.lines))
    rows: dict[str, dict[str, Safe]] = {}
    for line in of.lines:
        rows.setdefault(line.row, {})[line.measure] = _beside(line)
    cells = [[row, *(of_row.get(column, "") for column in columns)] for row, of_row in rows.items()]
    return join(
        [
            element("h3", of.title),
            element("p", of.caption, kind="note"),
            table(["ours, the paper's below", *columns], cells),
            element("pre", of.command),
        ]
    )


def _beside(line: tables.Line) -> Safe:
    theirs = f"paper {line.paper:.2f}"
    if line.difference is None:
        return join(["not measured", element("small", theirs)], "")
    return join(
        [
            f"{line.ours:.2f}",
            element("small", f"{line.low:.2f} to {line.high:.2f}"),
            element("small", f"{theirs} ({line.difference:+.2f})"),
        ],
        "",
    )


def _show(pictures: Sequence[Picture], kind: str = "figures large") -> Safe:
    drawn = [element("figure", Safe(picture.inline(picture.name))) for picture in pictures]
    return element("div", *drawn, kind=kind) if drawn else Safe("")


def _norms(pictures: Sequence[Picture]) -> Safe:
    if not pictures:
        return Safe("")
    note = (
        "Convolutions count as matrices of (out, in x kernel height x kernel width). "
        f"{figure1.PAPER}. Bars are means over seeds, their lines reach from the lowest to the "
        "highest."
    )
    shown = [
        element("div", element("figure", Safe(one.inline(one.name))), kind="wide norms")
        for one in pictures
    ]
    return join([element("p", note, kind="note"), *shown])


def _diagnosis(run: Run, labels: dict[Path, Label]) -> Safe:
    """Return what `fastiat diagnose` found for a run."""
    rows = [
        [
            finding.check,
            element("span", finding.verdict, kind=finding.verdict.split()[0]),
            finding.sentence,
            join(
                [
                    f"{name.replace('_', ' ')}: {_figure(value)}"
                    for name, value in finding.figures.items()
                ],
                "<br>",
            ),
        ]
        for finding in read_diagnosis(run.path)
    ]
    if not rows:
        return Safe("")
    head = ["check for masked gradients", "", "what it means", "figures"]
    return join([element("h3", _named(run.path, labels)), table(head, rows, kind="text")])


def _figure(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_figure, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _examples(run: Run, load: Any, labels: dict[Path, Label]) -> Safe:
    """Return a grid of images, attacked and not, and write RUN/examples.png and .svg."""
    found = examples(run, load)
    if not found:
        return Safe("")
    eps = run.config.eps
    attack = f"PGD-{STEPS}, eps {eps:.4g}"
    if os.access(run.path, os.W_OK):
        picture = grid(found, f"{run.path.name}: {attack}, difference x {0.5 / eps:.3g}")
        picture.save(run.path)
    cards = [
        element(
            "figure",
            *(
                Safe(f'<img alt="{text(title)}" src="{data_uri(picture)}">')
                for title, picture in zip(
                    ("image", "attacked image", "difference"), example.pictures, strict=True
                )
            ),
            element(
                "figcaption",
                element("b", example.truth),
                f": {example.clean} \u2192 {example.attacked}",
            ),
        )
        for example in found
    ]
    note = (
        f"Image, attacked image ({attack}) and their difference enlarged {0.5 / eps:.3g} times; "
        f"the true class: what the network says without \u2192 with the attack."
    )
    return join(
        [
            element("h3", _named(run.path, labels)),
            element("p", note, kind="note"),
            element("div", *cards, kind="cards"),
        ]
    )


def _section(run: Run, labels: dict[Path, Label]) -> Safe:
    """Return a run's settings, command and curves, and write RUN/curves.png and .svg."""
    config = run.config
    start = TrainConfig(preset=config.preset, dataset=config.dataset)
    command = tables.command_of("train", config, start)
    if config.preset != "paper":
        command += f" --preset {config.preset}"
    if config.dataset != TrainConfig.dataset:
        command += f" --dataset {config.dataset}"
    parts = [
        element("h3", _named(run.path, labels)),
        element("p", _settings(run)),
        element("pre", f"{command} --out {shlex.quote(str(run.path))}"),
    ]
    with _readable(run):
        epochs = [row for row in run.rows() if row.get("kind") == "epoch"]
        drawn = figures.curves(epochs, run.path.name) if epochs else None
    if drawn is None:
        return join([*parts, element("p", "No epoch is finished yet.")])
    together, alone = drawn
    if os.access(run.path, os.W_OK):
        together.save(run.path)
    last = epochs[-1]
    if (run.path / MODEL).exists() and "images_per_second" in last:
        speed = f"{last['epoch']} epochs, {last['images_per_second']} images a second in the last."
        parts.append(element("p", speed, kind="note"))
    prefix = f"{run.path.name}-"
    shown = [element("figure", Safe(one.inline(_identifier(prefix + one.name)))) for one in alone]
    return join([*parts, element("div", *shown, kind="figures")])


def _identifier(name: str) -> str:
    """Return a name as characters that an id may have; different names stay different."""
    return "".join(c if c.isascii() and c.isalnum() else f"_{ord(c):x}_" for c in name)


def _settings(run: Run) -> Safe:
    names = ("dataset", "arch", "width", "adv", "mix", "epochs", "batch_size", "eps", "seed")
    values = {name: getattr(run.config, name) for name in names}
    return join(
        (
            join([name, element("code", value)], " ")
            for name, value in values.items()
            if value is not None
        ),
        ", ",
    )


def _environment(measured: Measured) -> Safe:
    """Return what made the page, and what made the measurements where they say so."""
    used: Counter[str] = Counter()
    for row in (row for rows in measured.values() for row in rows):
        versions, device = row.get("versions"), row.get("device")
        if isinstance(versions, dict):
            names = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
            used[f"{names}; {device}"] += 1
    rows = [[f"{count} measurements", how] for how, count in used.most_common()]
    here = f"fastiat {__version__}, Python {platform.python_version()}, torch {torch.__version__}"
    rows.append(["this page", f"{here}; {platform.platform()}"])
    rows.append(["written", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")])
    return table(["", ""], rows, kind="text")
