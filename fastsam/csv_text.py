"""CSV text whose cells no spreadsheet runs and no terminal obeys."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable

from fastsam.text import printable

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What text begins with that spreadsheets run as a formula."""


def csv_line(values: Iterable[object]) -> str:
    r"""Return one line of CSV, its end included.

    Text that a spreadsheet would run as a formula gets an apostrophe in front. Control characters
    become escapes; line breaks stay, inside quotes.

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
