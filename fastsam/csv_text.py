"""CSV text that is safe to open in spreadsheets and to print on terminals."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable

from fastsam.text import printable

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""First characters of text that spreadsheets interpret as a formula."""


def csv_line(values: Iterable[object]) -> str:
    r"""Return one line of CSV, including the line break at its end.

    Text that a spreadsheet would interpret as a formula is prefixed with an apostrophe. Control
    characters become escapes, except line breaks, which are quoted.

    Example:
        >>> csv_line(["=1+1", "a,b", 0.5])
        '\'=1+1,"a,b",0.5\n'
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow([_cell(value) for value in values])
    return text.getvalue()


def _cell(value: object) -> object:
    if not isinstance(value, str):
        return value
    return printable(f"'{value}" if value.startswith(_FORMULA) else value)
