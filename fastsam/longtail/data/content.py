"""What image files contain, whatever they are called and wherever they lie."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastsam.longtail.errors import DataError
from fastsam.progress import ProgressBar

SAMPLE = 4096
"""Bytes that a sampled digest reads at the beginning, in the middle and at the end of a file."""
_THREADS = 16
"""Files that are read at the same time: the work is waiting for the disk."""


def file_digest(path: Path, *, whole: bool = False) -> bytes:
    """Return the SHA-256 of a file's size and content.

    Args:
        path: the file.
        whole: digest every byte, not only :data:`SAMPLE` bytes at three places.

    Raises:
        DataError: if the file cannot be read.
    """
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256(size.to_bytes(8, "little"))
            if whole or size <= 3 * SAMPLE:
                while block := file.read(1 << 20):
                    digest.update(block)
            else:
                for place in (0, (size - SAMPLE) // 2, size - SAMPLE):
                    file.seek(place)
                    digest.update(file.read(SAMPLE))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    return digest.digest()


def file_digests(
    paths: Sequence[Path], *, whole: bool = False, progress: bool = False
) -> list[bytes]:
    """Return :func:`file_digest` of every file, in their order.

    Args:
        paths: the files.
        whole: see :func:`file_digest`.
        progress: show progress: a bar on a terminal, a line a minute elsewhere.
    """
    digests = []
    with (
        ProgressBar(
            total=len(paths), description="reading files", unit="file", enabled=progress
        ) as bar,
        ThreadPoolExecutor(_THREADS) as threads,
    ):
        for digest in threads.map(lambda path: file_digest(path, whole=whole), paths):
            digests.append(digest)
            bar.update()
    return digests


def content_hash(digests: Iterable[bytes], targets: NDArray[np.int64]) -> str:
    """Return the SHA-256 of a labelled set of images: contents and classes in their order.

    Args:
        digests: one per image.
        targets: classes, int64 ``[N]``.

    Returns:
        64 hexadecimal digits; the same on machines of either byte order.
    """
    digest = hashlib.sha256(np.ascontiguousarray(targets, dtype="<i8").tobytes())
    for part in digests:
        digest.update(part)
    return digest.hexdigest()
