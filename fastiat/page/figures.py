"""Figures: drawn once in the colours of the light theme, saved as PNG and SVG, and put on a page.

On a page (`Picture.inline`) the same SVG has CSS variables for colours, so that it follows the
reader's light or dark theme. Text in it stays text, which can be searched and copied.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from fastiat.system.errors import printable
from fastiat.system.files import write

# CSS variable: (light, dark). Matplotlib draws the light ones, which must differ from each other.
COLOURS = {
    "page": ("#ffffff", "#0d1117"),
    "ink": ("#1b1f24", "#e6edf3"),
    "soft": ("#57606b", "#9da7b1"),
    "rule": ("#d8dee4", "#30363d"),
    "c0": ("#6e7781", "#a5afb9"),
    "c1": ("#0969da", "#58a6ff"),
    "c2": ("#1a7f37", "#3fb950"),
    "c3": ("#bc4c00", "#ffa657"),
    "c4": ("#8250df", "#bc8cff"),
    "c5": ("#bf3989", "#ff7bb5"),
    "c6": ("#1b7c83", "#39c5cf"),
    "c7": ("#7d6608", "#d9b949"),
}
MARKERS = "osD^vPX*"
SIZE = (4.5, 3.5)
"""Width and height in inches, small enough to be read on a telephone."""

_RC: Any = {
    # Names of runs may hold dollar signs.
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "fastiat",
    "font.size": 9,
    "font.family": ["DejaVu Sans"],
    "axes.titlesize": 10,
    "axes.edgecolor": COLOURS["soft"][0],
    "axes.labelcolor": COLOURS["ink"][0],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["rule"][0],
    "text.color": COLOURS["ink"][0],
    "xtick.color": COLOURS["soft"][0],
    "ytick.color": COLOURS["soft"][0],
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.facecolor": COLOURS["page"][0],
    "axes.facecolor": COLOURS["page"][0],
}


def colour_of(number: int) -> str:
    """Return the colour of a series in the light theme: c0 to c7, then from c0 again."""
    return COLOURS[f"c{number % 8}"][0]


@dataclass(frozen=True)
class Series:
    """A line, or a set of points, of a figure."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    """Index of the colour (c0 to c7) and of the marker, modulo 8."""
    spans: Sequence[tuple[float, float]] | None = None
    """The 95 % interval of every point, (low, high)."""
    paper: bool = False
    """Whether the series is the paper's: these are drawn dashed, with hollow markers."""

    @property
    def style(self) -> dict[str, Any]:
        """Keyword arguments of matplotlib's `plot` for colour, marker and line."""
        colour = colour_of(self.colour)
        face = COLOURS["page"][0] if self.paper else colour
        return {
            "color": colour,
            "marker": MARKERS[self.colour % len(MARKERS)],
            "markerfacecolor": face,
            "markersize": 5,
            "linewidth": 1 if self.paper else 1.5,
            "linestyle": "--" if self.paper else "-",
        }


@dataclass(frozen=True)
class Picture:
    """A drawn figure."""

    name: str
    title: str
    png: bytes
    svg: str

    def save(self, folder: Path) -> None:
        """Write NAME.png and NAME.svg."""
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / f"{self.name}.png", self.png)
        write(folder / f"{self.name}.svg", self.svg.encode())

    def inline(self, prefix: str) -> str:
        """Return the SVG as an HTML element: in the page's colours, its ids unique by `prefix`.

        matplotlib writes the SVG for a separate file. The metadata and the XML namespaces are
        removed, and so is the style, which would apply to the whole page.
        """
        text = self.svg[self.svg.index("<svg") :]
        text = re.sub(
            r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.S
        )
        # HTML has no namespaces.
        text = re.sub(r' xmlns(:xlink)?="[^"]*"| version="[^"]*"', "", text).replace("xlink:", "")
        # An id must be unique among all figures of the page.
        text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
        for name, (light, _) in COLOURS.items():
            text = text.replace(light, f"var(--{name})")
        # Without width and height the viewBox scales the figure to its place on the page.
        _, width, _ = re.split(r'<svg[^>]*? width="([\d.]+)pt"', text, maxsplit=1)
        text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
        label = f'role="img" aria-label="{escape(self.title)}" style="max-width:{width}pt"'
        return text.replace("<svg", f"<svg {label}", 1)


def draw(name: str, title: str, figure: Figure, *, png: bool = True) -> Picture:
    """Render a figure that was made within `style()`, as SVG and, with `png`, as PNG.

    The same figure gives the same bytes: the SVG has no date, and its ids have a fixed salt.
    """
    files = {"png": b""}
    for kind in ("png", "svg") if png else ("svg",):
        buffer = io.BytesIO()
        undated: dict[str, Any] = {"Date": None} if kind == "svg" else {}
        # Names of runs and classes may hold characters that are invalid in XML.
        for text in figure.findobj(Text):
            text.set_text(drawable(text.get_text()))
        with style():
            figure.savefig(buffer, format=kind, dpi=150, metadata=undated)
        files[kind] = buffer.getvalue()
    return Picture(name, title, files["png"], files["svg"].decode())


def drawable(text: str) -> str:
    """Return a text as one line, with escapes such as \\u732b for characters that the font lacks.

    For each of these characters matplotlib would warn and draw a box.
    """
    glyphs = _glyphs()
    return "".join(c if ord(c) in glyphs else ascii(c).strip("'") for c in printable(text))


@cache
def _glyphs() -> frozenset[int]:
    """Return the code points that the figures' font has."""
    font = get_font(findfont(FontProperties(family=_RC["font.family"])))
    return frozenset(font.get_charmap())


def style() -> Any:
    """Return the context manager within which figures are made and rendered."""
    return rc_context(_RC)


def panel(title: str, entries: int, width: float = SIZE[0]) -> tuple[Figure, Axes]:
    """Return a figure, `width` inches wide, with room for a legend of `entries` series; its axes.

    Call it within `style()`.
    """
    height = SIZE[1] + 0.17 * ((entries + 1) // 2)
    figure = Figure(figsize=(width, height), layout="constrained")
    axis = figure.subplots()
    axis.set_title(title, loc="left")
    return figure, axis


def draw_spans(
    axis: Axes,
    points: Sequence[tuple[float, float]],
    spans: Sequence[tuple[float, float]],
    colour: str,
) -> None:
    """Draw a vertical line over the interval (low, high) of every point (x, y)."""
    x, y = zip(*points, strict=True)
    # Rounding can put an end on the wrong side of its middle, which errorbar refuses.
    below = [max(at - low, 0.0) for at, (low, _) in zip(y, spans, strict=True)]
    above = [max(high - at, 0.0) for at, (_, high) in zip(y, spans, strict=True)]
    axis.errorbar(x, y, [below, above], fmt="none", ecolor=colour, elinewidth=1)


def add_legend(figure: Figure, axis: Axes) -> None:
    """Put the names of the series of an axis below the figure."""
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2)


def lines(
    name: str, title: str, series: Sequence[Series], xlabel: str, *, log: bool = False
) -> Picture:
    """Draw errors in % over a setting of the attack, a line for each series."""
    with style():
        figure, axis = _plot(title, series)
        axis.set(xlabel=xlabel, ylabel="error in %", ylim=(0, 102))
        if log:
            axis.set_xscale("log")
            ticks = sorted({x for one in series for x, _ in one.points})
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.set_xticks([], minor=True)
        else:
            axis.set_xlim(left=0)
    return draw(name, title, figure)


def tradeoff(name: str, title: str, series: Sequence[Series], ylabel: str) -> Picture:
    """Draw every run as a point: its error on clean images, and under attack, in %."""
    with style():
        figure, axis = _plot(title, series, linestyle="")
        axis.set(xlabel="error on clean images in %", ylabel=ylabel)
        axis.margins(0.12)
    return draw(name, title, figure)


def _plot(title: str, series: Sequence[Series], **look: str) -> tuple[Figure, Axes]:
    """Return a figure of one panel with the series and their intervals in it."""
    figure, axis = panel(title, len(series))
    for one in series:
        axis.plot(*zip(*one.points, strict=True), label=one.label, **one.style | look)
        if one.spans:
            draw_spans(axis, one.points, one.spans, one.style["color"])
    add_legend(figure, axis)
    return figure, axis


PANELS = (
    (
        "loss",
        "training loss (mixed labels)",
        {"clean_loss": "clean batch", "adv_loss": "adversarial batch"},
    ),
    (
        "error in %",
        "error (training: mixed and augmented)",
        {
            "train_clean": "training, clean",
            "train_adv": "training, adversarial",
            "holdout_error_percent": "held out, attacked",
            "test_error_percent": "test, clean",
        },
    ),
    ("learning rate", "learning rate", {"learning_rate": ""}),
)


def curves(epochs: Sequence[dict[str, Any]], title: str) -> tuple[Picture, list[Picture]]:
    """Draw losses, errors and learning rate over the epochs of a run.

    Returns the picture "curves", all panels side by side, and a picture of each panel.
    """
    rows = [
        row
        | {
            "train_clean": 100 - row["clean_accuracy_percent"],
            "train_adv": 100 - row["adv_accuracy_percent"],
        }
        for row in epochs
    ]
    with style():
        together = Figure(figsize=(13, 3.8), layout="constrained")
        for axis, panel in zip(together.subplots(1, len(PANELS)), PANELS, strict=True):
            _curve(axis, rows, panel)
        together.suptitle(title)
    alone = []
    for panel in PANELS:
        with style():
            figure = Figure(figsize=(4.2, 2.9), layout="constrained")
            _curve(figure.subplots(), rows, panel)
        alone.append(draw(panel[0], f"{title}: {panel[1]}", figure, png=False))
    return draw("curves", title, together), alone


def _curve(
    axis: Axes, rows: Sequence[dict[str, Any]], panel: tuple[str, str, dict[str, str]]
) -> None:
    """Draw one of `PANELS`, without series that the run does not have, such as an attack's."""
    unit, title, series = panel
    attacked = any(row["adv_loss"] for row in rows)
    for number, (key, label) in enumerate(series.items()):
        points = [(row["epoch"], row[key]) for row in rows if key in row]
        if not points or ("adv" in key and not attacked):
            continue
        look = Series(label, points, (1, 3, 4, 0)[number]).style | {"marker": "."}
        axis.plot(*zip(*points, strict=True), label=label, **look)
    axis.set(xlabel="epoch", ylabel=unit)
    axis.set_title(title, loc="left")
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axis.set_xlim(rows[0]["epoch"] - 0.5, rows[-1]["epoch"] + 0.5)
    if unit == "learning rate":
        axis.set_yscale("log")
        rates = sorted({row["learning_rate"] for row in rows if row["learning_rate"] > 0})
        if len(rates) <= 4:
            axis.set_yticks(rates)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        axis.yaxis.set_minor_formatter(lambda *_: "")
    else:
        axis.set_ylim(0, 100 if "%" in unit else None)
        axis.legend()
