"""How commands print."""

from __future__ import annotations

from collections.abc import Sequence

from fastsam.text import printable


def show(text: object) -> None:
    """Print text that may hold names from data or files."""
    print(printable(str(text)))


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table as text."""
    from fastsam.report import TextTable

    return str(TextTable(header, tuple(rows)))
