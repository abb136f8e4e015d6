"""The paper's tables as data: against figures typed from the paper's text."""

import math

import pytest

from fastiat.paper import published
from fastiat.system.errors import InputError

SIX = ("baseline", "mixup", "manifold_mixup", "pgd7", "iat_mixup", "iat_manifold_mixup")
ADVERSARIAL = SIX[3:]
ALL = range(1, 8)


def _value(name, row, measure):
    found = [
        cell.error_percent
        for cell in published.table(name).cells
        if (cell.row, cell.measure) == (row, measure)
    ]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize(
    ("name", "row", "measure", "value"),
    [
        ("table1", "baseline_madry", "No attack, test", 4.80),
        ("table1", "neural_architecture_search", "PGD-7 eps 0.03, test", 49.9),
        ("table1", "baseline", "No attack, train", 0.01),
        ("table1", "mixup", "PGD-7 eps 0.03, train", 93.97),
        ("table1", "pgd7", "PGD-20 eps 0.03, train", 0.82),
        ("table1", "iat_manifold_mixup", "FGSM eps 0.03, test", 11.5),
        ("table1", "iat_manifold_mixup", "PGD-20 eps 0.03, test", 51.07),
        ("table2", "manifold_mixup", "No attack, test", 2.43),
        ("table2", "pgd7", "PGD-20 eps 0.03, test", 47.7),
        ("table2", "iat_mixup", "FGSM eps 0.03, train", 21.65),
        ("table3", "baseline", "PGD-7 eps 0.03, train", 99.97),
        ("table3", "pgd7", "No attack, test", 13.37),
        ("table3", "iat_mixup", "FGSM eps 0.03, test", 41.00),
        ("table3", "iat_manifold_mixup", "PGD-20 eps 0.03, train", 37.54),
        ("table4", "mixup", "PGD-20 eps 0.03, test", 99.95),
        ("table4", "iat_manifold_mixup", "No attack, train", 3.97),
        ("table5", "pgd7", "PGD-20 eps 0.01, test", 28.54),
        ("table5", "pgd7", "PGD-20 eps 0.02, test, crafted on IAT (Mixup)", 28.10),
        ("table5", "iat_mixup", "PGD-20 eps 0.04, test, crafted on PGD (7 steps)", 48.74),
        (
            "table5",
            "iat_mixup",
            "PGD-20 eps 0.04, test, crafted on IAT (Manifold Mixup)",
            51.35,
        ),
        ("table6", "pgd7", "PGD-20 eps 0.005, test", 21.44),
        ("table6", "iat_mixup", "PGD-20 eps 0.08, test", 98.54),
        ("table6", "iat_manifold_mixup", "PGD-20 eps 0.2, test", 100.0),
        ("table7", "pgd7", "PGD-5 eps 0.02, test", 42.35),
        ("table7", "iat_mixup", "PGD-1000 eps 0.02, test", 45.56),
        ("table7", "iat_manifold_mixup", "PGD-50 eps 0.02, test", 43.43),
    ],
)
def test_figures_are_those_of_the_papers_text(name, row, measure, value):
    assert _value(name, row, measure) == value


@pytest.mark.parametrize(
    ("number", "rows", "cells"),
    [
        # Nine rows of four attacks, those cited from elsewhere without training images.
        (1, 9, 6 * 8 + 4 + 4 + 3),
        (2, 6, 6 * 8),
        (3, 6, 6 * 8),
        (4, 6, 6 * 8),
        (5, 3, 3 * 3 * 3),
        (6, 3, 3 * 8),
        (7, 3, 3 * 6),
    ],
)
def test_every_cell_is_there_once(number, rows, cells):
    table = published.table(f"table{number}")
    assert (len(table.rows), len(table.cells)) == (rows, cells)
    assert len({(cell.row, cell.measure) for cell in table.cells}) == cells
    assert all(0 <= cell.error_percent <= 100 for cell in table.cells)
    trained = tuple(row for row in table.rows if published.ROWS[row].adv is not None)
    assert trained == (SIX if number < 5 else ADVERSARIAL)


def test_tables_name_the_networks_and_images_of_section_4():
    named = [(published.table(f"table{n}").arch, published.table(f"table{n}").dataset) for n in ALL]
    wrn, preact = "wrn28_10", "preact18"
    assert named[:4] == [(wrn, "cifar10"), (wrn, "svhn"), (preact, "cifar10"), (preact, "svhn")]
    assert named[4:] == [(preact, "cifar10")] * 3


def test_tables_that_share_a_measurement_agree():
    # Table 5's diagonal is Table 6 at 0.01 and 0.04, and Table 7 at 20 steps.
    for row in ADVERSARIAL:
        for eps in ("0.01", "0.04"):
            measure = f"PGD-20 eps {eps}, test"
            assert _value("table5", row, measure) == _value("table6", row, measure)
        measure = "PGD-20 eps 0.02, test"
        assert _value("table5", row, measure) == _value("table7", row, measure)


def test_curves_are_the_rows_of_tables_6_and_7_in_order():
    eps, errors = zip(*published.curve("table6", "iat_mixup"), strict=True)
    assert eps == (0.005, 0.01, 0.04, 0.05, 0.06, 0.08, 0.1, 0.2)
    assert math.isclose(sum(errors), 17.90 + 25.57 + 78.49 + 88.25 + 93.73 + 98.54 + 99.72 + 100)
    steps = [at for at, _ in published.curve("table7", "pgd7")]
    assert steps == [5, 10, 20, 50, 100, 1000]


def test_a_table_that_the_paper_has_not_is_refused():
    with pytest.raises(InputError, match="'table8': choose from table1, "):
        published.table("table8")


def test_rows_are_found_by_their_flags():
    assert [
        published.row_of(published.ROWS[key].adv, published.ROWS[key].mix) for key in SIX
    ] == list(SIX)
    assert published.row_of("fgsm", "mixup") is None
