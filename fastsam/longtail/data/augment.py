"""Augmentations of whole batches, on the device of the batch.

They take raw images (before normalization, so that padding is black). Their random numbers come from one seed
per image, so an image is augmented in the same way in every batch, on every device and rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsam.longtail.seeds import SampleSeeds
from fastsam.upload import upload

BatchAugmentation = Callable[[Tensor, SampleSeeds], Tensor]
"""Maps images ``[B, C, H, W]`` and one seed per image to images of the same shape and dtype."""
ImageAugmentation = Callable[[Any, SampleSeeds], Tensor]
"""Maps a decoded image and its seed to pixels ``[C, H, W]``.

The image is a Pillow image, uint8 ``[C, H, W]``, or float32 ``[C, H, W]`` in [0, 1].
"""


@dataclass(frozen=True)
class Compose:
    """Applies several augmentations in sequence, each with independent random numbers."""

    parts: tuple[BatchAugmentation, ...]

    def __call__(self, images: Tensor, seeds: SampleSeeds) -> Tensor:
        """Augment images ``[B, C, H, W]``."""
        for number, part in enumerate(self.parts):
            images = part(images, seeds.spawn(number))
        return images


@dataclass(frozen=True)
class RandomCrop:
    """Pads images with black on every side and crops the original size at a random position.

    Args:
        padding: pixels on each side; 4 for CIFAR (Cao et al. 2019), 1 for 8x8 digits.
    """

    padding: int

    def __call__(self, images: Tensor, seeds: SampleSeeds) -> Tensor:
        """Crop images ``[B, C, H, W]``."""
        device = images.device
        batch, _, height, width = images.shape
        padded = torch.nn.functional.pad(images, (self.padding,) * 4)
        drawn = (seeds.uniform(2) * (2 * self.padding + 1)).astype(np.int64)
        shifts = upload(torch.from_numpy(drawn.T[:, :, None].copy()), device)  # [2, B, 1]
        rows = shifts[0] + torch.arange(height, device=device)  # [B, H]
        columns = shifts[1] + torch.arange(width, device=device)  # [B, W]
        samples = torch.arange(batch, device=device)[:, None, None]
        # Indexing puts the channel axis last: [B, H, W, C].
        crops = padded[samples, :, rows[:, :, None], columns[:, None, :]]
        return crops.permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class RandomHorizontalFlip:
    """Flips each image horizontally with probability 0.5."""

    def __call__(self, images: Tensor, seeds: SampleSeeds) -> Tensor:
        """Flip images ``[B, C, H, W]``."""
        flip = upload(torch.from_numpy(seeds.uniform(1)[:, 0] < 0.5), images.device)
        return torch.where(flip[:, None, None, None], images.flip(-1), images)


def shift(size: tuple[int, int]) -> RandomCrop:
    """Return shifts by up to an eighth of the size: 4 pixels for CIFAR.

    Args:
        size: height and width of the images in pixels.
    """
    return RandomCrop(max(1, round(min(size) / 8)))


def shift_and_flip(size: tuple[int, int]) -> Compose:
    """Return :func:`shift`, and horizontal flips."""
    return Compose((shift(size), RandomHorizontalFlip()))
