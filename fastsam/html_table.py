"""Small HTML tables, which notebooks show in place of a ``repr``."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from fastsam.text import one_line

Cell: TypeAlias = str | float | None
"""Text or a number; None and NaN are shown as a dash."""


def html_table(header: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """Return an HTML table without colors, so that it suits light and dark pages.

    Names of classes and data sets may contain markup, so all text is escaped. Integers are shown in
    full, other numbers with six significant digits.

    Args:
        header: a heading for each column.
        rows: the cells of each row. The first one names the row.

    Example:
        >>> html_table(["", "value"], [["a < b", 0.25]]).splitlines()[2]
        '<tr><th style="text-align:left">a &lt; b</th><td style="text-align:right">0.25</td></tr>'
    """
    head = "".join(_element("th", name, "left") for name in header)
    body = (
        _element("th", name, "left")
        + "".join(
            _element("td", cell, "left" if isinstance(cell, str) else "right") for cell in row
        )
        for name, *row in rows
    )
    lines = [f"<thead><tr>{head}</tr></thead><tbody>", *(f"<tr>{row}</tr>" for row in body)]
    return "\n".join(["<table>", *lines, "</tbody></table>"])


def _element(tag: str, cell: Cell, side: str) -> str:
    return f'<{tag} style="text-align:{side}">{html.escape(_shown(cell))}</{tag}>'


def _shown(cell: Cell) -> str:
    if isinstance(cell, str):
        return one_line(cell)
    if cell is None or math.isnan(cell):
        return "–"
    return str(cell) if isinstance(cell, int) else f"{cell:.6g}"
