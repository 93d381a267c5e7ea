"""Files that are either as they were before or completely written, never half."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO


def write_atomically(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Create or replace ``path`` with what ``write`` puts into the file it is given.

    The content goes to a temporary file beside it, reaches the disk, and is renamed; if anything
    fails, ``path`` is as it was.

    Args:
        path: the final name; its folder is created if need be.
        write: receives a binary file open for writing.

    Example:
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_text(folder / "a.txt", "all of it")
        >>> (folder / "a.txt").read_bytes()
        b'all of it'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """:func:`write_atomically` for UTF-8 text."""

    def write(file: IO[bytes]) -> None:
        file.write(text.encode("utf-8"))

    write_atomically(path, write)
