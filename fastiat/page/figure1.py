"""The paper's Figure 1: the norms of every weight matrix, training against training."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastiat.measuring.norms import WeightNorms
from fastiat.page import figures
from fastiat.page.figures import Picture, Series
from fastiat.paper import published as paper
from fastiat.paper.compare import markdown
from fastiat.system.files import write

KINDS = ("frobenius", "spectral")
PAPER = (
    "In the paper's Figure 1, adversarial training raises the Frobenius norm of all layers and the "
    "spectral norm of most, which the authors read as a more complex classifier"
)


@dataclass(frozen=True)
class Layer:
    """One norm of one weight over the seeds of a training."""

    name: str
    mean: float
    low: float
    high: float
    """The smallest and the largest of the seeds."""


Norms = dict[str, list[Layer]]
"""{"frobenius": one for every weight, "spectral": the same}."""


def over_seeds(runs: Sequence[Sequence[WeightNorms]]) -> Norms:
    """Return mean and range over runs whose weights have the same names and shapes."""
    norms: Norms = {kind: [] for kind in KINDS}
    for same in zip(*runs, strict=True):
        name = same[0].name.removesuffix(".weight").replace("groups.", "")
        for kind in KINDS:
            values = [getattr(layer, kind) for layer in same]
            mean = sum(values) / len(values)
            norms[kind].append(Layer(name, mean, min(values), max(values)))
    return norms


def pictures(
    trainings: Mapping[str, Norms], colours: Mapping[str, int], name: str
) -> list[Picture]:
    """Draw both norms as bars, a group for every weight and a bar for every training."""
    drawn = []
    for kind in KINDS:
        series = []
        for title, norms in trainings.items():
            points = [(float(at), layer.mean) for at, layer in enumerate(norms[kind])]
            spans = [(layer.low, layer.high) for layer in norms[kind]]
            several = any(low < high for low, high in spans)
            series.append(Series(title, points, colours[title], spans if several else None))
        layers = [layer.name for layer in next(iter(trainings.values()))[kind]]
        title = f"{kind.capitalize()} norm of every weight matrix"
        drawn.append(figures.bars(f"{name}-{kind}", title, layers, series, f"{kind} norm"))
    return drawn


def findings(trainings: Mapping[str, Norms]) -> str:
    """Say in how many layers training adversarially raised the norms, and IAT lowered them."""
    plain, adversarial = paper.ROWS["baseline"].title, paper.ROWS["pgd7"].title
    pairs = [(adversarial, plain)]
    pairs += [(adversarial, paper.ROWS[key].title) for key in ("iat_mixup", "iat_manifold_mixup")]
    said = []
    for upper, lower in pairs:
        if upper in trainings and lower in trainings:
            counts = []
            for kind in KINDS:
                both = list(zip(trainings[upper][kind], trainings[lower][kind], strict=True))
                higher = sum(one.mean > other.mean for one, other in both)
                counts.append(f"the {kind} norms of {higher} of {len(both)} matrices")
            said.append(f"{upper} is above {lower} in {' and '.join(counts)}")
    return f"{PAPER}. Here {'; '.join(said)}." if said else f"{PAPER}."


def save(
    folder: Path, trainings: Mapping[str, Norms], drawn: Sequence[Picture], caption: str
) -> str:
    """Write figure1.md, figure1.csv and the pictures into a folder; return the Markdown."""
    rows = [
        (title, layer.name, kind, layer.mean, layer.low, layer.high)
        for title, norms in trainings.items()
        for kind in KINDS
        for layer in norms[kind]
    ]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("row", "layer", "norm", "mean", "lowest", "highest"))
    writer.writerows([*row[:3], *(f"{value:.6g}" for value in row[3:])] for row in rows)
    cells = {row[:3]: _cell(*row[3:]) for row in rows}
    lines = dict.fromkeys((layer, kind) for _, layer, kind, *_ in rows)
    text = markdown(
        ("matrix", "norm", *trainings),
        [[*line, *(cells[title, *line] for title in trainings)] for line in lines],
        left=2,
    )
    page = f"**Figure 1: norms of the weight matrices.** {caption} {findings(trainings)}\n\n{text}"
    write(folder / "figure1.csv", out.getvalue().encode())
    write(folder / "figure1.md", page.encode())
    for picture in drawn:
        picture.save(folder)
    return page


def _cell(mean: float, low: float, high: float) -> str:
    return f"{mean:.4g}" if low == high else f"{mean:.4g} ({low:.4g} to {high:.4g})"
