"""How commands print."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from fastsam.longtail.errors import UsageError
from fastsam.longtail.training.run_folder import RUN_FILES
from fastsam.text import printable


def show(text: object) -> None:
    """Print text that may hold names from data or files."""
    print(printable(str(text)))


def check_output(path: Path | None, *, inputs: Sequence[Path] = ()) -> None:
    """Refuse an output file that would replace a file of a run, or an input, before anything is computed.

    Args:
        path: the file that ``--out`` names; None for none.
        inputs: files and folders that the command reads.

    Raises:
        UsageError: the file is one of these, or a folder.
    """
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"--out {path} is a folder; name a file")
    if any(fnmatch(path.name, pattern) for pattern in RUN_FILES):
        raise UsageError(f"--out {path} would replace a file of a run; choose another name")
    if any(path.resolve() == given.resolve() for given in inputs):
        raise UsageError(f"--out {path} would replace an image that is read; choose another name")


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table as text."""
    from fastsam.report import TextTable

    return str(TextTable(header, tuple(rows)))
