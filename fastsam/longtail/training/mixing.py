"""The partners of the images of a batch: which they are, how they are read, and their mixture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fastsam.distributed import World
from fastsam.longtail.data import Batch
from fastsam.longtail.data.batch import occurrences
from fastsam.longtail.mixers import Mixer, Pairs
from fastsam.longtail.samplers import HasOrder
from fastsam.longtail.seeds import Stream, numpy_generator
from fastsam.upload import upload


@dataclass(frozen=True)
class Mixing:
    """Plans how the batches of a run are mixed.

    Attributes:
        mixer: the mixer.
        targets: class of every training image, int64 ``[N]``.
        sampler: order of the second stream; None if partners are images of the same batch.
        seed: seed of the run, the same on all ranks.
    """

    mixer: Mixer
    targets: NDArray[np.int64]
    sampler: HasOrder | None
    seed: int

    def plans(
        self,
        epoch: int,
        batches: Sequence[NDArray[np.int64]],
        repeats: Sequence[NDArray[np.int64]],
        *,
        start: int,
        world: World,
    ) -> list[PartnerPlan | None]:
        """Plan the batches of an epoch. The result is the same for any number of ranks and any ``start``.

        Args:
            epoch: epoch, counted from 1.
            batches: indices of the images of each batch of all ranks.
            repeats: how often each of these images has already occurred in the epoch.
            start: index of the first batch.
            world: the ranks of the run.

        Returns:
            A plan for each batch from ``start`` on; None for a batch that is not mixed.
        """
        second, second_repeats = self._second_stream(epoch, [len(batch) for batch in batches])
        plans: list[PartnerPlan | None] = []
        for number in range(start, len(batches)):
            random = numpy_generator(self.seed, Stream.MIX, epoch, number)
            if not self.mixer.applies(epoch, random):
                plans.append(None)
                continue
            batch, targets, places = batches[number], self.targets[batches[number]], None
            if self.sampler is None:
                places = self.mixer.partners(targets, random)
                partners, repeated = batch[places], repeats[number][places]
            else:
                partners, repeated = second[number], second_repeats[number]
            plans.append(PartnerPlan(self, random, batch, partners, repeated, places, world))
        return plans

    def _second_stream(
        self, epoch: int, sizes: Sequence[int]
    ) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
        """Return indices and repeats of the second stream, cut into batches."""
        if self.sampler is None:
            return [], []
        order = np.resize(self.sampler.order(epoch), sum(sizes))
        cuts = np.cumsum(sizes)[:-1]
        return np.split(order, cuts), np.split(occurrences(order), cuts)


@dataclass(frozen=True)
class PartnerPlan:
    """The partners of the images of one batch.

    Attributes:
        mixing: how the run mixes batches.
        random: generator of the batch, after the partners were chosen.
        batch: indices of the images of all ranks, int64 ``[N]``.
        partners: indices of their partners, int64 ``[N]``.
        repeats: how often each partner has already occurred in its stream.
        places: places of the partners in ``batch``; None if they are from a second stream.
        world: the ranks of the run.
    """

    mixing: Mixing
    random: np.random.Generator
    batch: NDArray[np.int64]
    partners: NDArray[np.int64]
    repeats: NDArray[np.int64]
    places: NDArray[np.int64] | None
    world: World

    @property
    def missing(self) -> NDArray[np.int64]:
        """Places of this rank's images whose partners are not among its own images: they must be read."""
        own = self._own
        if self.places is None:
            return own
        elsewhere = self.places[own] % self.world.world_size != self.world.rank
        return np.compress(elsewhere, own)

    def mix(self, batch: Batch, read: Batch | None) -> Batch:
        """Mix this rank's part of the batch.

        An image whose partner cannot be read is its own partner.

        Args:
            batch: this rank's images.
            read: the partners of :attr:`missing`; None if there are none.
        """
        own = self._own[found(self.batch[self._own], batch)]
        here = np.full(len(self.batch), -1)
        here[own] = np.arange(len(own))  # row of each image, and -1 for those that are not here
        rows = np.full(len(self.batch), -1) if self.places is None else here[self.places]
        partners, inputs = self.partners.copy(), batch.inputs
        if read is not None:
            came = self.missing[found(self.partners[self.missing], read)]
            rows[came] = len(own) + np.arange(len(came))
            inputs = torch.cat([inputs, read.inputs])
        alone = own[rows[own] < 0]
        rows[alone], partners[alone] = here[alone], self.batch[alone]
        return self.mixing.mixer.mix(
            Pairs(
                targets=self.mixing.targets[self.batch],
                second=self.mixing.targets[partners],
                batch=batch,
                partners=inputs[upload(torch.from_numpy(rows[own]), inputs.device)],
                rows=own,
            ),
            self.random,
        )

    @property
    def _own(self) -> NDArray[np.int64]:
        """Places of this rank's images in the batch of all ranks."""
        return np.arange(self.world.rank, len(self.batch), self.world.world_size)


def found(requested: NDArray[np.int64], batch: Batch) -> NDArray[np.int64]:
    """Return the places in a request of the images that were read, in order.

    It synchronizes with the device only if an image could not be read.

    Args:
        requested: indices of the images that were requested, int64.
        batch: the images that were read.
    """
    if len(batch.targets) == len(requested):
        return np.arange(len(requested))
    readable = np.flatnonzero(np.isin(requested, batch.indices.cpu().numpy()))
    return readable[: len(batch.targets)]
