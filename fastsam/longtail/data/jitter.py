"""Color jitter of whole batches, on the device of the batch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsam.longtail.seeds import SampleSeeds
from fastsam.upload import upload

_OPERATIONS = 3
"""Brightness, contrast and saturation, in the order of the random factors."""
_CONTRAST, _SATURATION = 1, 2
_ORDERS = np.array(list(permutations(range(_OPERATIONS))))
_LUMA = 19595.0, 38470.0, 7471.0
"""Weights of red, green and blue in Pillow's conversion to grayscale, in 1/65,536."""
_LUMA_UNIT = 65536.0
_CHUNK = 1 << 20
"""Number of values that the CPU processes at a time, so that they stay in its cache."""


@dataclass(frozen=True)
class ColorJitter:
    """Changes brightness, contrast and saturation by random factors, in random order.

    It has the distribution of ``torchvision.transforms.v2.ColorJitter`` without hue. Images of bytes get the
    values that torchvision computes with Pillow, which rounds down after each of the three operations.

    Args:
        brightness: largest deviation of the factor from 1, at least 0. Factors are at least 0.
        contrast: the same for contrast.
        saturation: the same for saturation.
    """

    brightness: float
    contrast: float
    saturation: float

    def __call__(self, images: Tensor, seeds: SampleSeeds) -> Tensor:
        """Change images ``[B, C, H, W]`` with 1 or 3 channels, uint8 or floating point in [0, 1]."""
        factors, chosen = self.sample(seeds)
        operations = upload(torch.from_numpy(chosen), images.device)
        drawn = upload(torch.from_numpy(factors.astype(np.float32)), images.device)
        if images.device.type != "cpu":
            return _jittered(images, drawn, operations)
        step = max(1, _CHUNK // max(images[:1].numel(), 1))
        result = torch.empty_like(images)
        for start in range(0, len(images), step):
            rows = slice(start, start + step)
            result[rows] = _jittered(images[rows], drawn[rows], operations[rows])
        return result

    def sample(self, seeds: SampleSeeds) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Sample factors and operations in the order of their application, ``[B, 3]`` each.

        Operation 0 is brightness, 1 contrast and 2 saturation.
        """
        numbers = seeds.uniform(_OPERATIONS + 1)
        strengths = np.array([self.brightness, self.contrast, self.saturation])
        low, high = np.maximum(1 - strengths, 0), 1 + strengths
        factors = low + (high - low) * numbers[:, :_OPERATIONS]
        orders = _ORDERS[(numbers[:, _OPERATIONS] * len(_ORDERS)).astype(np.int64)]
        return np.take_along_axis(factors, orders, axis=1), orders


def _jittered(images: Tensor, factors: Tensor, operations: Tensor) -> Tensor:
    """Apply three operations to each image. All three blend the image with a simpler one.

    Brightness blends it with black, contrast with its mean gray, saturation with its grayscale image. One
    formula for the three lets every image have its own order without a synchronization.
    """
    whole = not images.is_floating_point()
    white = 255.0 if whole else 1.0
    values = images.float()
    for factor, operation in zip(factors.unbind(1), operations.unbind(1), strict=True):
        gray = _gray(values, whole=whole)
        mean = _mean(gray, whole=whole)
        contrast, saturation = (
            (operation == kind).float()[:, None, None, None] for kind in (_CONTRAST, _SATURATION)
        )
        simple = gray.mul_(saturation).add_(mean * contrast)
        values = torch.sub(values, simple).mul_(factor[:, None, None, None]).add_(simple)
        values = values.clamp_(0.0, white)
        if whole:
            values.floor_()
    return values.to(images.dtype)


def _gray(values: Tensor, *, whole: bool) -> Tensor:
    """Convert images ``[B, C, H, W]`` to grayscale ``[B, 1, H, W]``, a copy.

    The sums are integers below 2^24, which float32 represents exactly.
    """
    if values.shape[1] == 1:
        return values.clone()
    red, green, blue = (values[:, i : i + 1] for i in range(3))
    total = (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])
    if not whole:
        return total.div_(_LUMA_UNIT)
    return total.add_(_LUMA_UNIT / 2).div_(_LUMA_UNIT).floor_()


def _mean(gray: Tensor, *, whole: bool) -> Tensor:
    """Return the mean of each grayscale image, ``[B, 1, 1, 1]``, rounded to an integer for bytes."""
    if not whole:
        return gray.mean(dim=(1, 2, 3), keepdim=True)
    pixels = gray.shape[-2] * gray.shape[-1]
    # The sum of a row is exact in float32, that of an image may not be.
    total = gray.sum(dim=-1, keepdim=True).long().sum(dim=-2, keepdim=True)
    return ((2 * total + pixels) // (2 * pixels)).float()
