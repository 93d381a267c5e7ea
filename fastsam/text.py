"""Text that is safe to print on a terminal, and notices on standard error."""

from __future__ import annotations

import sys


def printable(text: str) -> str:
    r"""Escape control and other invisible characters in ``text``, except line breaks.

    Class names and paths may contain escape sequences that a terminal would execute.

    Example:
        >>> printable("caf\u00e9 \x1b[2J")
        'café \\x1b[2J'
    """
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode()
        for char in text
    )


def one_line(message: object) -> str:
    """Return a message without line breaks and control characters."""
    return printable(" ".join(str(message).split()))


def notice(message: object) -> None:
    """Print a notice to the user on standard error, in one line."""
    print(f"fastsam: {one_line(message)}", file=sys.stderr, flush=True)
