"""Random resized crop of an image, in a worker process."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastsam.longtail.seeds import SampleSeeds

if TYPE_CHECKING:
    from PIL.Image import Image

_TRIES = 10
"""Number of boxes that are tried before a crop of the center, as in torchvision."""
_PER_TRY = 4


class Box(NamedTuple):
    """A part of an image in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class RandomResizedCrop:
    """Crops a random part of an image and resizes it to a square.

    The part has the distribution of ``torchvision.transforms.v2.RandomResizedCrop``. Resizing is bilinear
    with antialiasing. Of 8 bits it differs by at most 1 from Pillow, which takes three times as long.

    Args:
        size: height and width of the result in pixels; a single number for both.
        scale: smallest and largest area of the part, as a fraction of the image.
        ratio: smallest and largest ratio of width to height of the part.
    """

    size: int | tuple[int, int]
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __call__(self, image: Image | Tensor, seeds: SampleSeeds) -> Tensor:
        """Crop and resize an image.

        Args:
            image: a Pillow image, or uint8 or float32 ``[C, H, W]``.
            seeds: seed of the image.

        Returns:
            The pixels ``[C, height, width]``, uint8 unless the image is float32.
        """
        height, width = image.shape[1:] if isinstance(image, Tensor) else image.size[::-1]
        part = cut(image, self.box(seeds, height, width))
        resized: Tensor = torch.nn.functional.interpolate(
            part[None], self.shape, mode="bilinear", antialias=True
        )[0]
        return resized

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the result in pixels."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    def box(self, seeds: SampleSeeds, height: int, width: int) -> Box:
        """Sample the part of an image of ``height`` and ``width`` pixels.

        Args:
            seeds: seed of the image.
            height: height of the image in pixels.
            width: width of the image in pixels.
        """
        area, (low, high) = height * width, self.ratio
        numbers: list[list[float]] = (
            seeds.uniform(_TRIES * _PER_TRY).reshape(_TRIES, _PER_TRY).tolist()
        )
        for size, shape, down, right in numbers:
            wanted = area * (self.scale[0] + (self.scale[1] - self.scale[0]) * size)
            ratio = low * (high / low) ** shape
            w, h = round(math.sqrt(wanted * ratio)), round(math.sqrt(wanted / ratio))
            if 0 < w <= width and 0 < h <= height:
                return Box(int(down * (height - h + 1)), int(right * (width - w + 1)), h, w)
        h, w = height, width
        if width / height < low:
            h = round(width / low)
        elif width / height > high:
            w = round(height * high)
        return Box((height - h) // 2, (width - w) // 2, h, w)


def cut(image: Image | Tensor, box: Box) -> Tensor:
    """Return a part of an image as a tensor ``[3, height, width]``.

    Args:
        image: an RGB Pillow image, or a tensor ``[3, H, W]``.
        box: the part.
    """
    top, left, height, width = box
    if isinstance(image, Tensor):
        return image[:, top : top + height, left : left + width]
    return as_tensor(image.crop((left, top, left + width, top + height)))


def as_tensor(image: Image) -> Tensor:
    """Convert a Pillow image with 8 bits per channel to uint8 ``[C, H, W]``."""
    pixels: Any = np.array(image)
    tensor = torch.from_numpy(pixels)
    return tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1)
