"""Decoding of JPEG files with TorchCodec, which is faster than Pillow and gives the same pixels."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module, metadata
from typing import NamedTuple

import torch
from torch import Tensor

from fastsam.longtail.data.encoded import Encoded, read_encoded

Decoder = Callable[[bytes], Tensor]
"""Maps the bytes of a JPEG file to uint8 ``[3, H, W]``."""

OLDEST = (0, 16)
"""First release of TorchCodec that decodes images."""
LARGEST = 64 * 1024 * 1024
"""Largest number of pixels; Pillow decodes larger images, with its protection against huge ones."""

_START = b"\xff\xd8\xff"
_FRAMES = (0xC0, 0xC1, 0xC2)
"""Markers of the frame headers of baseline, extended and progressive files."""
_OTHER_FRAMES = (0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))
_SCAN = 0xDA
_EXIF = 0xE1


class Header(NamedTuple):
    """Header of a JPEG file.

    Attributes:
        height: height in pixels.
        width: width in pixels.
        channels: number of channels in the file: 1 for grayscale, 3 for color, 4 for CMYK.
        exif: whether the file has EXIF data, which may contain an orientation.
    """

    height: int
    width: int
    channels: int
    exif: bool


def read_header(data: bytes) -> Header | None:
    """Read the header of a JPEG file; return None if the data have another format or an unusual header.

    Args:
        data: the bytes of the file.
    """
    if not data.startswith(_START):
        return None
    place, exif = 2, False
    while place + 10 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker in _FRAMES:
            if data[place + 4] != 8:  # bits per channel
                return None
            height = int.from_bytes(data[place + 5 : place + 7], "big")
            width = int.from_bytes(data[place + 7 : place + 9], "big")
            return Header(height, width, data[place + 9], exif)
        if marker == _SCAN or marker in _OTHER_FRAMES:
            return None
        exif = exif or marker == _EXIF
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None


def is_plain(data: bytes) -> bool:
    """Return whether TorchCodec and Pillow give the same pixels for the bytes of a file.

    This holds for JPEG files in grayscale or color, without an EXIF orientation.
    """
    header = read_header(data)
    return (
        header is not None
        and not header.exif
        and header.channels in (1, 3)
        and 0 < header.height * header.width <= LARGEST
    )


def decode_plain(image: Encoded) -> Tensor | None:
    """Decode a JPEG file; return None if Pillow must decode it.

    Args:
        image: the file.

    Raises:
        OSError: if the file cannot be read.
    """
    decoder = torchcodec_decoder()
    if decoder is None:
        return None
    data = read_encoded(image)
    if not is_plain(data):
        return None
    try:
        return decoder(data)
    except RuntimeError:  # damaged: Pillow decides, and its message names the damage
        return None


@cache
def torchcodec_decoder() -> Decoder | None:
    """Return TorchCodec's JPEG decoder; None if it is not installed, too old or cannot be loaded."""
    try:
        release = metadata.version("torchcodec").split(".")[:2]
        if tuple(map(int, release)) < OLDEST:
            return None
        decode_jpeg = import_module("torchcodec.decoders").decode_jpeg
    # A release for another torch fails to load in several ways.
    except (ImportError, OSError, RuntimeError, ValueError, AttributeError):
        return None

    def decode(data: bytes) -> Tensor:
        # A bytearray is writable, as torch expects.
        decoded: Tensor = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        return decoded

    return decode
