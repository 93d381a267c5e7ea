"""Batches of images, and the seeds of their augmentation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsam.longtail.seeds import SampleSeeds, Stream


class Batch(NamedTuple):
    """A batch of images on a device.

    Attributes:
        views: augmented views of the images, normalized, float32 ``[B, C, H, W]`` each.
        targets: classes, int64 ``[B]``.
        indices: indices of the images in their :class:`Images`, int64 ``[B]``.
        fewest: smallest number of images that a rank has of this batch, so that all ranks make the same
            number of passes; None for B.
        second: classes of the images that were mixed into these, int64 ``[B]``; None if none were.
        share: share of ``targets`` in the loss of each image, in [0, 1], ``[B]``. The rest is that of
            ``second``.
    """

    views: tuple[Tensor, ...]
    targets: Tensor
    indices: Tensor
    fewest: int | None = None
    second: Tensor | None = None
    share: Tensor | None = None

    @property
    def inputs(self) -> Tensor:
        """The first view."""
        return self.views[0]

    def part_count(self, parts: int) -> int:
        """Return the number of parts of the batch: at most ``parts``, each with at least two images.

        Batch normalization needs two images for a variance. The number is the same on all ranks.
        """
        return max(min(parts, self.smallest // 2), 1)

    @property
    def smallest(self) -> int:
        """Smallest number of images that a rank has of this batch."""
        return len(self.targets) if self.fewest is None else self.fewest

    def part(self, index: int, parts: int) -> Batch:
        """Return part ``index``, counted from 0, of ``parts`` parts of nearly equal size."""
        if parts == 1:
            return self
        part = self.take(torch.arange(len(self.targets)).tensor_split(parts)[index])
        return part._replace(fewest=None if self.fewest is None else self.fewest // parts)

    def take(self, rows: Tensor) -> Batch:
        """Return a batch of the images at ``rows``, int64 ``[M]``, which may repeat."""
        return self.mapped(lambda tensor: tensor[rows])

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Return a batch whose tensors are ``change`` of the tensors of this one."""
        second = None if self.second is None else change(self.second)
        share = None if self.share is None else change(self.share)
        views = tuple(change(view) for view in self.views)
        return Batch(views, change(self.targets), change(self.indices), None, second, share)

    def parts_by_target(self) -> list[tuple[Batch, Tensor | None]]:
        """Return the batch once for each target of its images, with the share of that target.

        A batch that is not mixed has one target per image, and no shares. In the batches that are returned,
        ``targets`` are the classes of the target, and ``second`` and ``share`` are None.
        """
        if self.second is None or self.share is None:
            return [(self, None)]
        first = self._replace(second=None, share=None)
        return [(first, self.share), (first._replace(targets=self.second), 1 - self.share)]


class Draw(NamedTuple):
    """Random choices of an epoch's augmentation. Equal values give the same images.

    The augmentation of an image depends on these values and on its index. It does not depend on batches,
    workers or ranks.

    Attributes:
        seed: seed of the run.
        epoch: epoch, counted from 1.
        view: view of the images, counted from 0. Each view is augmented independently.
        occurrences: how often each image has already occurred in the epoch, int64 ``[B]`` for each batch, so
            that an image that a sampler chose twice is augmented twice. None to count the occurrences in the
            given batches.
    """

    seed: int
    epoch: int
    view: int = 0
    occurrences: Sequence[NDArray[np.int64]] | None = None

    def seeds(self, order: Sequence[NDArray[np.int64]]) -> list[SampleSeeds]:
        """Return the seeds of the images of each batch.

        Args:
            order: indices of the images of each batch, int64.
        """
        indices = np.concatenate([np.empty(0, np.int64), *order])
        if self.occurrences is None:
            repeats = occurrences(indices)
        else:
            repeats = np.concatenate([np.empty(0, np.int64), *self.occurrences])
        samples = np.stack([indices, repeats], axis=1)
        every = SampleSeeds.derived(
            self.seed, Stream.AUGMENT, self.epoch, self.view, samples=samples
        )
        cuts = np.cumsum([0, *(len(batch) for batch in order)]).tolist()
        return [every.take(slice(start, end)) for start, end in itertools.pairwise(cuts)]


def occurrences(indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """Count how often each value occurs before its place, int64 ``[N]``.

    Args:
        indices: int64 ``[N]``.

    Example:
        >>> occurrences(np.array([5, 2, 5, 5])).tolist()
        [0, 0, 1, 2]
    """
    by_value = np.argsort(indices, kind="stable")
    ordered = indices[by_value]
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    sizes = np.diff(starts, append=len(ordered))
    counted = np.empty(len(indices), np.int64)
    counted[by_value] = np.arange(len(indices)) - np.repeat(starts, sizes)
    return counted
