"""McNemar's test and Holm's method: against SciPy, sums of binomial coefficients, and by hand."""

import math

import pytest
import torch
from scipy.stats import binomtest

from fastiat.measuring.mcnemar import holm, mcnemar, pairs
from fastiat.runs.results import Rate


def outcomes(only_one: int, only_other: int, both: int = 5, neither: int = 7):
    """Return which images each of two networks misclassifies, in an order of no meaning."""
    counts = torch.tensor([only_one, only_other, both, neither])
    kind = torch.arange(4).repeat_interleave(counts)
    kind = kind[torch.randperm(len(kind), generator=torch.Generator().manual_seed(0))]
    return (kind == 0) | (kind == 2), (kind == 1) | (kind == 2)


@pytest.mark.parametrize(
    ("only_one", "only_other"),
    [(0, 0), (1, 0), (0, 6), (5, 5), (5, 6), (3, 14), (40, 22), (1, 900), (4800, 5100)],
)
def test_the_p_value_is_that_of_a_fair_coin(only_one, only_other):
    p = mcnemar(*outcomes(only_one, only_other))
    n, fewer = only_one + only_other, min(only_one, only_other)
    assert p == mcnemar(*reversed(outcomes(only_one, only_other)))
    if n:
        assert p == pytest.approx(binomtest(only_one, n).pvalue, rel=1e-9)
    if n < 100:
        tail = sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n
        assert p == pytest.approx(min(2 * tail, 1))


def test_images_on_which_both_agree_change_no_p_value():
    assert mcnemar(*outcomes(3, 14, 0, 0)) == mcnemar(*outcomes(3, 14, 500, 2000))


def test_holms_method_multiplies_the_smallest_by_the_number_and_never_reverses_the_order():
    assert holm([]) == []
    assert holm([0.03]) == [0.03]
    # The largest is not below the one before it: 1 * 0.04 becomes 2 * 0.03.
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.2, 0.01, 0.02, 0.5]) == pytest.approx([0.4, 0.04, 0.06, 0.5])
    assert holm([0.6, 0.9]) == [1, 1]


def test_every_two_runs_are_a_pair_with_the_better_one_first():
    wrong = {
        "bad": torch.tensor([True] * 30 + [False] * 70),
        "good": torch.tensor([True] * 10 + [False] * 90),
        "equal": torch.tensor([False] * 90 + [True] * 10),
    }
    found = {(pair.better, pair.worse): pair for pair in pairs(wrong)}
    assert list(found) == [("good", "bad"), ("equal", "bad"), ("good", "equal")]
    assert found["good", "bad"].rates == (Rate(10, 100), Rate(30, 100))
    # 20 to 0 images; 30 to 10 images; 10 to 10 images.
    raw = [binomtest(k, n).pvalue for k, n in ((0, 20), (10, 40), (10, 20))]
    assert [pair.p for pair in found.values()] == pytest.approx([3 * raw[0], 2 * raw[1], 1])
    names = {"bad": "runs/b", "good": "runs/g", "equal": "e"}
    assert found["good", "bad"].sentence("pgd-20", names) == (
        "runs/g is more robust than runs/b under PGD-20: error 10.00 % against 30.00 % "
        "of 100 images, McNemar p < 0.001"
    )
    assert found["equal", "bad"].sentence("none", names) == (
        "e makes fewer errors than runs/b without attack: error 10.00 % against 30.00 % "
        f"of 100 images, McNemar p = {2 * raw[1]:.3g}"
    )
    assert found["good", "equal"].sentence("autoattack", names) == (
        "No difference between runs/g and e can be told under AutoAttack: error 10.00 % against "
        "10.00 % of 100 images, McNemar p = 1"
    )
