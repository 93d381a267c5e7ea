"""The batches of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fastsam.longtail.data import Batch, Draw, Images
from fastsam.longtail.samplers import HasOrder

VIEW_EPOCHS = 1 << 32
"""Each further view of an epoch is sampled as that of an epoch so much later."""


@dataclass(frozen=True)
class EpochBatches:
    """Reads this process's share of an epoch, batch by batch.

    Attributes:
        images: the training images.
        sampler: which of them an epoch has, in their order.
        batch_size: images in a batch of this process.
        views: how many augmented views of each image are read.
        augment: whether to augment.
        seed: seed of the augmentation in this process.
        device: where the batches are wanted.
    """

    images: Images
    sampler: HasOrder
    batch_size: int
    views: int
    augment: bool
    seed: int
    device: torch.device

    def indices(self, epoch: int) -> list[NDArray[np.int64]]:
        """Indices of each batch of an epoch; a lone last image joins the batch before."""
        order = self.sampler.order(epoch)
        cuts = list(range(self.batch_size, len(order), self.batch_size))
        if cuts and len(order) - cuts[-1] == 1:
            cuts.pop()
        return np.array_split(order, cuts)

    def read(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch, counted from 1, with all their views."""
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
