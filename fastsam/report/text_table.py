"""Rows of text under a header."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_ONE = r"[-+]?(?:\d+(?:\.\d*)?(?:e[-+]?\d+)?|inf|nan)"
_NUMBER = re.compile(rf"({_ONE})x?(?: \+- ({_ONE})| \[({_ONE}), ({_ONE})\])?")


@dataclass(frozen=True)
class TextTable:
    """Rows of text under a header."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        """Columns aligned with spaces; the first to the left, the others to the right."""
        lines = (self.header, *self.rows)
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column == 0 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Whether each column holds numbers, besides cells that are empty or ``-``."""
        columns = zip(*self.rows, strict=True) if self.rows else [()] * len(self.header)
        known = ([cell for cell in column if cell not in ("", "-")] for column in columns)
        return tuple(bool(cells) and all(map(numbers_in, cells)) for cells in known)


def numbers_in(cell: str) -> list[str]:
    """Return the numbers of a cell: one, one with its deviation, or one with the ends of its interval.

    Any other text has none.

    Example:
        >>> numbers_in("80.1 +- 0.4"), numbers_in("+1.2 [0.3, 2.1]"), numbers_in("2.00x")
        (['80.1', '0.4'], ['+1.2', '0.3', '2.1'], ['2.00'])
    """
    found = _NUMBER.fullmatch(cell)
    return [] if found is None else [number for number in found.groups() if number is not None]


def range_text(values: Iterable[int]) -> str:
    """Return the smallest and the largest of several counts, ``90 to 100``; one number if they are equal.

    Wrong labels make the counts of the training images differ between seeds.
    """
    found = sorted(set(values))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"
