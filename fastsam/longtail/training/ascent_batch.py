"""Samples of a batch from which the ascent gradient is computed."""

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
from fastsam.longtail.training.batches import FEWEST


class AscentSample(NamedTuple):
    """A sample of a batch.

    Attributes:
        batch: the images of the sample.
        mass: weight of this sample's mean loss among the samples of all ranks: the sum of the class weights
            of the rank's whole batch, a float64 scalar. None to weight by the number of images.
    """

    batch: Batch
    mass: Tensor | None


@dataclass(frozen=True)
class AscentBatches:
    """Samples from each batch the images for the ascent gradient.

    Without ``class_weights`` the images are sampled uniformly, without replacement.

    With ``class_weights`` they are sampled with replacement, image i in proportion to the weight ``w_i`` of
    its class, and the loss of the sample is unweighted. This is importance sampling: the expected gradient of
    a sampled image is ``sum_i w_i g_i / sum_i w_i`` over the batch. It equals the gradient of the weighted
    loss, up to a positive factor if that loss is divided by the number of images. The factor does not matter,
    because an ascent depends only on the direction of its gradient. (Batch normalization uses the statistics
    of the sample.)

    Attributes:
        share: size of a sample as a fraction of the batch, in (0, 1].
        seed: seed of this process.
        objective: objective of a sample.
        class_weights: function from epoch to class weights, float64 ``[C]`` on the device of the batches;
            None to sample uniformly.
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
        *,
        seed: int,
        device: torch.device,
    ) -> AscentBatches | None:
        """Create the sampling of a run; return None if ascents use whole batches.

        Args:
            config: settings of the run.
            data: data set of the run.
            objective: objective of the run.
            seed: seed of this process.
            device: device of the batches.
        """
        if config.ascent_sample == "weighted":
            counts = data.counts
            plain = build_objective(config, counts, data.groups, weighted=False, device=device)
            weights = build_class_weights(config, counts, device=device)
            return cls(config.ascent_share, seed, plain, weights)
        if config.ascent_share in (None, 1):  # None: the optimizer has no such setting
            return None
        return cls(config.ascent_share, seed, objective)

    def size(self, images: int) -> int:
        """Return the size of a sample of a batch with ``images`` images: at least 2, at most all.

        With the smallest number of images of any rank, all ranks have samples of the same size.
        """
        return min(max(round(self.share * images), FEWEST), images)

    def sample(self, batch: Batch, *, epoch: int, number: int) -> AscentSample:
        """Sample a batch, without synchronizing with the device.

        The sample is the same in a resumed run and on every device.

        Args:
            batch: this rank's part of a batch.
            epoch: epoch, counted from 1.
            number: index of the batch in the epoch, counted from 0.
        """
        images = len(batch.targets)
        size = self.size(batch.smallest)
        generator = torch_generator(self.seed, Stream.ASCENT, epoch, number)
        if self.class_weights is None:
            rows = torch.randperm(images, generator=generator)[:size]
            return AscentSample(batch.take(rows.to(batch.targets.device, non_blocking=True)), None)
        # Inverse transform sampling: a uniform number selects the image in whose weight interval it lies.
        ends = self.class_weights(epoch)[batch.targets].cumsum(dim=0)
        points = torch.rand(size, generator=generator, dtype=torch.float64)
        points = points.to(ends.device, non_blocking=True)
        rows = torch.searchsorted(ends, points * ends[-1], right=True).clamp_max(images - 1)
        return AscentSample(batch.take(rows), ends[-1])


def check_ascent_share(config: TrainConfig, world: World) -> None:
    """Check that ``ascent_share`` selects at least 2 images of each rank's part of a batch.

    Args:
        config: settings of the run.
        world: the ranks of the run, which split each batch.

    Raises:
        UsageError: if it selects fewer.
    """
    own = config.batch_size // world.world_size
    share = config.ascent_share
    if share is None or round(share * own) >= FEWEST or share == 1:
        return
    raise UsageError(
        f"ascent_share {share:g} selects {round(share * own)} of {own} images per batch and process, but "
        f"batch normalization requires at least {FEWEST}; raise ascent_share to at least "
        f"{FEWEST / own:.2g} or raise batch_size"
    )
