"""Printing, and checks of output paths, shared by the commands."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from fastsam.longtail.errors import UsageError
from fastsam.longtail.training.run_folder import RUN_FILES
from fastsam.text import printable


def show(text: object) -> None:
    """Print text that may contain names from data or files; control characters are escaped.

    The output is flushed, so that each line of a long command appears in a file or pipe at once.
    """
    print(printable(str(text)), flush=True)


def check_output(path: Path | None, *, inputs: Sequence[Path] = ()) -> None:
    """Check that an output file replaces neither a file of a run nor an input.

    Args:
        path: value of ``--out``, or None.
        inputs: files and folders that the command reads.

    Raises:
        UsageError: if ``path`` is a folder, has the name of a file of a run, or is one of ``inputs``.
    """
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"--out {path} is a folder; pass the path of a file")
    if any(fnmatch(path.name, pattern) for pattern in RUN_FILES):
        raise UsageError(f"--out {path} would overwrite a file of a run; choose another name")
    if any(path.resolve() == given.resolve() for given in inputs):
        raise UsageError(f"--out {path} would overwrite an input image; choose another name")


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Format a table as text."""
    from fastsam.report import TextTable

    return str(TextTable(header, tuple(rows)))
