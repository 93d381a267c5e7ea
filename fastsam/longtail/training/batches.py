"""Batches of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fastsam.longtail.data import Batch, Draw, Images
from fastsam.longtail.samplers import HasOrder

VIEW_EPOCHS = 1 << 32
"""Offset in epochs between the augmentation seeds of two views of an image."""


@dataclass(frozen=True)
class EpochBatches:
    """Reads this rank's batches of an epoch.

    Attributes:
        images: the training images.
        sampler: yields the indices of the images of an epoch in order.
        batch_size: images per batch of this rank.
        views: number of augmented views of each image.
        augment: whether to augment images.
        seed: seed of the augmentation on this rank.
        device: device of the batches.
    """

    images: Images
    sampler: HasOrder
    batch_size: int
    views: int
    augment: bool
    seed: int
    device: torch.device

    def indices(self, epoch: int) -> list[NDArray[np.int64]]:
        """Return the indices of each batch of an epoch. A last batch of one image joins the one before."""
        order = self.sampler.order(epoch)
        cuts = list(range(self.batch_size, len(order), self.batch_size))
        if cuts and len(order) - cuts[-1] == 1:
            cuts.pop()
        return np.array_split(order, cuts)

    def read(self, epoch: int) -> Iterator[Batch]:
        """Iterate over the batches of an epoch (counted from 1), with all views."""
        order = self.indices(epoch)
        views = [
            self.images.batches(
                order,
                Draw(self.seed, epoch + view * VIEW_EPOCHS) if self.augment else None,
                self.device,
            )
            for view in range(self.views)
        ]
        for batches in zip(*views, strict=True):
            yield batches[0]._replace(views=tuple(batch.inputs for batch in batches))
