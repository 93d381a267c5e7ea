"""Batches of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fastsam.distributed import World
from fastsam.longtail.data import Batch, Draw, Images
from fastsam.longtail.samplers import HasOrder

FEWEST = 2
"""Smallest number of images that pass through a network together: batch normalization needs two for a
variance."""
VIEW_EPOCHS = 1 << 32
"""Offset in epochs between the augmentation seeds of two views of an image."""


@dataclass(frozen=True)
class EpochBatches:
    """Reads this rank's parts of the batches of an epoch.

    Which images a batch has depends on the sampler and ``batch_size`` only. The ranks split each batch, as
    evenly as possible.

    Attributes:
        images: the training images.
        sampler: yields the indices of the images of an epoch in order, those of all ranks.
        batch_size: images per batch, over all ranks.
        views: number of augmented views of each image.
        augment: whether to augment images.
        seed: seed of the augmentation on this rank.
        device: device of the batches.
        world: the ranks of the run.
        accumulate: micro-batches of a rank's part of a batch.
    """

    images: Images
    sampler: HasOrder
    batch_size: int
    views: int
    augment: bool
    seed: int
    device: torch.device
    world: World = World()  # noqa: RUF009 (frozen)
    accumulate: int = 1

    def indices(self, epoch: int) -> list[NDArray[np.int64]]:
        """Return the indices of this rank's part of each batch of an epoch.

        If the last batch has fewer than two images for each micro-batch, it joins the one before.
        """
        order = self.sampler.order(epoch)
        cuts = list(range(self.batch_size, len(order), self.batch_size))
        if cuts and len(order) - cuts[-1] < FEWEST * self.world.world_size * self.accumulate:
            cuts.pop()
        whole = np.array_split(order, cuts)
        return [batch[self.world.rank :: self.world.world_size] for batch in whole]

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
