"""Memory for the Lanczos basis: on the device, on the host, or in a file."""

from __future__ import annotations

import errno
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fastsam.curvature.memory import plan_bytes, readable
from fastsam.disk_space import reserve

_ZEROS = 1 << 24
"""Bytes written at once if the file system cannot reserve space."""


def basis_bytes(probes: int, rows: int, dimension: int, *, dtype: torch.dtype) -> int:
    """Return the size in bytes of a basis of ``rows`` vectors per probe."""
    return probes * rows * _padded(dimension) * dtype.itemsize


def check_place(place: str | Path) -> None:
    """Raise TypeError unless ``place`` is text or a path, and ValueError if it is empty."""
    if not isinstance(place, str | Path):
        raise TypeError(f"basis must be 'device', 'host' or the path of a folder, got {place!r}")
    if not str(place).strip():
        raise ValueError(f"basis must be 'device', 'host' or the path of a folder, got {place!r}")


@contextmanager
def allocated_basis(
    probes: int,
    rows: int,
    dimension: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    place: str | Path,
    memory_limit: int | None,
) -> Iterator[Tensor]:
    """Allocate an uninitialized basis ``[probes, rows, dimension]`` for the duration of the context.

    In a folder it is a memory-mapped file. Its disk space is reserved first: a full disk then raises
    an error here, whereas a later write to mapped memory would kill the process with SIGBUS. The
    file has no name, so the system frees it even if the process is killed.

    Args:
        probes: number of probes.
        rows: number of vectors per probe.
        dimension: length of a vector.
        dtype: dtype of the vectors.
        device: device of the operator.
        place: ``"device"``, ``"host"``, or the path of a folder, which is created if it does not exist.
        memory_limit: bytes that may be used; None for 80 % of free memory. It does not apply to a
            file.

    Raises:
        ValueError: the basis does not fit in memory, or the folder is a file.
        OSError: the disk has no room for the file.
    """
    padded = (probes, rows, _padded(dimension))
    size = basis_bytes(probes, rows, dimension, dtype=dtype)
    check_place(place)
    if place not in ("device", "host"):
        memory = torch.frombuffer(_mapped_file(Path(place), size), dtype=dtype)
    else:
        if place == "host":
            device = torch.device("cpu")
        limit = plan_bytes(device, memory_limit)
        if limit is not None and size > limit:
            raise ValueError(
                f"the Lanczos basis needs {readable(size)} on {device}, but {readable(limit)} "
                "may be used: use fewer steps or probes, basis='host', "
                "basis=FOLDER, or reorthogonalize='none'"
            )
        memory = torch.empty(math.prod(padded), dtype=dtype, device=device)
    yield memory.view(padded)[..., :dimension]


def _padded(dimension: int) -> int:
    """Return the stride of basis rows in elements, with which every row is aligned to 64 bytes."""
    return -(-dimension // 16) * 16


def _mapped_file(folder: Path, size: int) -> mmap.mmap:
    """Map an unnamed file into memory, after reserving its disk space."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(
            f"basis={str(folder)!r} is not a folder; pass a folder on a disk with free space"
        ) from error
    free = shutil.disk_usage(folder).free
    # Unnamed from the start, so that a kill at any moment leaves no file.
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            _fill(file.fileno(), size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise OSError(
                error.errno,
                f"{os.strerror(error.errno)}: the Lanczos basis needs {size / 1e6:.1f} MB in "
                f"{folder}, where {free / 1e6:.1f} MB are free; free disk space, raise any limit on "
                "file sizes (ulimit -f), choose another folder, use fewer steps or probes, or use "
                "reorthogonalize='none'",
            ) from error
        return mmap.mmap(file.fileno(), size)


def _fill(handle: int, size: int) -> None:
    """Fill a new file with ``size`` bytes of zeros; reserve the space if the file system can."""
    if reserve(handle, size):
        return
    zeros = memoryview(bytes(min(size, _ZEROS)))
    written = 0
    while written < size:
        written += os.write(handle, zeros[: size - written])
