"""Whether one network makes fewer errors than another on the same images: McNemar's exact test."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from torch import Tensor

from fastiat.measuring.one_pass import title
from fastiat.runs.results import Rate

CHANCE = 0.05
"""A difference is called real if its p-value is below this."""


@dataclass(frozen=True)
class Pair:
    """Two runs under one attack on the same images."""

    better: str
    """The run with the lower error; of equal errors, the one that was given first."""
    worse: str
    rates: tuple[Rate, Rate]
    """The error rates of `better` and of `worse`."""
    p: float
    """McNemar's exact two-sided p-value, adjusted by Holm's method for the number of pairs."""

    @property
    def differs(self) -> bool:
        """Whether the difference of the two errors is real, not chance."""
        return self.p < CHANCE

    def sentence(self, attack: str, names: Mapping[str, str]) -> str:
        """Return the result as a sentence; `names` has the name to show for each run."""
        better, worse = names[self.better], names[self.worse]
        where = "without attack" if attack == "none" else f"under {title(attack)}"
        claim = f"No difference between {better} and {worse} can be told {where}"
        if self.differs:
            verb = "makes fewer errors than" if attack == "none" else "is more robust than"
            claim = f"{better} {verb} {worse} {where}"
        low, high = self.rates
        p = "p < 0.001" if self.p < 0.001 else f"p = {self.p:.3g}"
        return (
            f"{claim}: error {low.percent:.2f} % against {high.percent:.2f} % of {low.n} images, "
            f"McNemar {p}"
        )


def pairs(wrong: Mapping[str, Tensor]) -> list[Pair]:
    """Compare every two of several runs; the p-values are adjusted for the number of pairs.

    wrong: {run: (N,) bool, which of the same N images it misclassifies}
    """
    # Sorting is stable: of runs with equal errors the first one comes first.
    both = [sorted(two, key=lambda run: int(wrong[run].sum())) for two in combinations(wrong, 2)]
    adjusted = holm([mcnemar(wrong[one], wrong[other]) for one, other in both])
    return [
        Pair(one, other, (Rate.of(wrong[one]), Rate.of(wrong[other])), p)
        for (one, other), p in zip(both, adjusted, strict=True)
    ]


def mcnemar(one: Tensor, other: Tensor) -> float:
    """Return the exact two-sided p-value of McNemar's test (McNemar 1947).

    one, other: (N,) bool, which of the same N images each of two networks misclassifies.

    If both networks are equally good, each image that only one of them misclassifies is as likely
    to be the one's as the other's: the smaller count is binomial with probability 1/2.
    """
    n, count = int((one ^ other).sum()), int((one & ~other).sum())
    # Whole numbers, so that nothing is rounded or overflows; SciPy takes a second to import.
    tail = term = 1
    for k in range(1, min(count, n - count) + 1):
        term = term * (n - k + 1) // k
        tail += term
    return min(2 * tail / 2**n, 1.0)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number by Holm's method (Holm 1979), in the same order."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min((len(p_values) - rank) * p_values[index], 1.0))
        adjusted[index] = largest
    return adjusted
