"""Batches of images, and the seeds of their augmentation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """A batch of images on a device.

    Attributes:
        views: augmented views of the images, normalized, float32 ``[B, C, H, W]`` each.
        targets: classes, int64 ``[B]``.
        indices: indices of the images in their :class:`Images`, int64 ``[B]``.
    """

    views: tuple[Tensor, ...]
    targets: Tensor
    indices: Tensor

    @property
    def inputs(self) -> Tensor:
        """The first view."""
        return self.views[0]

    def part_count(self, parts: int) -> int:
        """Return the number of parts of the batch: at most ``parts``, each with at least two images.

        Batch normalization needs two images for a variance.
        """
        return max(min(parts, len(self.targets) // 2), 1)

    def part(self, index: int, parts: int) -> Batch:
        """Return part ``index``, counted from 0, of ``parts`` parts of nearly equal size."""
        if parts == 1:
            return self
        return self.take(torch.arange(len(self.targets)).tensor_split(parts)[index])

    def take(self, rows: Tensor) -> Batch:
        """Return a batch of the images at ``rows``, int64 ``[M]``, which may repeat."""
        return Batch(
            tuple(view[rows] for view in self.views), self.targets[rows], self.indices[rows]
        )


class Draw(NamedTuple):
    """Seed of an epoch's augmentation. The same seed and epoch give the same images.

    Attributes:
        seed: seed of the run.
        epoch: epoch, counted from 1.
    """

    seed: int
    epoch: int
