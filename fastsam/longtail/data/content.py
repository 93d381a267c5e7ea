"""Hashes of the content of image files, independent of their names and location."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import SEEK_END

import numpy as np
from numpy.typing import NDArray

from fastsam.longtail.data.encoded import Encoded, open_encoded
from fastsam.longtail.errors import DataError
from fastsam.progress import ProgressBar

SAMPLE = 4096
"""Number of bytes that a sampled digest reads at the start, in the middle and at the end of a file."""
_THREADS = 16
"""Number of files that are read concurrently. The threads mostly wait for the disk."""


def file_digest(image: Encoded, *, whole: bool = False) -> bytes:
    """Return the SHA-256 of a file's size and content.

    Args:
        image: the file.
        whole: hash every byte instead of :data:`SAMPLE` bytes at three positions.

    Raises:
        DataError: if the file cannot be read.
    """
    try:
        with open_encoded(image) as file:
            size = file.seek(0, SEEK_END)
            file.seek(0)
            digest = hashlib.sha256(size.to_bytes(8, "little"))
            if whole or size <= 3 * SAMPLE:
                while block := file.read(1 << 20):
                    digest.update(block)
            else:
                for place in (0, (size - SAMPLE) // 2, size - SAMPLE):
                    file.seek(place)
                    digest.update(file.read(SAMPLE))
    except OSError as error:
        raise DataError(
            f"cannot read {image!s:.200}: {error.strerror or error}; check the file and its permissions"
        ) from error
    return digest.digest()


def file_digests(
    images: Sequence[Encoded], *, whole: bool = False, progress: bool = False
) -> list[bytes]:
    """Return :func:`file_digest` of every file, in order.

    Args:
        images: the files.
        whole: see :func:`file_digest`.
        progress: show progress: a bar on a terminal, one line per minute elsewhere.
    """
    digests = []
    with (
        ProgressBar(
            total=len(images), description="reading files", unit="file", enabled=progress
        ) as bar,
        ThreadPoolExecutor(_THREADS) as threads,
    ):
        places = range(len(images))  # not the images, which map() would all read first
        for digest in threads.map(lambda place: file_digest(images[place], whole=whole), places):
            digests.append(digest)
            bar.update()
    return digests


def content_hash(digests: Iterable[bytes], targets: NDArray[np.int64]) -> str:
    """Return the SHA-256 of a labeled set of images: contents and classes, in order.

    Args:
        digests: digest of each image.
        targets: classes, int64 ``[N]``.

    Returns:
        64 hexadecimal digits, which do not depend on the byte order of the machine.
    """
    digest = hashlib.sha256(np.ascontiguousarray(targets, dtype="<i8").tobytes())
    for part in digests:
        digest.update(part)
    return digest.hexdigest()
