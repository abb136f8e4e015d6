"""The paper's Tables 1 to 7 as data: arXiv 1906.06784, Lamb et al. 2019.

`tables.csv` has a line for every error rate: the table, the training of the row, the network that
the examples are crafted on where that is another one (Table 5), the images, the attack, its eps,
and the error in %. In Tables 1 to 4 the paper writes the errors on the split "train" in
parentheses.
"""

import csv
import importlib.resources
from dataclasses import dataclass
from functools import cache

from fastiat.system.errors import InputError, one_line
from fastiat.system.settings import Arch, DatasetName, steps_of

SOURCE = "Lamb, Verma, Kannala, Bengio: Interpolated Adversarial Training, arXiv:1906.06784"


@dataclass(frozen=True)
class Row:
    """A row of the paper's tables: its title, and the flags that train it."""

    title: str
    adv: str | None
    """None where the paper cites the errors from elsewhere, so that there is nothing to train."""
    mix: str


ROWS = {
    "baseline_madry": Row("Baseline (Madry et al.)", None, "none"),
    "baseline": Row("Baseline", "none", "none"),
    "mixup": Row("Mixup", "none", "mixup"),
    "manifold_mixup": Row("Manifold Mixup", "none", "manifold"),
    "pgd7_madry": Row("PGD, 7 steps (Madry et al.)", None, "none"),
    "neural_architecture_search": Row("Neural Architecture Search (Cubuk et al.)", None, "none"),
    "pgd7": Row("PGD (7 steps)", "pgd", "none"),
    "iat_mixup": Row("IAT (Mixup)", "pgd", "mixup"),
    "iat_manifold_mixup": Row("IAT (Manifold Mixup)", "pgd", "manifold"),
}
TRAINED = tuple(key for key, row in ROWS.items() if row.adv is not None)
"""The rows that the paper trained itself: the six trainings."""


@dataclass(frozen=True)
class Cell:
    """One error rate of the paper."""

    row: str
    """A key of `ROWS`: the network under attack."""
    source: str
    """A key of `ROWS`: the network that the examples are crafted on."""
    split: str
    """"test" or "train"."""
    attack: str
    """none, fgsm or pgd-K."""
    eps: float
    """Radius of the L-infinity ball in pixels of [0, 1]; 0 without an attack."""
    error_percent: float

    @property
    def measure(self) -> str:
        """Name the column, such as "PGD-20 eps 0.03, test"."""
        name = "No attack" if self.attack == "none" else f"{self.attack.upper()} eps {self.eps:g}"
        crafted = f", crafted on {ROWS[self.source].title}" if self.source != self.row else ""
        return f"{name}, {self.split}{crafted}"


@dataclass(frozen=True)
class Table:
    """One of the paper's tables."""

    name: str
    title: str
    arch: Arch
    dataset: DatasetName
    cells: tuple[Cell, ...]

    @property
    def rows(self) -> tuple[str, ...]:
        """The keys of its rows, in the paper's order."""
        return tuple(dict.fromkeys(cell.row for cell in self.cells))


# The captions of Tables 1 and 2 say WideResNet20-10. There is none: the depth of a wide ResNet is
# 6n + 4. Section 4 says 28-10.
_TITLES: dict[str, tuple[str, Arch, DatasetName]] = {
    "table1": ("white-box attacks, CIFAR-10, WideResNet28-10", "wrn28_10", "cifar10"),
    "table2": ("white-box attacks, SVHN, WideResNet28-10", "wrn28_10", "svhn"),
    "table3": ("white-box attacks, CIFAR-10, PreActResNet18", "preact18", "cifar10"),
    "table4": ("white-box attacks, SVHN, PreActResNet18", "preact18", "svhn"),
    "table5": ("transfer attacks, CIFAR-10, PreActResNet18", "preact18", "cifar10"),
    "table6": ("PGD-20 by eps, CIFAR-10, PreActResNet18", "preact18", "cifar10"),
    "table7": ("PGD at eps 0.02 by steps, CIFAR-10, PreActResNet18", "preact18", "cifar10"),
}


@cache
def table(name: str) -> Table:
    """Return a table by its name, "table1" to "table7"; raise `InputError` for another name."""
    if name not in _TITLES:
        raise InputError(f"the paper has no {name!r}: choose from {', '.join(_TITLES)}")
    title, arch, dataset = _TITLES[name]
    title = f"Table {name.removeprefix('table')}: {title}"
    return Table(name, title, arch, dataset, tuple(_cells()[name]))


@cache
def _cells() -> dict[str, list[Cell]]:
    """Read tables.csv: the cells of every table; raise `InputError` if the file is damaged."""
    file = importlib.resources.files("fastiat.paper").joinpath("tables.csv")
    found: dict[str, list[Cell]] = {name: [] for name in _TITLES}
    try:
        for line in csv.DictReader(file.read_text().splitlines(), strict=True):
            row, source = line["row"], line["source"] or line["row"]
            eps, percent = float(line["eps"] or 0), float(line["error_percent"])
            steps_of(line["attack"])
            if not {row, source} <= ROWS.keys() or line["split"] not in ("test", "train"):
                raise ValueError(f"{row}, {source}, {line['split']}")
            if not (0 <= eps <= 1 and 0 <= percent <= 100):
                raise ValueError(f"{eps}, {percent}")
            cell = Cell(row, source, line["split"], line["attack"], eps, percent)
            found[line["table"]].append(cell)
        if not all(found.values()):
            raise ValueError("it lacks a table")
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        reason = one_line(error)[:100]
        raise InputError(f"{file} is damaged ({reason}): install fastiat again") from None
    return found


def row_of(adv: str, mix: str) -> str | None:
    """Return the key of the row that these flags train, or None where the paper has none."""
    return next((key for key, row in ROWS.items() if (row.adv, row.mix) == (adv, mix)), None)


def curve(name: str, row: str) -> list[tuple[float, float]]:
    """Return Table 6 or 7's curve of a row: (eps, error in %), or (steps, error in %)."""
    cells = [cell for cell in table(name).cells if cell.row == row]
    if name == "table6":
        return [(cell.eps, cell.error_percent) for cell in cells]
    return [(float(steps_of(cell.attack)), cell.error_percent) for cell in cells]
