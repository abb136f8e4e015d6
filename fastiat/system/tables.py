"""Tables as text: Markdown, CSV, or columns aligned for a terminal."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from fastiat.system.errors import printable


def aligned(rows: Sequence[Sequence[str]], left: int) -> list[list[str]]:
    """Pad the cells of each column to one width; the first `left` columns are aligned left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        [
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    ]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table with padded columns; the first `left` columns are aligned left."""
    # An unescaped | would end the cell.
    cells = [[printable(cell).replace("|", r"\|") for cell in row] for row in rows]
    top, *body = aligned([head, *cells], left)
    rules = [
        "-" * len(cell) if number < left else "-" * (len(cell) - 1) + ":"
        for number, cell in enumerate(top)
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in (top, rules, *body))


def csv_text(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table as CSV with a header line; None becomes an empty field."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([head, *rows])
    return out.getvalue()
