"""The report's figures: which of the runs' results make which."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastiat.measuring.norms import WeightNorms, read_norms
from fastiat.page import figure1, figures
from fastiat.page.figures import Picture, Series
from fastiat.paper import compare as tables
from fastiat.paper import published as paper
from fastiat.runs.directory import Run
from fastiat.runs.results import Measurement, differences, measurement
from fastiat.system.settings import steps_of

Measured = dict[Path, list[dict[str, Any]]]
"""The results of every run, oldest first, with the fields that `fastiat.runs.results` documents."""


@dataclass(frozen=True)
class Label:
    """How a run is shown."""

    name: str
    colour: int
    training: str
    """The name without the seed."""


def label(runs: Sequence[Run]) -> dict[Path, Label]:
    """Name every run as its row in the paper's tables, in the colour of that row.

    Where two different trainings are of one row, their names are the directories'.
    """
    trainings = {run.path: _training(run) for run in runs}
    keys = {run.path: paper.row_of(run.config.adv, run.config.mix) for run in runs}
    shared = Counter(key for key, _ in {(keys[path], of) for path, of in trainings.items()})
    seeds = Counter(trainings.values())
    labels = {}
    for number, run in enumerate(runs):
        key, path = keys[run.path], run.path
        if key is None or shared[key] > 1:
            labels[path] = Label(path.name, number + len(paper.TRAINED) * (key is None), path.name)
            continue
        title = paper.ROWS[key].title
        seeded = f", seed {run.config.seed}" if seeds[trainings[path]] > 1 else ""
        labels[path] = Label(title + seeded, paper.TRAINED.index(key), title)
    return labels


def _training(run: Run) -> str:
    """Return what runs that differ in their seed alone share."""
    return repr(replace(run.config, seed=0, out=None, data_dir=None, resume=False))


def _plain(row: dict[str, Any], attack: str | None = None) -> bool:
    """Whether a row is of the attack that figures show: white-box, L-infinity, on test images."""
    return (
        row["split"] == "test"
        and row.get("source") is None
        and row["norm"] in ("linf", None)
        and row["loss"] in ("ce", None)
        and row["restarts"] in (1, None)
        and attack in (None, row["attack"])
    )


def _same_images(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two rows are of the same images: a draw depends on the seed, too."""
    names = ("dataset", "data", "split", "n")
    seeds = one.get("seed"), other.get("seed")
    return all(one.get(name) == other.get(name) for name in names) and (
        None in seeds or seeds[0] == seeds[1]
    )


def _named(label: Label, more: str) -> str:
    """Name a line of a figure: its run, and in what its measurement differs from the others."""
    return f"{label.name}, {more}" if more else label.name


def tradeoff(
    runs: Sequence[Run],
    measured: Measured,
    labels: dict[Path, Label],
    comparisons: Sequence[tables.Comparison],
) -> list[Picture]:
    """Draw clean against robust error, under the strongest attack that most runs share."""
    # A point for every measurement: the newest of a run takes only the place of the same one.
    points: dict[tuple[Path, Measurement], tuple[dict[str, Any], dict[str, Any]]] = {}
    for run in runs:
        rows = measured[run.path]
        for robust in filter(_plain, rows):
            same = [row for row in rows if _plain(row, "none") and _same_images(row, robust)]
            if same and robust["attack"].startswith("pgd-") and robust["eps"]:
                points[run.path, measurement(robust)] = same[-1], robust
    shared = {(path, row["attack"], row["eps"]) for (path, _), (_, row) in points.items()}
    attacks = Counter((attack, eps) for _, attack, eps in shared)
    if not attacks:
        return []
    attack, eps = max(attacks, key=lambda key: (attacks[key], steps_of(key[0])))
    points = {
        key: pair
        for key, pair in points.items()
        if (pair[1]["attack"], pair[1]["eps"]) == (attack, eps)
    }
    more = differences(one for _, one in points)
    series = []
    for (path, one), (clean, robust) in points.items():
        shown, span = labels[path], robust["interval_95_percent"]
        point = clean["error_percent"], robust["error_percent"]
        series.append(Series(_named(shown, more[one]), [point], shown.colour, [span]))
    for of in comparisons:
        found = {(line.row, line.measure): line.paper for line in of.lines}
        for number, key in enumerate(paper.TRAINED):
            row = paper.ROWS[key].title
            at = (row, "No attack, test"), (row, f"{attack.upper()} eps {eps:g}, test")
            if all(place in found for place in at):
                name = f"paper, Table {of.name[-1]}: {row}"
                series.append(Series(name, [(found[at[0]], found[at[1]])], number, paper=True))
    title = "Clean and robust error"
    return [figures.tradeoff("tradeoff", title, series, f"error in %, {attack} eps {eps:.4g}")]


def sweeps(
    runs: Sequence[Run],
    measured: Measured,
    labels: dict[Path, Label],
    comparisons: Sequence[tables.Comparison],
) -> list[Picture]:
    """Draw the error over eps at one number of steps, and over steps at one eps."""
    pictures = []
    tabled = {of.name for of in comparisons}
    kinds: tuple[tuple[str, str, str, str, str], ...] = (
        ("by-eps", "eps", "attack", "table6", "eps (L-infinity, pixels of 0 to 1)"),
        ("by-steps", "attack", "eps", "table7", "PGD steps"),
    )
    for file, along, fixed, name, xlabel in kinds:
        curves = _best_curves(runs, measured, along, fixed)
        if curves is None:
            continue
        at, points = curves
        more = differences(one for _, one in points)
        series = [
            Series(
                _named(labels[path], more[one]), list(of), labels[path].colour, list(of.values())
            )
            for (path, one), of in points.items()
        ]
        if name in tabled:
            for key in paper.table(name).rows:
                title, colour = f"paper: {paper.ROWS[key].title}", paper.TRAINED.index(key)
                series.append(Series(title, paper.curve(name, key), colour, paper=True))
        what = f"{at}, by eps" if along == "eps" else f"eps {at:.4g}, by PGD steps"
        title = f"Error under attack: {what}"
        log = along == "attack"
        pictures.append(figures.lines(file, title, series, xlabel, log=log))
    return pictures


Curve = dict[tuple[float, float], tuple[float, float]]
"""{(x, error in %): interval}, in the order of x."""


def _best_curves(
    runs: Sequence[Run], measured: Measured, along: str, fixed: str
) -> tuple[Any, dict[tuple[Path, Measurement], Curve]] | None:
    """Return the fixed setting under which most points of three or more lie, and its curves.

    A curve is of one run, and of measurements that differ in what it goes along alone: these have
    None there in the curve's key.
    """
    curves: dict[Any, dict[tuple[Path, Measurement], dict[float, dict[str, Any]]]] = {}
    varying = dict.fromkeys(("attack", "steps") if along == "attack" else (along,))
    for run in runs:
        for row in measured[run.path]:
            if _plain(row) and row["attack"].startswith("pgd-") and row["eps"]:
                x = row["eps"] if along == "eps" else float(steps_of(row["attack"]))
                key = run.path, measurement(row | varying)
                curves.setdefault(row[fixed], {}).setdefault(key, {})[x] = row
    full = {
        at: {key: points for key, points in of.items() if len(points) >= 3}
        for at, of in curves.items()
    }
    counts = {at: sum(map(len, of.values())) for at, of in full.items()}
    if not any(counts.values()):
        return None
    best = max(counts, key=lambda at: counts[at])
    return best, {
        key: {
            (x, points[x]["error_percent"]): points[x]["interval_95_percent"]
            for x in sorted(points)
        }
        for key, points in full[best].items()
    }


def norm_pictures(runs: Sequence[Run], labels: dict[Path, Label]) -> list[Picture]:
    """Draw both norms of every weight; runs with the same layers share a figure."""
    groups: dict[Any, dict[str, list[list[WeightNorms]]]] = {}
    colours = {of.training: of.colour for of in labels.values()}
    for run in runs:
        layers = read_norms(run.path)
        if layers:
            layout = tuple((layer.name, layer.shape) for layer in layers)
            of = groups.setdefault(layout, {})
            of.setdefault(labels[run.path].training, []).append(layers)
    pictures = []
    for number, trainings in enumerate(groups.values(), 1):
        norms = {title: figure1.over_seeds(found) for title, found in trainings.items()}
        name = "norms" if len(groups) == 1 else f"norms-{number}"
        pictures += figure1.pictures(norms, colours, name)
    return pictures
