"""Batches of an epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fastsam.distributed import World
from fastsam.longtail.build import build_mixer, build_sampler, build_second_sampler
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.data import AUGMENTATIONS, Batch, Draw, Images, LongTailData
from fastsam.longtail.data.batch import occurrences
from fastsam.longtail.samplers import HasOrder
from fastsam.longtail.training.mixing import Mixing, PartnerPlan

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
        mixing: how batches are mixed; None to leave them as they are.
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
    mixing: Mixing | None = None

    @classmethod
    def of_run(
        cls, config: TrainConfig, data: LongTailData, views: int, device: torch.device, world: World
    ) -> EpochBatches:
        """Create the batches of a run.

        Args:
            config: settings of the run.
            data: data set of the run.
            views: number of augmented views of each image.
            device: device of the batches.
            world: the ranks of the run.
        """
        targets, counts = data.train.targets, data.counts
        mixer = build_mixer(config, counts)
        mixing = None
        if mixer is not None:
            second = build_second_sampler(config, mixer, targets, counts)
            mixing = Mixing(mixer, targets, second, config.seed)
        return cls(
            data.train,
            build_sampler(config, targets, counts),
            batch_size=config.batch_size,
            views=views,
            augment=AUGMENTATIONS[config.augment].draws,
            seed=config.seed,
            device=device,
            world=world,
            accumulate=config.accumulate,
            mixing=mixing,
        )

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
        views = [self._read(order, repeats, epoch, view) for view in range(self.views)]
        smallest = [
            size // self.world.world_size for size in map(len, self._batches(whole)[start:])
        ]
        plans = self._plans(epoch, whole, start)
        partners = self._partners(plans, epoch)
        for fewest, plan, read, *batches in zip(smallest, plans, partners, *views, strict=True):
            inputs = tuple(batch.inputs for batch in batches)
            batch = batches[0]._replace(views=inputs, fewest=fewest)
            yield batch if plan is None else plan.mix(batch, read)

    def _read(
        self,
        order: Sequence[NDArray[np.int64]],
        repeats: Sequence[NDArray[np.int64]],
        epoch: int,
        view: int,
        *,
        partners: bool = False,
    ) -> Iterator[Batch]:
        draw = Draw(self.seed, epoch, view, repeats) if self.augment else None
        if partners:  # other implementations of Images need the keyword only to be mixed
            return self.images.batches(order, draw, self.device, may_be_empty=True)
        return self.images.batches(order, draw, self.device)

    def _plans(
        self, epoch: int, whole: NDArray[np.int64], start: int
    ) -> Sequence[PartnerPlan | None]:
        """Return how the batches of an epoch are mixed, from ``start`` on."""
        batches = self._batches(whole)
        if self.mixing is None:
            return [None] * (len(batches) - start)
        repeats = self._batches(occurrences(whole))
        return self.mixing.plans(epoch, batches, repeats, start=start, world=self.world)

    def _partners(self, plans: Sequence[PartnerPlan | None], epoch: int) -> Iterator[Batch | None]:
        """Read the partners of each batch that are not among its images; yield None if there are none."""
        needed = [plan is not None and len(plan.missing) > 0 for plan in plans]
        reads = [plan for plan, needs in zip(plans, needed, strict=True) if plan and needs]
        order = [plan.partners[plan.missing] for plan in reads]
        repeats = [plan.repeats[plan.missing] for plan in reads]
        # A partner from the same batch looks as it does on its own rank.
        second = self.mixing is not None and self.mixing.sampler is not None
        view = self.views if second else 0
        # Reading nothing would start workers, too.
        batches = self._read(order, repeats, epoch, view, partners=True) if reads else iter(())
        for needs in needed:
            yield next(batches) if needs else None
        for _ in batches:  # ends the iterator, which gives its workers back
            raise AssertionError("a batch of partners was not used")

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
