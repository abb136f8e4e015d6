"""Showing: one self-contained HTML page for a run or a folder of runs, and its figures as files.

A section without data is left out. Nothing is loaded from a network, neither by the page nor to
make it.
"""

import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fastiat import __version__, data, figures, paper, tables
from fastiat.analyse import WeightNorms, read_diagnosis, read_norms
from fastiat.cli import resolve
from fastiat.config import ReportConfig, TrainConfig, steps_of
from fastiat.errors import InputError
from fastiat.examples import STEPS, data_uri, examples, grid
from fastiat.figures import Picture, Series
from fastiat.page import Safe, element, join, page, section, table, text
from fastiat.run import CONFIG, METRICS, MODEL, Run, write

FIGURES = "figures"
"""Folder of the figures' files, beside the page."""


def report(config: ReportConfig) -> Path:
    """Write the page, figures/*.png and *.svg beside it, and curves and examples in every run.

    Prints and returns the page's path. Raises `InputError` where there is no run, or a file that
    fastiat did not write.
    """
    folder = Path(config.dir)
    runs = find(folder)
    out = Path(config.out) if config.out else folder / "report.html"
    measured = {}
    for run in runs:
        with _readable(run):
            measured[run.path] = [_measurement(row) for row in tables.results(run)]
    files = sorted(folder.glob("table[1-7].json"))
    comparisons = [tables.read(file) for file in files]
    labels = label(runs)
    pictures = [
        *_tradeoff(runs, measured, labels, comparisons),
        *_sweeps(runs, measured, labels, comparisons),
    ]
    norms = _norm_pictures(runs, labels)
    load = cache(data.load)
    parts = [
        ("Errors", "errors", _errors(runs, measured)),
        ("Beside the paper", "paper", join(map(_comparison, comparisons))),
        ("Robustness", "robustness", _show(pictures)),
        ("Norms of the weights", "norms", _norms(norms)),
        ("Diagnosis", "diagnosis", join(map(_diagnosis, runs))),
        ("Examples", "examples", join(_examples(run, load) for run in runs)),
        ("Runs", "runs", join(_section(run) for run in runs)),
        ("Environment", "environment", _environment(measured)),
    ]
    sections = [
        (title, name, section(title, name, content)) for title, name, content in parts if content
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


def label(runs: Sequence[Run]) -> dict[Path, tuple[str, int]]:
    """Return every run's label and colour: those of its row in the paper's tables.

    Where several runs are of one row, labels are the directories' names and colours go round.
    """
    keys = {run.path: paper.row_of(run.config.adv, run.config.mix) for run in runs}
    if None in keys.values() or len(set(keys.values())) < len(keys):
        return {run.path: (run.path.name, number) for number, run in enumerate(runs)}
    trained = [key for key, row in paper.ROWS.items() if row.adv is not None]
    return {path: (paper.ROWS[key].title, trained.index(key)) for path, key in keys.items() if key}


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


def _measurement(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of results whose figures are there and are numbers; raise what `_readable`
    names if they are not."""
    low, high = map(float, row["interval_95_percent"])
    eps = row.get("eps")
    return row | {
        "n": int(row["n"]),
        "error_percent": float(row["error_percent"]),
        "interval_95_percent": (low, high),
        "split": str(row["split"]),
        "attack": str(row["attack"]),
        "eps": None if eps is None else float(eps),
    }


def _errors(runs: Sequence[Run], measured: dict[Path, list[dict[str, Any]]]) -> Safe:
    """Return the newest error of every run under every attack, sweeps and transfers apart."""
    newest = {
        run.path.name: {_column(row): _cell(row) for row in measured[run.path] if _direct(row)}
        for run in runs
    }
    columns = list(dict.fromkeys(column for cells in newest.values() for column in cells))
    if not columns:
        return element("p", "Nothing is evaluated yet: ", element("code", "fastiat evaluate RUN"))
    rows = [
        [name, *(cells.get(column, "") for column in columns)] for name, cells in newest.items()
    ]
    return table(["error in %", *columns], rows)


def _direct(row: dict[str, Any]) -> bool:
    return row["kind"] not in ("sweep", "transfer")


def _column(row: dict[str, Any]) -> Safe:
    """Name the attack of a row, whatever is not its default included."""
    details = []
    if row["eps"] is not None and row["attack"] != "none":
        details.append(f"{row['norm']} eps {row['eps']:.4g}")
        if row["loss"] not in ("ce", None):
            details.append(f"{row['loss']} loss")
        if row["restarts"] not in (1, None):
            details.append(f"{row['restarts']} restarts")
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
            table(["ours, the paper's below", *columns], cells, of.caption),
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


def _tradeoff(
    runs: Sequence[Run],
    measured: dict[Path, list[dict[str, Any]]],
    labels: dict[Path, tuple[str, int]],
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
            name, colour = labels[run.path]
            series.append(Series(name, [point], colour, [robust[-1]["interval_95_percent"]]))
    if not series:
        return []
    trained = [row.title for row in paper.ROWS.values() if row.adv is not None]
    for of in comparisons:
        found = {(line.row, line.measure): line.paper for line in of.lines}
        for number, row in enumerate(trained):
            at = (row, "No attack, test"), (row, f"{attack.upper()} eps {eps:g}, test")
            if all(key in found for key in at):
                name = f"paper, {of.name}: {row}"
                series.append(Series(name, [(found[at[0]], found[at[1]])], number, paper=True))
    title = "Clean and robust error"
    return [figures.tradeoff("tradeoff", title, series, f"error in %, {attack} eps {eps:.4g}")]


def _sweeps(
    runs: Sequence[Run],
    measured: dict[Path, list[dict[str, Any]]],
    labels: dict[Path, tuple[str, int]],
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
            Series(*labels[path][:1], list(of), labels[path][1], list(of.values()))
            for path, of in points.items()
        ]
        if name in tabled:
            trained = [key for key, row in paper.ROWS.items() if row.adv is not None]
            for key in paper.table(name).rows:
                title = f"paper: {paper.ROWS[key].title}"
                curve = paper.curve(name, key)
                series.append(Series(title, curve, trained.index(key), paper=True))
        what = f"{at}, by eps" if along == "eps" else f"eps {at:.4g}, by PGD steps"
        title = f"Error under attack: {what}"
        log = along == "attack"
        pictures.append(figures.lines(file, title, series, xlabel, log=log))
    return pictures


def _best_curves(
    runs: Sequence[Run], measured: dict[Path, list[dict[str, Any]]], along: str, fixed: str
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


def _show(pictures: Sequence[Picture], kind: str = "figures") -> Safe:
    drawn = [element("figure", Safe(picture.inline(picture.name))) for picture in pictures]
    return element("div", *drawn, kind=kind) if drawn else Safe("")


def _norm_pictures(runs: Sequence[Run], labels: dict[Path, tuple[str, int]]) -> list[Picture]:
    """Draw both norms of every weight; runs with the same layers share a figure."""
    groups: dict[tuple[Any, ...], dict[Path, list[WeightNorms]]] = {}
    for run in runs:
        layers = read_norms(run.path)
        if layers:
            key = tuple((layer.name, layer.shape) for layer in layers)
            groups.setdefault(key, {})[run.path] = layers
    pictures = []
    for number, (key, of) in enumerate(groups.items(), 1):
        names = [str(name).removesuffix(".weight").replace("groups.", "") for name, _ in key]
        for norm in ("frobenius", "spectral"):
            series = [
                Series(
                    labels[path][0],
                    [(at, getattr(layer, norm)) for at, layer in enumerate(layers)],
                    labels[path][1],
                )
                for path, layers in of.items()
            ]
            name = f"norms-{norm}" + (f"-{number}" if number > 1 else "")
            title = f"{norm.capitalize()} norm of every weight matrix"
            pictures.append(figures.bars(name, title, names, series, f"{norm} norm"))
    return pictures


def _norms(pictures: Sequence[Picture]) -> Safe:
    if not pictures:
        return Safe("")
    note = (
        "Convolutions count as matrices of (out, in x kernel height x kernel width). In the "
        "paper's Figure 1, adversarial training raises the Frobenius norm of all layers and the "
        "spectral norm of most, which the authors read as a more complex classifier."
    )
    return join(
        [element("p", note, kind="note"), element("div", _show(pictures), kind="wide norms")]
    )


def _diagnosis(run: Run) -> Safe:
    """Return what `fastiat diagnose` found for a run."""
    rows = [
        [
            finding.check,
            element("span", finding.verdict, kind=finding.verdict.split()[0]),
            finding.sentence,
            join([f"{name}: {_figure(value)}" for name, value in finding.figures.items()], "<br>"),
        ]
        for finding in read_diagnosis(run.path)
    ]
    if not rows:
        return Safe("")
    head = ["check for masked gradients", "", "what it means", "figures"]
    return join([element("h3", run.path.name), table(head, rows, kind="text")])


def _figure(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_figure, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _examples(run: Run, load: Any) -> Safe:
    """Return a grid of images, attacked and not, and write RUN/examples.png and .svg."""
    found = examples(run, load)
    if not found:
        return Safe("")
    eps = run.config.eps
    attack = f"PGD-{STEPS}, eps {eps:.4g}"
    grid(found, f"{run.path.name}: {attack}, difference x {0.5 / eps:.3g}").save(run.path)
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
                f"{example.truth}: seen as {example.clean}, attacked as {example.attacked}",
            ),
        )
        for example in found
    ]
    note = f"Image, attacked image ({attack}) and their difference enlarged {0.5 / eps:.3g} times."
    return join(
        [
            element("h3", run.path.name),
            element("p", note, kind="note"),
            element("div", *cards, kind="cards"),
        ]
    )


def _section(run: Run) -> Safe:
    """Return a run's settings, command and curves, and write RUN/curves.png and .svg."""
    config = run.config
    start = resolve(TrainConfig, {"preset": config.preset, "dataset": config.dataset})
    command = tables.command_of("train", config, start)
    if config.preset != "paper":
        command += f" --preset {config.preset}"
    if config.dataset != TrainConfig.dataset:
        command += f" --dataset {config.dataset}"
    parts = [
        element("h3", run.path.name),
        element("p", _settings(run)),
        element("pre", f"{command} --out {run.path}"),
    ]
    with _readable(run):
        epochs = [row for row in run.rows() if row.get("kind") == "epoch"]
        drawn = figures.curves(epochs, run.path.name) if epochs else None
    if drawn is None:
        return join([*parts, element("p", "No epoch is finished yet.")])
    together, alone = drawn
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


def _environment(measured: dict[Path, list[dict[str, Any]]]) -> Safe:
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
