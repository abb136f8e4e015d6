"""Showing: one self-contained HTML page, and a PNG of the curves, for a run or a folder of runs."""

import base64
import html
import io
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fastiat.config import ReportConfig
from fastiat.errors import InputError
from fastiat.run import CONFIG, Run, write

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
    sections = []
    for run in runs:
        epochs = [row for row in run.rows() if row.get("kind") == "epoch"]
        parts = [f"<h2>{html.escape(run.path.name)}</h2>", f"<p>{_settings(run)}</p>"]
        if epochs:
            picture = curves(epochs, run.path.name)
            write(run.path / "curves.png", picture)
            data = base64.b64encode(picture).decode()
            parts.append(f'<img alt="curves of the run" src="data:image/png;base64,{data}">')
        else:
            parts.append("<p>No epoch is finished yet.</p>")
        sections += parts
    body = "\n".join([_table(runs), *sections])
    text = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>fastiat: {folder.name}'
        f"</title><style>{STYLE}</style><h1>fastiat runs</h1>\n{body}\n</html>\n"
    )
    write(page, text.encode())
    print(page)
    return page


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
    newest: dict[str, dict[tuple[str, str, float], dict[str, Any]]] = {}
    for run in runs:
        newest[run.path.name] = {
            (row["split"], row["attack"], row["eps"]): row
            for row in run.rows()
            if row.get("kind") == "evaluation"
        }
    columns = list(dict.fromkeys(key for rows in newest.values() for key in rows))
    if not columns:
        return "<p>Nothing is evaluated yet: <code>fastiat evaluate RUN</code>.</p>"
    head = "".join(
        f"<th>{html.escape(f'{split}, {attack}')}<br>eps {eps:.4g}</th>"
        for split, attack, eps in columns
    )
    lines = [f"<table><tr><th>error in % (95 % interval)</th>{head}</tr>"]
    for name, rows in newest.items():
        cells = "".join(f"<td>{_cell(rows.get(column))}</td>" for column in columns)
        lines.append(f"<tr><td>{html.escape(name)}</td>{cells}</tr>")
    return "\n".join([*lines, "</table>"])


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    low, high = row["interval_95_percent"]
    return f"{row['error_percent']:.2f}<br><small>{low:.1f} to {high:.1f}, n {row['n']}</small>"
