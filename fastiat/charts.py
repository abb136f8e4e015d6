"""The report's figures: which of the runs' results make which."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastiat import figure1, figures, paper, tables
from fastiat.analyse import WeightNorms, read_norms
from fastiat.figures import Picture, Series
from fastiat.run import Run
from fastiat.settings import steps_of

Measured = dict[Path, list[dict[str, Any]]]
"""The results of every run, oldest first, with the fields that `fastiat.results` documents."""


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


def tradeoff(
    runs: Sequence[Run],
    measured: Measured,
    labels: dict[Path, Label],
    comparisons: Sequence[tables.Comparison],
) -> list[Picture]:
    """Draw clean against robust error, under the strongest attack that most runs share."""
    attacks: Counter[tuple[str, float]] = Counter()
    for rows in measured.values():
        seen = {(row["attack"], row["eps"]) for row in rows if _plain(row)}
        attacks.update((name, eps) for name, eps in seen if name.startswith("pgd-") and eps)
    if not attacks:
        return []
    attack, eps = max(attacks, key=lambda key: (attacks[key], steps_of(key[0])))
    series = []
    for run in runs:
        rows = measured[run.path]
        clean = [row for row in rows if _plain(row, "none")]
        robust = [row for row in rows if _plain(row, attack) and row["eps"] == eps]
        if clean and robust:
            point = clean[-1]["error_percent"], robust[-1]["error_percent"]
            shown, span = labels[run.path], robust[-1]["interval_95_percent"]
            series.append(Series(shown.name, [point], shown.colour, [span]))
    if not series:
        return []
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
        series = [
            Series(labels[path].name, list(of), labels[path].colour, list(of.values()))
            for path, of in points.items()
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


def _best_curves(
    runs: Sequence[Run], measured: Measured, along: str, fixed: str
) -> tuple[Any, dict[Path, dict[tuple[float, float], tuple[float, float]]]] | None:
    """Return the fixed setting under which most points of three or more lie, and its curves.

    A curve is {(x, error in %): interval}, in the order of x.
    """
    curves: dict[Any, dict[Path, dict[float, dict[str, Any]]]] = {}
    for run in runs:
        for row in measured[run.path]:
            if _plain(row) and row["attack"].startswith("pgd-") and row["eps"]:
                x = row["eps"] if along == "eps" else float(steps_of(row["attack"]))
                curves.setdefault(row[fixed], {}).setdefault(run.path, {})[x] = row
    full = {
        at: {path: points for path, points in of.items() if len(points) >= 3}
        for at, of in curves.items()
    }
    counts = {at: sum(map(len, of.values())) for at, of in full.items()}
    if not any(counts.values()):
        return None
    best = max(counts, key=lambda at: counts[at])
    return best, {
        path: {
            (x, points[x]["error_percent"]): points[x]["interval_95_percent"]
            for x in sorted(points)
        }
        for path, points in full[best].items()
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
