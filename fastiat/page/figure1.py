"""The paper's Figure 1: the norms of every weight matrix, with a bar for each training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from fastiat.measuring.norms import WeightNorms
from fastiat.page import figures
from fastiat.page.figures import Picture, colour_of
from fastiat.paper.published import ROWS
from fastiat.system.files import write
from fastiat.system.tables import csv_text, markdown

KINDS = ("frobenius", "spectral")
SPAN = colour_of(7)
"""Colour of the lines on the bars; no training of the paper has it."""
PAPER = (
    "In the paper's Figure 1, adversarial training raises the Frobenius norm of all layers and the "
    "spectral norm of most, which the authors read as a more complex classifier"
)


Trainings = Mapping[str, Sequence[Sequence[WeightNorms]]]
"""{title: for every seed, the norms of every weight}; all have the same weights in one order."""


class Spread(NamedTuple):
    """One norm of one weight over the seeds of a training."""

    mean: float
    lowest: float
    highest: float


def over_seeds(runs: Sequence[Sequence[WeightNorms]], kind: str) -> dict[str, Spread]:
    """Return {weight: its norm over the seeds}; `kind` is one of `KINDS`."""
    found = {}
    for same in zip(*runs, strict=True):
        values = [getattr(norms, kind) for norms in same]
        name = same[0].name.removesuffix(".weight").replace("groups.", "")
        found[name] = Spread(fmean(values), min(values), max(values))
    return found


def draw_norms(
    name: str, trainings: Trainings, colours: Mapping[str, int] | None = None
) -> list[Picture]:
    """Draw NAME-frobenius and NAME-spectral: a group of bars for each weight, a bar each training.

    A bar is the mean over the seeds; a line on it reaches from the lowest to the highest seed.
    `colours` maps titles to c0 ... c7 of `figures.COLOURS`, by default in the order of `trainings`.
    """
    pictures = []
    thick = 0.8 / len(trainings)
    for kind in KINDS:
        norms = {title: over_seeds(runs, kind) for title, runs in trainings.items()}
        layers = list(next(iter(norms.values())))
        # Every bar has the same least width; the page scrolls sideways to show a wide figure.
        width = max(figures.SIZE[0], 0.075 * len(layers) * (len(norms) + 2))
        title = f"{kind.capitalize()} norm of every weight matrix"
        with figures.style():
            figure, axis = figures.panel(title, len(norms), width)
            for number, (training, spreads) in enumerate(norms.items()):
                colour = colour_of(number if colours is None else colours[training])
                at = [group - 0.4 + (number + 0.5) * thick for group in range(len(layers))]
                heights = [of.mean for of in spreads.values()]
                axis.bar(at, heights, thick, label=training, color=colour)
                if len(trainings[training]) > 1:
                    points = list(zip(at, heights, strict=True))
                    spans = [(of.lowest, of.highest) for of in spreads.values()]
                    figures.draw_spans(axis, points, spans, SPAN)
            turned = 60 if len(layers) > 8 else 0
            axis.set_xticks(range(len(layers)), map(figures.drawable, layers), rotation=turned)
            axis.set_ylabel(f"{kind} norm")
            axis.grid(axis="x", visible=False)
            figures.add_legend(figure, axis)
        pictures.append(figures.draw(f"{name}-{kind}", title, figure))
    return pictures


def findings(trainings: Trainings) -> str:
    """Return in how many weights adversarial training raised the norms, and IAT lowered them."""
    plain, adversarial = ROWS["baseline"].title, ROWS["pgd7"].title
    pairs = [(adversarial, plain)]
    pairs += [(adversarial, ROWS[key].title) for key in ("iat_mixup", "iat_manifold_mixup")]
    said = []
    for upper, lower in pairs:
        if upper in trainings and lower in trainings:
            counts = []
            for kind in KINDS:
                one, other = (over_seeds(trainings[of], kind) for of in (upper, lower))
                higher = sum(one[layer].mean > other[layer].mean for layer in one)
                counts.append(f"the {kind} norms of {higher} of {len(one)} matrices")
            said.append(f"{upper} is above {lower} in {' and '.join(counts)}")
    return f"{PAPER}. Here {'; '.join(said)}." if said else f"{PAPER}."


def save(folder: Path, trainings: Trainings, colours: Mapping[str, int], caption: str) -> str:
    """Write figure1.md, figure1.csv and a picture for each kind of norm; return the Markdown."""
    found = {
        (title, layer, kind): spread
        for title, runs in trainings.items()
        for kind in KINDS
        for layer, spread in over_seeds(runs, kind).items()
    }
    head = ("row", "layer", "norm", *Spread._fields)
    rows = [[*key, *(f"{value:.6g}" for value in spread)] for key, spread in found.items()]
    lines = dict.fromkeys((layer, kind) for _, layer, kind in found)
    cells = [[*line, *(_cell(found[title, *line]) for title in trainings)] for line in lines]
    table = markdown(("matrix", "norm", *trainings), cells, left=2)
    text = f"**Figure 1: norms of the weight matrices.** {caption} {findings(trainings)}\n\n{table}"
    write(folder / "figure1.csv", csv_text(head, rows).encode())
    write(folder / "figure1.md", text.encode())
    for picture in draw_norms("figure1", trainings, colours):
        picture.save(folder)
    return text


def _cell(of: Spread) -> str:
    """Format the mean, followed by the range over the seeds if they differ."""
    spread = "" if of.lowest == of.highest else f" ({of.lowest:.4g} to {of.highest:.4g})"
    return f"{of.mean:.4g}{spread}"
