"""The images of a batch on which an ascent is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastsam.distributed import World
from fastsam.longtail.build import build_class_weights, build_objective
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.data import Batch, LongTailData
from fastsam.longtail.errors import UsageError
from fastsam.longtail.objective import Objective
from fastsam.longtail.seeds import Stream, torch_generator
from fastsam.longtail.training.batches import EpochBatches

_FEWEST = 2
"""Images of a sample at least: batch normalization has no variance of one."""


class AscentSample(NamedTuple):
    """A sample of a batch.

    Attributes:
        batch: the images of the sample.
        mass: what their sum of losses stands for, among the samples of all processes: the sum of the class
            weights of the whole batch, a float64 scalar. None for samples that count by their images.
    """

    batch: Batch
    mass: Tensor | None


@dataclass(frozen=True)
class AscentBatches:
    """Samples each batch for the gradient that directs an ascent.

    Without ``class_weights`` the images are sampled uniformly, without replacement.

    With them they are sampled with replacement, image i in proportion to the weight ``w_i`` of its class, and
    the loss of the sample leaves the weights out. This is importance sampling: the expected gradient of an
    image of the sample is ``sum_i w_i g_i / sum_i w_i`` over the batch. That is the gradient of the weighted
    loss, up to a positive factor where this loss is divided by the number of images. An ascent depends on the
    direction of its gradient alone. (Batch normalization uses the statistics of the sample.)

    Attributes:
        share: size of a sample as a share of the batch, in (0, 1].
        seed: seed of this process.
        objective: the loss of a sample.
        class_weights: class weights of an epoch, float64 ``[C]`` on the device of the batches; None to
            sample uniformly.
    """

    share: float
    seed: int
    objective: Objective
    class_weights: Callable[[int], Tensor] | None = None

    @classmethod
    def of_run(
        cls,
        config: TrainConfig,
        data: LongTailData,
        objective: Objective,
        batches: EpochBatches,
    ) -> AscentBatches | None:
        """Return the sampling of a run; None where ascents read whole batches.

        Args:
            config: settings of the run.
            data: its data set.
            objective: its loss.
            batches: its batches.
        """
        seed, device = batches.seed, batches.device
        if config.ascent_sample == "weighted":
            counts = data.counts
            plain = build_objective(config, counts, data.groups, weighted=False, device=device)
            weights = build_class_weights(config, counts, device=device)
            return cls(config.ascent_share, seed, plain, weights)
        if config.ascent_share in (None, 1):  # None: the optimizer has no such setting
            return None
        return cls(config.ascent_share, seed, objective)

    def size(self, images: int) -> int:
        """Return the size of the sample of a batch with so many images: at least 2, at most all."""
        return min(max(round(self.share * images), _FEWEST), images)

    def sample(self, batch: Batch, *, epoch: int, number: int) -> AscentSample:
        """Return the sample of a batch; the same in a resumed run and on every device.

        The host does not wait for the device.

        Args:
            batch: this process's part of a batch.
            epoch: counted from 1.
            number: batch of the epoch, counted from 0.
        """
        images = len(batch.targets)
        size = self.size(images)
        generator = torch_generator(self.seed, Stream.ASCENT, epoch, number)
        if self.class_weights is None:
            rows = torch.randperm(images, generator=generator)[:size]
            return AscentSample(batch.take(rows.to(batch.targets.device, non_blocking=True)), None)
        # Inverse distribution function: image i is sampled where a uniform number falls into its weight.
        ends = self.class_weights(epoch)[batch.targets].cumsum(dim=0)
        points = torch.rand(size, generator=generator, dtype=torch.float64)
        points = points.to(ends.device, non_blocking=True)
        rows = torch.searchsorted(ends, points * ends[-1], right=True).clamp_max(images - 1)
        return AscentSample(batch.take(rows), ends[-1])


def check_ascent_share(config: TrainConfig, world: World) -> None:
    """Refuse a share that leaves fewer than 2 images of a batch.

    Args:
        config: settings of the run.
        world: the processes of the run, which share out each batch.

    Raises:
        UsageError: there are fewer.
    """
    own = config.batch_size // world.world_size
    share = config.ascent_share
    if share is None or round(share * own) >= _FEWEST or share == 1:
        return
    raise UsageError(
        f"ascent_share {share:g} leaves {round(share * own)} of the {own} images of a batch of each process "
        f"for the ascent, and batch normalization needs at least {_FEWEST}: choose ascent_share of at least "
        f"{_FEWEST / own:.2g}, or a larger batch_size"
    )
