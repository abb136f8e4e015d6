"""Tables of measurements with a bar for each row, as text, as Markdown and as a figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

BAR = 24
"""Characters of the longest bar."""


def text(title: str, rows: Sequence[dict[str, Any]], bar: str) -> str:
    """Return a table of `rows`, which all have a "name"; their `bar` column is drawn too."""
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "name"))
    longest = max((row[bar] for row in rows if row.get(bar)), default=1)
    first = max([len(row["name"]) for row in rows] + [4])
    widths = {column: max(len(column), 9) for column in columns}
    lines = [title, " " * first + "".join(f"  {c:>{widths[c]}}" for c in columns)]
    for row in rows:
        cells = "".join(f"  {_cell(row.get(c)):>{widths[c]}}" for c in columns)
        length = BAR * (row.get(bar) or 0) / longest
        lines.append(f"{row['name']:<{first}}{cells}  {'█' * round(length)}".rstrip())
    return "\n".join(lines)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of `rows`, with the keys as columns."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(c)) for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def figure(path: Path, title: str, rows: Sequence[dict[str, Any]], bar: str) -> None:
    """Write a chart of the `bar` column, largest at the top; the suffix of `path` is the format."""
    from matplotlib.figure import Figure

    rows = sorted((row for row in rows if row.get(bar)), key=lambda row: row[bar])
    drawing = Figure(figsize=(8, 1.2 + 0.32 * len(rows)), layout="constrained")
    axes = drawing.subplots()
    names = [row["name"] for row in rows]
    colours = ["tab:blue" if name.startswith("fastiat") else "tab:gray" for name in names]
    bars = axes.barh(names, [row[bar] for row in rows], color=colours)
    axes.bar_label(bars, [_cell(row[bar]) for row in rows], padding=3)
    axes.set(title=title, xlabel=bar)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", "/").replace("\n", " ")
