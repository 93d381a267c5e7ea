"""Text from files, made harmless for a terminal, and notices on standard error."""

from __future__ import annotations

import sys


def printable(text: str) -> str:
    r"""``text`` with its control and other invisible characters as escapes; line breaks stay.

    Class names and paths may hold sequences that a terminal obeys.

    Example:
        >>> printable("caf\u00e9 \x1b[2J")
        'café \\x1b[2J'
    """
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode()
        for char in text
    )


def one_line(message: object) -> str:
    """A message without line breaks and control characters."""
    return printable(" ".join(str(message).split()))


def notice(message: object) -> None:
    """Print one line on standard error: something was left out or done in another way."""
    print(f"fastsam: {one_line(message)}", file=sys.stderr, flush=True)
