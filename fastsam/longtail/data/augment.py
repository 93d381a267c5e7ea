"""Augmentations of whole batches, on the device of the batch.

They take raw images (before normalization, so that padding is black) and sample from an explicit CPU
generator, which gives the same augmentation on every device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from fastsam.upload import upload

BatchAugmentation = Callable[[Tensor, Generator], Tensor]
"""Maps images ``[B, C, H, W]`` and a CPU generator to images of the same shape and dtype."""


@dataclass(frozen=True)
class Compose:
    """Applies several augmentations in sequence."""

    parts: tuple[BatchAugmentation, ...]

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        """Augment images ``[B, C, H, W]``."""
        for part in self.parts:
            images = part(images, generator)
        return images


@dataclass(frozen=True)
class RandomCrop:
    """Pads images with black on every side and crops the original size at a random position.

    Args:
        padding: pixels on each side; 4 for CIFAR (Cao et al. 2019), 1 for 8x8 digits.
    """

    padding: int

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        """Crop images ``[B, C, H, W]``."""
        device = images.device
        batch, _, height, width = images.shape
        padded = torch.nn.functional.pad(images, (self.padding,) * 4)
        drawn = torch.randint(2 * self.padding + 1, (2, batch, 1), generator=generator)
        shifts = upload(drawn, device)
        rows = shifts[0] + torch.arange(height, device=device)  # [B, H]
        columns = shifts[1] + torch.arange(width, device=device)  # [B, W]
        samples = torch.arange(batch, device=device)[:, None, None]
        # Indexing puts the channel axis last: [B, H, W, C].
        crops = padded[samples, :, rows[:, :, None], columns[:, None, :]]
        return crops.permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class RandomHorizontalFlip:
    """Flips each image horizontally with probability 0.5."""

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        """Flip images ``[B, C, H, W]``."""
        flip = upload(torch.rand(len(images), generator=generator).lt(0.5), images.device)
        return torch.where(flip[:, None, None, None], images.flip(-1), images)
