"""Where the workers get decoded images from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from fastsam.longtail.data.pixels import Reading, decode, decode_fast

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
    """

    root: Path
    reading: Reading = Reading()  # noqa: RUF009 (immutable)

    def picture(self, path: str) -> Image | Tensor:
        """See :meth:`ImageSource.picture`."""
        return decode(self.root / path, self.reading).pixels

    def pixels(self, path: str) -> Image | Tensor:
        """See :meth:`ImageSource.pixels`."""
        return decode_fast(self.root / path, self.reading)
