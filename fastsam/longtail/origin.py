"""Where a result comes from: when, by which command, and by which code."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import fastsam
from fastsam.text import printable


@dataclass(frozen=True)
class Origin:
    """What made a result.

    Attributes:
        date: end of the run, ISO 8601 in UTC.
        command: the command line.
        version: version of fastsam.
        commit: commit of the checkout that fastsam was imported from, with ``-dirty`` if its files were
            changed; None outside a checkout.
    """

    date: str
    command: str
    version: str
    commit: str | None

    @classmethod
    def here(cls) -> Origin:
        """Return the origin of a result that this process makes now."""
        return cls(
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            command=command_line(sys.argv),
            version=fastsam.__version__,
            commit=commit_of(Path(fastsam.__file__).parents[1]),
        )


def command_line(arguments: list[str]) -> str:
    """Return a command line that a shell accepts; ``arguments`` are as in ``sys.argv``.

    Example:
        >>> command_line(["/usr/bin/fastsam", "train", "--out", "my run"])
        "fastsam train --out 'my run'"
        >>> command_line(["train.py", "1"])
        'python train.py 1'
    """
    program, *rest = arguments
    path = Path(program)
    own = path.name == "fastsam" or path.parts[-2:] == ("fastsam", "__main__.py")
    return printable(shlex.join([*(["fastsam"] if own else ["python", program]), *rest]))


def commit_of(folder: Path) -> str | None:
    """Return the commit of a checkout, with ``-dirty`` if its files were changed; None of another folder."""
    if not (folder / ".git").exists():
        return None
    command = ("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    try:
        found = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):  # no git, or a disk that does not answer
        return None
    return found.stdout.strip() or None
