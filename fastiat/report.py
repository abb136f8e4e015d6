"""Showing: one self-contained HTML page, and a PNG of the curves, for a run or a folder of runs."""

import base64
import html
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fastiat.config import ReportConfig
from fastiat.errors import InputError
from fastiat.run import CONFIG, METRICS, Run, write

PANELS = (
    (
        "loss",
        {"clean_loss": "clean batch", "adv_loss": "adversarial batch"},
        "training loss (mixed labels)",
    ),
    (
        "error in %",
        {
            "train_clean": "training, clean",
            "train_adv": "training, adversarial",
            "holdout_error_percent": "held out, attacked",
            "test_error_percent": "test, clean",
        },
        "error (training: mixed and augmented)",
    ),
    ("learning rate", {"learning_rate": ""}, "learning rate"),
)

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { border-bottom: 1px solid #ccc; padding: .3rem .8rem; text-align: right }
th:first-child, td:first-child { text-align: left }
img { max-width: 100% }
code { background: #f3f3f3; padding: .1rem .3rem }
"""


def report(config: ReportConfig) -> Path:
    """Write the page and, for every run in it, RUN/curves.png; print and return the page's path.

    Raises `InputError` where there is no run.
    """
    folder = Path(config.dir)
    runs = _find(folder)
    page = Path(config.out) if config.out else folder / "report.html"
    body = "\n".join([_table(runs), *map(_section, runs)])
    text = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>fastiat: '
        f"{html.escape(folder.name)}</title><style>{STYLE}</style><h1>fastiat runs</h1>\n"
        f"{body}\n</html>\n"
    )
    page.parent.mkdir(parents=True, exist_ok=True)
    write(page, text.encode())
    print(page)
    return page


def _section(run: Run) -> str:
    """Return a run's settings and curves as HTML, and write RUN/curves.png."""
    parts = [f"<h2>{html.escape(run.path.name)}</h2>", f"<p>{_settings(run)}</p>"]
    with _readable(run):
        epochs = [row for row in run.rows() if row.get("kind") == "epoch"]
        picture = curves(epochs, run.path.name) if epochs else None
    if picture is None:
        return "\n".join([*parts, "<p>No epoch is finished yet.</p>"])
    write(run.path / "curves.png", picture)
    data = base64.b64encode(picture).decode()
    parts.append(f'<img alt="curves of the run" src="data:image/png;base64,{data}">')
    return "\n".join(parts)


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


def curves(epochs: list[dict[str, Any]], title: str) -> bytes:
    """Draw losses, errors and learning rate over the epochs of a run; return a PNG."""
    rows = [
        row
        | {
            "train_clean": 100 - row["clean_accuracy_percent"],
            "train_adv": 100 - row["adv_accuracy_percent"],
        }
        for row in epochs
    ]
    attacked = any(row["adv_loss"] for row in rows)
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    axes = figure.subplots(1, len(PANELS))
    for axis, (unit, series, name) in zip(axes, PANELS, strict=True):
        for key, label in series.items():
            if key not in rows[0] or ("adv" in key and not attacked):
                continue
            points = [(row["epoch"], row[key]) for row in rows if key in row]
            axis.plot(*zip(*points, strict=True), marker=".", label=label)
        axis.set(xlabel="epoch", ylabel=unit, title=name)
        axis.grid(alpha=0.3)
        if any(series.values()):
            axis.legend()
    axes[0].set_ylim(bottom=0)
    axes[1].set_ylim(0, 100)
    axes[2].set_yscale("log")
    figure.suptitle(title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _find(folder: Path) -> list[Run]:
    if (folder / CONFIG).exists():
        return [Run.open(folder)]
    found = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    if not found:
        raise InputError(f"{folder} holds no run: name a run directory or a folder of them")
    return [Run.open(path) for path in found]


def _settings(run: Run) -> str:
    config = run.config
    names = ("dataset", "arch", "width", "adv", "mix", "epochs", "batch_size", "eps", "seed")
    return ", ".join(
        f"{name} <code>{html.escape(str(getattr(config, name)))}</code>"
        for name in names
        if getattr(config, name) is not None
    )


def _table(runs: list[Run]) -> str:
    """Return the newest error of every run under every attack, with its 95 % interval."""
    newest: dict[str, dict[str, str]] = {}
    for run in runs:
        with _readable(run):
            newest[run.path.name] = {
                _column(row): _cell(row) for row in run.rows() if row.get("kind") == "evaluation"
            }
    columns = list(dict.fromkeys(column for cells in newest.values() for column in cells))
    if not columns:
        return "<p>Nothing is evaluated yet: <code>fastiat evaluate RUN</code>.</p>"
    head = "".join(f"<th>{column}</th>" for column in columns)
    lines = [f"<table><tr><th>error in % (95 % interval)</th>{head}</tr>"]
    for name, cells in newest.items():
        line = "".join(f"<td>{cells.get(column, '')}</td>" for column in columns)
        lines.append(f"<tr><td>{html.escape(name)}</td>{line}</tr>")
    return "\n".join([*lines, "</table>"])


def _column(row: dict[str, Any]) -> str:
    """Name the attack of an evaluation row, whatever is not its default included."""
    details = f"{row['norm']} eps {row['eps']:.4g}"
    if row["loss"] != "ce":
        details += f", {row['loss']} loss"
    if row["restarts"] != 1:
        details += f", {row['restarts']} restarts"
    return f"{html.escape(str(row['split']))}, {html.escape(str(row['attack']))}<br>" + html.escape(
        details
    )


def _cell(row: dict[str, Any]) -> str:
    low, high = row["interval_95_percent"]
    return (
        f"{row['error_percent']:.2f}<br><small>{low:.1f} to {high:.1f}, n {int(row['n'])}</small>"
    )
