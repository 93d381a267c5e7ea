"""One batch of images, and which sample of the augmentation it is."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """One batch on its device.

    Attributes:
        views: normalized images, float32 ``[B, C, H, W]``; each further view is another draw of
            the augmentation.
        targets: classes, int64 ``[B]``.
        indices: positions of the samples in their :class:`Images`, int64 ``[B]``.
    """

    views: tuple[Tensor, ...]
    targets: Tensor
    indices: Tensor

    @property
    def inputs(self) -> Tensor:
        """The first view."""
        return self.views[0]

    def part_count(self, parts: int) -> int:
        """How many parts of two images or more the batch has, at most ``parts``.

        A part of one image would have no variance for batch normalization.
        """
        return max(min(parts, len(self.targets) // 2), 1)

    def part(self, index: int, parts: int) -> Batch:
        """Part ``index`` of ``parts`` nearly equal ones, counted from 0."""
        if parts == 1:
            return self
        return self.take(torch.arange(len(self.targets)).tensor_split(parts)[index])

    def take(self, rows: Tensor) -> Batch:
        """Return the samples at these places of the batch, int64 ``[M]``; a place may occur again."""
        return Batch(
            tuple(view[rows] for view in self.views), self.targets[rows], self.indices[rows]
        )


class Draw(NamedTuple):
    """Which sample of the augmentation: the same seed and epoch give the same images.

    Attributes:
        seed: seed of the run.
        epoch: counted from 1.
    """

    seed: int
    epoch: int
