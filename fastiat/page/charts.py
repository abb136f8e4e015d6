"""The figures of the report: which results each of them shows."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastiat.measuring.norms import WeightNorms, read_norms
from fastiat.page import figure1, figures
from fastiat.page.figures import Picture, Series
from fastiat.paper.compare import Comparison
from fastiat.paper.published import ROWS, TRAINED, curve, row_of, table
from fastiat.runs.directory import Run
from fastiat.runs.results import Measurement, differences, measurement
from fastiat.system.settings import steps_of

Measured = dict[Path, list[dict[str, Any]]]
"""{run directory: its results, oldest first, with the fields that `runs.results` documents}."""


@dataclass(frozen=True)
class Label:
    """How a run is shown."""

    name: str
    colour: int
    """Which of c0 to c7 of `figures.COLOURS`, modulo 8."""
    training: str
    """The name without the seed."""
    directory: str


def label(runs: Sequence[Run]) -> dict[Path, Label]:
    """Name every run as its row in the paper's tables, in the colour of that row.

    If two different trainings belong to one row, their runs are named after their directories.
    """
    keys = {run.path: row_of(run.config.method_name, run.config.mix) for run in runs}
    trainings = {run.path: _without_seed(run) for run in runs}
    of_row = Counter(key for key, _ in {(keys[path], of) for path, of in trainings.items()})
    seeds = Counter(trainings.values())
    labels = {}
    for number, run in enumerate(runs):
        path, key, directory = run.path, keys[run.path], run.path.name
        if key is None:  # colours after those of the rows
            labels[path] = Label(directory, number + len(TRAINED), directory, directory)
        elif of_row[key] > 1:
            labels[path] = Label(directory, number, directory, directory)
        else:
            title = ROWS[key].title
            seed = f", seed {run.config.seed}" if seeds[trainings[path]] > 1 else ""
            labels[path] = Label(title + seed, TRAINED.index(key), title, directory)
    return labels


def _without_seed(run: Run) -> str:
    """Return a key that is equal for runs that differ only in their seed or place."""
    return repr(replace(run.config, seed=0, out=None, data_dir=None, resume=False))


def _ball(runs: Sequence[Run]) -> str:
    """Return the norm that figures show: "l2" if all runs were trained in it, else "linf"."""
    return "l2" if all(run.config.norm == "l2" for run in runs) else "linf"


def _is_plain(row: dict[str, Any], norm: str) -> bool:
    """Whether a row is of the attack that figures show: white-box, untargeted, on test images."""
    return (
        row["split"] == "test"
        and row.get("source") is None
        and row["norm"] in (norm, None)
        and not row["attack"].endswith("-targeted")
        and row["loss"] in ("ce", None)
        and row["restarts"] in (1, None)
    )


def _is_pgd(row: dict[str, Any], norm: str) -> bool:
    return _is_plain(row, norm) and row["attack"].startswith("pgd-") and bool(row["eps"])


def _same_images(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two rows measure the same images; which images are drawn depends on the seed."""
    names = ("dataset", "data", "split", "n")
    seeds = {one.get("seed"), other.get("seed")} - {None}
    return all(one.get(name) == other.get(name) for name in names) and len(seeds) < 2


def _titled(label: Label, more: str) -> str:
    """Return the legend of a line: its run, and how its measurement differs from the others."""
    return f"{label.name}, {more}" if more else label.name


def tradeoff(
    runs: Sequence[Run],
    measured: Measured,
    labels: dict[Path, Label],
    comparisons: Sequence[Comparison],
) -> list[Picture]:
    """Draw clean against robust error, under the strongest attack that most runs share."""
    norm = _ball(runs)
    # One point for each measurement: a newer result replaces only the same measurement's.
    points: dict[tuple[Path, Measurement], tuple[dict[str, Any], dict[str, Any]]] = {}
    for run in runs:
        plain = [row for row in measured[run.path] if _is_plain(row, norm)]
        for robust in (row for row in plain if _is_pgd(row, norm)):
            same = [of for of in plain if of["attack"] == "none" and _same_images(of, robust)]
            if same:
                points[run.path, measurement(robust)] = same[-1], robust
    shared = {(path, of["attack"], of["eps"]) for (path, _), (_, of) in points.items()}
    attacks = Counter((attack, eps) for _, attack, eps in shared)
    if not attacks:
        return []
    attack, eps = max(attacks, key=lambda key: (attacks[key], steps_of(key[0])))
    points = {
        key: (clean, robust)
        for key, (clean, robust) in points.items()
        if (robust["attack"], robust["eps"]) == (attack, eps)
    }
    more = differences(one for _, one in points)
    series = []
    for (path, one), (clean, robust) in points.items():
        point = clean["error_percent"], robust["error_percent"]
        name, span = _titled(labels[path], more[one]), robust["interval_95_percent"]
        series.append(Series(name, [point], labels[path].colour, [span]))
    for of in comparisons:
        found = {(line.row, line.measure): line.paper for line in of.lines}
        for number, key in enumerate(TRAINED):
            row = ROWS[key].title
            at = (row, "No attack, test"), (row, f"{attack.upper()} eps {eps:g}, test")
            if all(place in found for place in at):
                name = f"paper, Table {of.name[-1:]}: {row}"
                series.append(Series(name, [(found[at[0]], found[at[1]])], number, paper=True))
    title = "Clean and robust error"
    return [figures.tradeoff("tradeoff", title, series, f"error in %, {attack} eps {eps:.4g}")]


def sweeps(
    runs: Sequence[Run],
    measured: Measured,
    labels: dict[Path, Label],
    comparisons: Sequence[Comparison],
) -> list[Picture]:
    """Draw the error over eps at one number of steps, and over steps at one eps."""
    pictures = []
    for along, name in (("eps", "table6"), ("steps", "table7")):
        best = _best_curves(runs, measured, along)
        if best is None:
            continue
        at, curves = best
        more = differences(one for _, one in curves)
        series = []
        for (path, one), rows in curves.items():
            points = [(x, row["error_percent"]) for x, row in rows.items()]
            spans = [row["interval_95_percent"] for row in rows.values()]
            title = _titled(labels[path], more[one])
            series.append(Series(title, points, labels[path].colour, spans))
        if any(of.name == name for of in comparisons):
            for key in table(name).rows:
                title, colour = f"paper: {ROWS[key].title}", TRAINED.index(key)
                series.append(Series(title, curve(name, key), colour, paper=True))
        if along == "eps":
            ball = "L2" if _ball(runs) == "l2" else "L-infinity"
            what, xlabel = f"{at}, by eps", f"eps ({ball}, pixels of 0 to 1)"
        else:
            what, xlabel = f"eps {at:.4g}, by PGD steps", "PGD steps"
        title = f"Error under attack: {what}"
        pictures.append(figures.lines(f"by-{along}", title, series, xlabel, log=along == "steps"))
    return pictures


def _best_curves(
    runs: Sequence[Run], measured: Measured, along: str
) -> tuple[Any, dict[tuple[Path, Measurement], dict[float, dict[str, Any]]]] | None:
    """Return the attack (along "eps") or eps (along "steps") with the most points, and its curves.

    A curve is {x: result} in the order of x, with three points or more. Its results are of one run
    and differ in nothing but x: the settings that x stands for are None in the curve's key.
    """
    fixed, varying = ("attack", ["eps"]) if along == "eps" else ("eps", ["attack", "steps"])
    curves: dict[Any, dict[tuple[Path, Measurement], dict[float, dict[str, Any]]]] = {}
    norm = _ball(runs)
    for run in runs:
        for row in (row for row in measured[run.path] if _is_pgd(row, norm)):
            x = row["eps"] if along == "eps" else float(steps_of(row["attack"]))
            key = run.path, measurement(row | dict.fromkeys(varying))
            curves.setdefault(row[fixed], {}).setdefault(key, {})[x] = row
    full = {
        at: {key: dict(sorted(rows.items())) for key, rows in of.items() if len(rows) >= 3}
        for at, of in curves.items()
    }
    points = {at: sum(map(len, of.values())) for at, of in full.items() if of}
    if not points:
        return None
    best = max(points, key=lambda at: points[at])
    return best, full[best]


def norm_pictures(runs: Sequence[Run], labels: dict[Path, Label]) -> list[Picture]:
    """Draw both norms of every weight; runs with the same layers share a figure."""
    groups: dict[Any, dict[str, list[list[WeightNorms]]]] = {}
    for run in runs:
        layers = read_norms(run.path)
        if layers:
            layout = tuple((layer.name, layer.shape) for layer in layers)
            training = labels[run.path].training
            groups.setdefault(layout, {}).setdefault(training, []).append(layers)
    colours = {of.training: of.colour for of in labels.values()}
    names = ["norms"] if len(groups) == 1 else [f"norms-{n}" for n, _ in enumerate(groups, 1)]
    return [
        picture
        for name, trainings in zip(names, groups.values(), strict=True)
        for picture in figure1.draw_norms(name, trainings, colours)
    ]
