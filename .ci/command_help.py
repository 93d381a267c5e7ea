"""Write the help of every command to a folder, for the page of the command line."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path

from fastsam.cli.main import command_names, parse


def main(folder: Path) -> None:
    """Write ``COMMAND.txt`` for each command."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in command_names():
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            parse([name, "--help"])
        (folder / f"{name}.txt").write_text(text.getvalue(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
