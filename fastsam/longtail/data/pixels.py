"""From one image file to pixels: which formats are read, and what 0 and 1 mean in each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsam.extras import requires_extra

if TYPE_CHECKING:
    from PIL.Image import Image

Exif = Literal["transpose", "ignore"]
EXIF: tuple[Exif, ...] = ("transpose", "ignore")

FORMATS = ("JPEG", "PNG", "BMP", "DIB", "WEBP", "TIFF", "GIF", "PPM")
"""Formats of Pillow that are read: all are decoded in this process, none by another program."""
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".webp"),
    *(".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm"),
)
"""Names of files that count as images in class folders, in lower case."""

WHITE_16 = 65535
"""Value that becomes 1 in an image of 16 bits, unless a range of values is given."""
_ALWAYS_16 = ("PNG", "PPM")
"""Formats with at most 16 bits, which Pillow may hand over in a mode of 32."""


class Reading(NamedTuple):
    """How files are turned into pixels.

    Attributes:
        exif: ``transpose`` turns an image as its EXIF orientation says, ``ignore`` leaves it.
        value_range: values that become 0 and 1 in images of more than 8 bits a channel; None for
            0 and 65,535 in images of 16 bits, and 0 and 1 in images of floats.
    """

    exif: Exif = "ignore"
    value_range: tuple[float, float] | None = None


class Decoded(NamedTuple):
    """One decoded file.

    Attributes:
        pixels: an RGB image of Pillow, or, of more than 8 bits, float32 ``[3, H, W]`` in [0, 1].
        frames: how many frames or pages the file has; ``pixels`` are those of the first.
        largest: the largest value of an image of 16 bits; None of others.
    """

    pixels: Image | Tensor
    frames: int
    largest: float | None


def decode(path: Path, reading: Reading, *, count_frames: bool = False) -> Decoded:
    """Decode the first frame of an image file.

    Args:
        path: the file.
        reading: orientation and range of values.
        count_frames: also count the frames, for which some formats are read to their end; else 1.

    Raises:
        OSError: for a file that is missing, damaged or of another format than :data:`FORMATS`.
        ValueError: for values outside the range, or a range that has to be given.
    """
    with requires_extra("longtail", "an image file"):
        from PIL import Image, ImageOps

    try:
        with Image.open(path, formats=FORMATS) as opened:
            frames = int(getattr(opened, "n_frames", 1)) if count_frames else 1
            wide = _wide(opened)
            if reading.value_range is not None and _narrowed(opened):
                raise ValueError(
                    "Pillow reads colour of 16 bits with 8, so no range of values applies to it"
                )
            deep = _is_16_bit(opened)
            limits = _range(opened, reading) if wide else (0.0, 1.0)
            # Before the conversion, which drops what TIFF says of the orientation.
            image = ImageOps.exif_transpose(opened) if reading.exif == "transpose" else opened
            if not wide:
                return Decoded(image.convert("RGB"), frames, None)
            values = np.asarray(image).astype(np.float64)
            scaled = _scaled(values, limits, stated=reading.value_range is not None)
            return Decoded(scaled, frames, float(values.max()) if deep else None)
    except (SyntaxError, Image.DecompressionBombError) as error:
        # Pillow reports damage of some formats as a syntax error.
        raise OSError(str(error)) from error


def _wide(image: Image) -> bool:
    """Whether an image has one channel of more than 8 bits, which Pillow would clip."""
    return image.mode.split(";")[0] in ("I", "F")


def _is_16_bit(image: Image) -> bool:
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in _ALWAYS_16)


def _narrowed(image: Image) -> bool:
    """Whether Pillow is about to drop the lower half of channels of 16 bits."""
    if _wide(image):
        return False
    tiles: Any = getattr(image, "tile", ())
    arguments = [tile[3] if isinstance(tile[3], tuple) else (tile[3],) for tile in tiles]
    if image.format == "PPM":
        return any(isinstance(value, int) and value > 255 for given in arguments for value in given)
    return any(";16" in str(given[0]) for given in arguments)


def _range(image: Image, reading: Reading) -> tuple[float, float]:
    """The values that become 0 and 1."""
    if reading.value_range is not None:
        return reading.value_range
    if _is_16_bit(image):
        return 0.0, float(WHITE_16)
    if image.mode == "F":
        return 0.0, 1.0
    raise ValueError(
        "integers of 32 bits have no known range; name the values that become black and white with "
        "--value-range LO HI"
    )


def _scaled(values: NDArray[np.float64], limits: tuple[float, float], *, stated: bool) -> Tensor:
    """Grey values ``[H, W]`` with ``limits`` at 0 and 1, float32 ``[3, H, W]``."""
    low, high = limits
    smallest, largest = float(values.min()), float(values.max())
    if not (low <= smallest and largest <= high):  # also False for NaN
        where = f"--value-range {low:g} {high:g}" if stated else f"[{low:g}, {high:g}]"
        raise ValueError(
            f"values go from {smallest:g} to {largest:g}, outside {where}; name a range that holds "
            "them with --value-range LO HI"
        )
    grey = torch.from_numpy(((values - low) / (high - low)).astype(np.float32))
    return grey.expand(3, -1, -1).contiguous()
