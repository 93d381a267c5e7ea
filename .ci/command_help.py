"""Write the help of every command to a folder, for the page of the command line."""

from __future__ import annotations

import contextlib
import io
import sys
import textwrap
from pathlib import Path

from fastsam.cli.main import command_names, parse

WIDTH = 84
"""Characters that fit into a page; the environment variable COLUMNS is the same for the options."""


def main(folder: Path) -> None:
    """Write ``COMMAND.txt`` for each command."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in command_names():
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            parse([name, "--help"])
        lines = [_wrapped(line) for line in text.getvalue().splitlines()]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _wrapped(line: str) -> str:
    """Wrap a paragraph; options begin with a space and are wrapped already."""
    return line if line.startswith(" ") else textwrap.fill(line, WIDTH)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
