"""Where the workers get decoded images from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from fastsam.longtail.data.encoded import Encoded, Location
from fastsam.longtail.data.pixels import Reading, as_gray, decode, decode_fast

if TYPE_CHECKING:
    from PIL.Image import Image


class ImageSource(Protocol):
    """Interface of decoded images, by path."""

    def picture(self, path: str) -> Image | Tensor:
        """Return an RGB Pillow image, or float32 ``[3, H, W]`` in [0, 1] for more than 8 bits per channel.

        Raises:
            OSError, ValueError: if the image cannot be read.
        """
        ...

    def pixels(self, path: str) -> Image | Tensor:
        """Return the same image in the form that is read fastest: also uint8 ``[3, H, W]``.

        Raises:
            OSError, ValueError: if the image cannot be read.
        """
        ...


@dataclass(frozen=True)
class FileSource:
    """Images in files.

    Attributes:
        root: folder that the paths are relative to.
        reading: handling of EXIF orientation and pixel values.
        location: finds the files by their paths; None for files in ``root``.
    """

    root: Path
    reading: Reading = Reading()  # noqa: RUF009 (immutable)
    location: Location | None = None

    def picture(self, path: str) -> Image | Tensor:
        """See :meth:`ImageSource.picture`."""
        return decode(self._at(path), self.reading).pixels

    def pixels(self, path: str) -> Image | Tensor:
        """See :meth:`ImageSource.pixels`."""
        return decode_fast(self._at(path), self.reading)

    def _at(self, path: str) -> Encoded:
        return self.root / path if self.location is None else self.location(path)


@dataclass(frozen=True)
class GraySource:
    """Images of another source, converted to one channel.

    Attributes:
        source: the other source.
    """

    source: ImageSource

    def picture(self, path: str) -> Image | Tensor:
        """Return a grayscale Pillow image, or float32 ``[1, H, W]``; see :meth:`ImageSource.picture`."""
        return as_gray(self.source.picture(path))

    def pixels(self, path: str) -> Image | Tensor:
        """Return the same as :meth:`picture`. See :meth:`ImageSource.pixels`."""
        return self.picture(path)
