"""In which order, and how often, the training images of an epoch are drawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastsam.longtail.config import TrainConfig
from fastsam.longtail.seeds import Stream, numpy_generator


@dataclass(eq=False)
class ShuffledSampler:
    """Every image once per epoch, in random order.

    Attributes:
        size: number of images.
        seed: seed of the run.
    """

    size: int
    seed: int

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Indices of ``epoch``, int64 ``[size]``."""
        return numpy_generator(self.seed, Stream.ORDER, epoch).permutation(self.size)


def build_sampler(
    config: TrainConfig, targets: NDArray[np.int64], counts: NDArray[np.int64]
) -> ShuffledSampler:
    """The sampler of a configuration."""
    return ShuffledSampler(len(targets), config.seed)
