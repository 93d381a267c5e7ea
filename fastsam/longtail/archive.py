"""Torch archives that are written atomically and verified when they are read."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_crc32_options, set_crc32_options

from fastsam.files import write_atomically
from fastsam.longtail.errors import DamagedError


def write_archive(path: Path, content: Any) -> None:
    """Write ``content`` atomically, with checksums: a crash leaves the previous file intact.

    Args:
        path: the file.
        content: tensors and plain values in dicts and lists.

    Raises:
        OSError: if the file cannot be written; the message includes the required disk space.
    """
    with _checksums():
        write_atomically(path, lambda file: torch.save(content, file))


def read_archive(path: Path) -> Any:
    """Verify the checksums of an archive and load it to the CPU, without executing code from it.

    Raises:
        DamagedError: if the file is damaged or is not a torch archive.
    """
    with _damage_named(path):
        _verify(path)
        return torch.load(path, map_location="cpu", weights_only=True)


def read_outline(path: Path) -> Any:
    """Load an archive without the values of its tensors, which are on the device ``meta``.

    Only the checksum of what is read is verified, so the time does not depend on the size of the tensors.

    Raises:
        DamagedError: if that part of the file is damaged, or it is not a torch archive.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.pt"
        >>> write_archive(path, {"epoch": 3, "weight": torch.ones(2)})
        >>> outline = read_outline(path)
        >>> outline["epoch"], outline["weight"].shape, outline["weight"].device
        (3, torch.Size([2]), device(type='meta'))
    """
    with _damage_named(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith("/data.pkl"):
                    archive.read(name)  # raises: its checksum is wrong
        return torch.load(path, map_location="meta", mmap=True, weights_only=True)


def check_archive(path: Path) -> None:
    """Verify the checksums of an archive, without its tensors in memory.

    Raises:
        DamagedError: if the file is damaged or is not a torch archive.
    """
    with _damage_named(path):
        _verify(path)
        read_outline(path)


def _verify(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged} is wrong")


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Convert the errors of a damaged archive to a :class:`DamagedError`."""
    try:
        yield
    except DamagedError:
        raise
    except Exception as error:
        # A damaged file can raise any of a dozen types of exception.
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        if isinstance(error, pickle.UnpicklingError):
            reason = "it contains objects that are not plain data"
        raise DamagedError(
            f"cannot read {path} as a checkpoint: it is truncated, damaged or was not written by "
            f"fastsam ({reason}); restore the file or train again"
        ) from error


@contextmanager
def _checksums() -> Iterator[None]:
    """Make ``torch.save`` write checksums, even if they are disabled."""
    before = get_crc32_options()
    set_crc32_options(True)
    try:
        yield
    finally:
        set_crc32_options(before)
