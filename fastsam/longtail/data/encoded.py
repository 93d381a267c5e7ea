"""Where encoded images are: in files of a folder, or in the rows of a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, overload

Encoded = Path | bytes
"""An encoded image: path of a file, or its content."""
Location = Callable[[str], Encoded]
"""Finds the encoded image with a given name."""


def open_encoded(image: Encoded) -> IO[bytes]:
    """Open an encoded image for reading.

    Raises:
        OSError: if the file cannot be read.
    """
    return BytesIO(image) if isinstance(image, bytes) else image.open("rb", buffering=0)


def path_or_file(image: Encoded) -> Path | BytesIO:
    """Return what libraries open that take a path or a file object."""
    return BytesIO(image) if isinstance(image, bytes) else image


def read_encoded(image: Encoded) -> bytes:
    """Return the content of an encoded image.

    Raises:
        OSError: if the file cannot be read.
    """
    return image if isinstance(image, bytes) else image.read_bytes()


@dataclass(frozen=True)
class Located(Sequence[Encoded]):
    """Encoded images that are found one by one, so that not all are in memory.

    Attributes:
        names: names of the images.
        location: finds an image by its name.
    """

    names: Sequence[str]
    location: Location

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, place: int) -> Encoded: ...
    @overload
    def __getitem__(self, place: slice) -> Located: ...

    def __getitem__(self, place: int | slice) -> Encoded | Located:
        if isinstance(place, slice):
            return Located(self.names[place], self.location)
        return self.location(self.names[place])
