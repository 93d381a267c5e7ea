"""Write the help of every command to a folder, for the page of the command line."""

from __future__ import annotations

import contextlib
import io
import sys
import textwrap
from pathlib import Path

from fastsam.cli.main import command_names, parse

DATA_COMMANDS = ("check", "show", "pack", "convert")
"""Parts of ``fastsam data``, which have options of their own."""
WIDTH = 84
"""Characters that fit into a page; the environment variable COLUMNS is the same for the options."""


def main(folder: Path) -> None:
    """Write ``COMMAND.txt`` for each command, and ``data-PART.txt`` for the parts of ``fastsam data``."""
    folder.mkdir(parents=True, exist_ok=True)
    commands = [(name,) for name in command_names()]
    for words in [*commands, *(("data", part) for part in DATA_COMMANDS)]:
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            parse([*words, "--help"])
        lines = [_wrapped(line) for line in text.getvalue().splitlines()]
        target = folder / f"{'-'.join(words)}.txt"
        target.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _wrapped(line: str) -> str:
    """Wrap a paragraph; options begin with a space and are wrapped already."""
    return line if line.startswith(" ") else textwrap.fill(line, WIDTH)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
