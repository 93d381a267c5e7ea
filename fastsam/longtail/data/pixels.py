"""Decoding of image files: supported formats and ranges of pixel values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsam.extras import requires_extra
from fastsam.longtail.data.encoded import Encoded, path_or_file
from fastsam.longtail.data.jpeg import decode_plain

if TYPE_CHECKING:
    from PIL.Image import Image

Exif = Literal["transpose", "ignore"]
EXIF: tuple[Exif, ...] = ("transpose", "ignore")

FORMATS = ("JPEG", "PNG", "BMP", "DIB", "WEBP", "TIFF", "GIF", "PPM")
"""Pillow formats that are read. Pillow decodes them itself, without starting other programs."""
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".webp"),
    *(".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm"),
)
"""Suffixes of image files in folders, in lower case."""

WHITE_16 = 65535
"""Pixel value that is scaled to 1 in a 16-bit image, unless a range of values is given."""
_ALWAYS_16 = ("PNG", "PPM")
"""Formats with at most 16 bits per channel, which Pillow may return in a 32-bit mode."""


class Reading(NamedTuple):
    """Options for decoding image files.

    Attributes:
        exif: EXIF orientation: ``transpose`` applies it, ``ignore`` does not.
        value_range: values that are scaled to 0 and 1 in images with more than 8 bits per channel; None for
            0 and 65,535 in 16-bit images, and 0 and 1 in images of floats.
    """

    exif: Exif = "ignore"
    value_range: tuple[float, float] | None = None


class Decoded(NamedTuple):
    """A decoded image file.

    Attributes:
        pixels: an RGB Pillow image, or float32 ``[3, H, W]`` in [0, 1] for more than 8 bits per channel.
        frames: number of frames or pages in the file; ``pixels`` is the first.
        largest: largest value of a 16-bit image; None for others.
    """

    pixels: Image | Tensor
    frames: int
    largest: float | None


def decode(encoded: Encoded, reading: Reading, *, count_frames: bool = False) -> Decoded:
    """Decode the first frame of an image file.

    Args:
        encoded: the file.
        reading: handling of EXIF orientation and pixel values.
        count_frames: count the frames, which reads the whole file in some formats. Otherwise 1 is returned.

    Raises:
        OSError: if the file is missing, damaged or in a format that is not in :data:`FORMATS`.
        ValueError: if values are outside the range, or the range is unknown and not given.
    """
    with requires_extra("longtail", "an image file"):
        from PIL import Image, ImageOps

    with _damage_named(), Image.open(path_or_file(encoded), formats=FORMATS) as opened:
        frames = int(getattr(opened, "n_frames", 1)) if count_frames else 1
        wide = _wide(opened)
        if reading.value_range is not None and _narrowed(opened):
            raise ValueError(
                "value_range does not apply to 16-bit color images, which Pillow reads with 8 bits; "
                "convert the file, or omit --value-range"
            )
        deep = _is_16_bit(opened)
        limits = _range(opened, reading) if wide else (0.0, 1.0)
        # Transpose before the conversion, which drops the orientation of TIFF files.
        image = ImageOps.exif_transpose(opened) if reading.exif == "transpose" else opened
        if not wide:
            return Decoded(image.convert("RGB"), frames, None)
        values = np.asarray(image).astype(np.float64)
        scaled = _scaled(values, limits, stated=reading.value_range is not None)
        return Decoded(scaled, frames, float(values.max()) if deep else None)


def decode_fast(encoded: Encoded, reading: Reading) -> Image | Tensor:
    """Decode the first frame of an image file, with TorchCodec where it is installed and faster.

    The pixels are those of :func:`decode`.

    Args:
        encoded: the file.
        reading: handling of EXIF orientation and pixel values.

    Returns:
        Uint8 ``[3, H, W]`` from TorchCodec, otherwise ``pixels`` of :class:`Decoded`.

    Raises:
        OSError, ValueError: see :func:`decode`.
    """
    pixels = decode_plain(encoded)
    return decode(encoded, reading).pixels if pixels is None else pixels


def as_gray(image: Image | Tensor) -> Image | Tensor:
    """Convert a decoded image to one channel.

    Args:
        image: an RGB Pillow image, or float32 ``[3, H, W]`` with equal channels.
    """
    return image[:1] if isinstance(image, Tensor) else image.convert("L")


def is_gray(encoded: Encoded) -> bool:
    """Return whether an image file stores one channel, possibly with transparency. Reads only its header.

    Raises:
        OSError: if the file is missing or damaged.
    """
    with requires_extra("longtail", "an image file"):
        from PIL import Image

    with _damage_named(), Image.open(path_or_file(encoded), formats=FORMATS) as opened:
        return opened.mode in ("1", "L", "LA", "La") or _wide(opened)


@contextmanager
def _damage_named() -> Iterator[None]:
    """Convert the errors of Pillow to OSError: for damaged files it raises other types, too.

    Among them are SyntaxError, TypeError (a TIFF file without dimensions) and DecompressionBombError.
    """
    try:
        yield
    except (OSError, ValueError, ImportError, MemoryError):
        raise
    except Exception as error:
        raise OSError(str(error) or type(error).__name__) from error


def _wide(image: Image) -> bool:
    """Return whether an image has one channel with more than 8 bits, which convert("RGB") would clip."""
    return image.mode.split(";")[0] in ("I", "F")


def _is_16_bit(image: Image) -> bool:
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in _ALWAYS_16)


def _narrowed(image: Image) -> bool:
    """Return whether Pillow decodes 16-bit channels to 8 bits."""
    if _wide(image):
        return False
    tiles: Any = getattr(image, "tile", ())
    arguments = [tile[3] if isinstance(tile[3], tuple) else (tile[3],) for tile in tiles]
    if image.format == "PPM":
        return any(isinstance(value, int) and value > 255 for given in arguments for value in given)
    return any(";16" in str(given[0]) for given in arguments)


def _range(image: Image, reading: Reading) -> tuple[float, float]:
    """Return the pixel values that are scaled to 0 and 1."""
    if reading.value_range is not None:
        return reading.value_range
    if _is_16_bit(image):
        return 0.0, float(WHITE_16)
    if image.mode == "F":
        return 0.0, 1.0
    raise ValueError(
        "the range of 32-bit integer images is unknown; pass the values of black and white as --value-range "
        "LO HI"
    )


def _scaled(values: NDArray[np.float64], limits: tuple[float, float], *, stated: bool) -> Tensor:
    """Scale gray values ``[H, W]`` from ``limits`` to [0, 1], and return them as float32 ``[3, H, W]``."""
    low, high = limits
    smallest, largest = float(values.min()), float(values.max())
    if not (low <= smallest and largest <= high):  # also False for NaN
        where = f"--value-range {low:g} {high:g}" if stated else f"[{low:g}, {high:g}]"
        raise ValueError(
            f"pixel values from {smallest:g} to {largest:g} are outside {where}; pass a range that contains "
            "them as --value-range LO HI"
        )
    gray = torch.from_numpy(((values - low) / (high - low)).astype(np.float32))
    return gray.expand(3, -1, -1).contiguous()
