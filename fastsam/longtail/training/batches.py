"""Batches of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fastsam.distributed import World
from fastsam.longtail.data import Batch, Draw, Images
from fastsam.longtail.data.batch import occurrences
from fastsam.longtail.samplers import HasOrder

FEWEST = 2
"""Smallest number of images that pass through a network together: batch normalization needs two for a
variance."""


@dataclass(frozen=True)
class EpochBatches:
    """Reads this rank's parts of the batches of an epoch.

    Which images a batch has depends on the sampler and ``batch_size`` only. The ranks split each batch, as
    evenly as possible. The augmentation of an image does not depend on the rank that reads it.

    Attributes:
        images: the training images.
        sampler: yields the indices of the images of an epoch in order, those of all ranks.
        batch_size: images per batch, over all ranks.
        views: number of augmented views of each image.
        augment: whether to augment images.
        seed: seed of the run, the same on all ranks.
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
        return self._own_parts(self.sampler.order(epoch))

    def read(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """Iterate over the batches of an epoch, with all views.

        Args:
            epoch: epoch, counted from 1.
            start: index of the first batch.
        """
        whole = self.sampler.order(epoch)
        order = self._own_parts(whole)[start:]
        repeats = self._own_parts(occurrences(whole))[start:]
        views = [
            self.images.batches(
                order,
                Draw(self.seed, epoch, view, repeats) if self.augment else None,
                self.device,
            )
            for view in range(self.views)
        ]
        smallest = [
            size // self.world.world_size for size in map(len, self._batches(whole)[start:])
        ]
        for fewest, *batches in zip(smallest, *views, strict=True):
            inputs = tuple(batch.inputs for batch in batches)
            yield batches[0]._replace(views=inputs, fewest=fewest)

    def _own_parts(self, order: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Cut values of all images of an epoch into batches, and return this rank's part of each."""
        whole = self._batches(order)
        return [batch[self.world.rank :: self.world.world_size] for batch in whole]

    def _batches(self, order: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Cut values of all images of an epoch into batches of all ranks."""
        cuts = list(range(self.batch_size, len(order), self.batch_size))
        if cuts and len(order) - cuts[-1] < FEWEST * self.world.world_size * self.accumulate:
            cuts.pop()
        return np.array_split(order, cuts)
