"""Samplers of the training images of an epoch.

They are PyTorch samplers too: pass one to a ``DataLoader`` and call ``set_epoch`` before each epoch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Protocol, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Sampler

from fastsam.longtail.errors import UsageError, unknown
from fastsam.longtail.methods import Sampling
from fastsam.longtail.seeds import Stream, numpy_generator

IMAGES_PER_VISIT = 4
"""Images of a class that ``class-aware`` sampling takes at a time, as in the code of Kang et al. 2020."""


class EpochSampler(Sampler[int], ABC):
    """Base class of samplers whose indices depend only on seed and epoch, split among ranks.

    Every rank samples the same order and takes every ``world_size``-th index of it. If the number of indices
    is not divisible by ``world_size``, the first ones are repeated at the end.

    Args:
        seed: seed of the run, the same on all ranks.
        rank: rank of this process.
        world_size: number of processes.
    """

    def __init__(self, seed: int, *, rank: int = 0, world_size: int = 1) -> None:
        if not 0 <= rank < world_size:
            raise UsageError(f"rank must be in [0, {world_size}), got {rank}")
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self._epoch = 1

    @abstractmethod
    def draw(self, epoch: int) -> NDArray[np.int64]:
        """Sample the indices of all ranks, int64 ``[size]``."""

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Return the indices of this rank in ``epoch`` (counted from 1), int64."""
        drawn = self.draw(epoch)
        padding = -len(drawn) % self.world_size
        return np.concatenate([drawn, np.resize(drawn, padding)])[self.rank :: self.world_size]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration.

        A run of fastsam counts epochs from 1. Loops that count from 0, as those of Lightning and Accelerate
        do, may pass their numbers: only ``progressive`` depends on the epoch by more than chance.

        Raises:
            UsageError: if the epoch is negative.
        """
        if epoch < 0:
            raise UsageError(f"epoch must be at least 0, got {epoch}")
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self._epoch).tolist())


class ShuffledSampler(EpochSampler):
    """Samples every image once per epoch, in random order.

    Args:
        size: number of images.
        seed: seed of the run.
        rank: rank of this process.
        world_size: number of processes.

    Example:
        >>> sorted(ShuffledSampler(4, seed=0).order(1).tolist())
        [0, 1, 2, 3]
    """

    def __init__(self, size: int, *, seed: int, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(seed, rank=rank, world_size=world_size)
        self.size = size

    def draw(self, epoch: int) -> NDArray[np.int64]:
        """Sample a permutation, int64 ``[size]``."""
        return numpy_generator(self.seed, Stream.ORDER, epoch).permutation(self.size)

    def __len__(self) -> int:
        return -(-self.size // self.world_size)


class ClassSampler(EpochSampler):
    """Samples N images per epoch with replacement, with given probabilities of the classes.

    The strategies are those of Kang et al., "Decoupling Representation and Classifier for Long-Tailed
    Recognition" (ICLR 2020), section 3. ``class-balanced`` samples all classes equally often, ``square-root``
    in proportion to the square root of their counts. ``progressive`` interpolates linearly from the counts in
    the first epoch to class-balanced in the last. ``class-aware`` is class-balanced without chance, as in the
    authors' code: cycles over shuffled classes, each with the next 4 images of its own shuffled images, which
    are shuffled again when all were used. Every epoch begins new cycles.

    Args:
        targets: class of every image, integers ``[N]``: an array, a list or a tensor.
        counts: images of each class, integers ``[C]``.
        strategy: one of :data:`fastsam.longtail.methods.Sampling`.
        epochs: number of epochs of the run, for ``progressive``.
        seed: seed of the run.
        rank: rank of this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        targets: ArrayLike,
        counts: ArrayLike,
        *,
        strategy: Sampling = "class-balanced",
        epochs: int = 1,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(seed, rank=rank, world_size=world_size)
        self.targets = _integers("targets", targets)
        self.counts = _integers("counts", counts)
        found = np.bincount(self.targets) if len(self.targets) else np.zeros(0, np.int64)
        if not len(found) or not np.array_equal(found, np.trim_zeros(self.counts, "b")):
            raise UsageError(
                f"counts must be the number of targets of each class, {found.tolist()!s:.60}, and not "
                f"empty; got {self.counts.tolist()!s:.60}"
            )
        if strategy not in get_args(Sampling):
            raise unknown("sampling strategy", strategy, get_args(Sampling))
        if epochs < 1:
            raise UsageError(f"epochs must be at least 1, got {epochs}")
        self.strategy = strategy
        self.epochs = epochs

    def class_shares(self, epoch: int) -> NDArray[np.float64]:
        """Return the probability of each class in ``epoch``, float64 ``[C]``.

        ``progressive`` begins at epoch 1, and stays balanced after ``epochs``. Epoch 0 is as epoch 1.
        """
        natural = self.counts / self.counts.sum()
        if self.strategy == "square-root":
            root = np.sqrt(self.counts)
            return np.asarray(root / root.sum())
        equal = (self.counts > 0) / np.count_nonzero(self.counts)
        if self.strategy in ("class-balanced", "class-aware"):
            return np.asarray(equal)
        progress = min(max((epoch - 1) / max(self.epochs - 1, 1), 0.0), 1.0)
        return np.asarray((1 - progress) * natural + progress * equal)

    def draw(self, epoch: int) -> NDArray[np.int64]:
        """Sample indices with replacement, int64 ``[N]``."""
        if self.strategy == "class-aware":
            return self._cycles(numpy_generator(self.seed, Stream.ORDER, epoch))
        per_image = (self.class_shares(epoch) / np.maximum(self.counts, 1))[self.targets]
        generator = numpy_generator(self.seed, Stream.ORDER, epoch)
        return generator.choice(len(self.targets), len(self.targets), p=per_image)

    def _cycles(self, generator: np.random.Generator) -> NDArray[np.int64]:
        """Sample cycles over the classes with :data:`IMAGES_PER_VISIT` images of each, int64 ``[N]``."""
        size = len(self.targets)
        classes = np.flatnonzero(self.counts)
        cycles = -(-size // (IMAGES_PER_VISIT * len(classes)))
        visits = np.concatenate([generator.permutation(classes) for _ in range(cycles)])
        order = np.empty((len(visits), IMAGES_PER_VISIT), np.int64)
        for label in classes:
            members = np.flatnonzero(self.targets == label)
            needed = cycles * IMAGES_PER_VISIT
            shuffles = [generator.permutation(members) for _ in range(-(-needed // len(members)))]
            order[visits == label] = np.concatenate(shuffles)[:needed].reshape(cycles, -1)
        return order.reshape(-1)[:size]

    def __len__(self) -> int:
        return -(-len(self.targets) // self.world_size)


class FixedSharesSampler(ClassSampler):
    """Samples N images per epoch with replacement, with fixed probabilities of the classes.

    Args:
        targets: class of every image, integers ``[N]``: an array, a list or a tensor.
        counts: images of each class, integers ``[C]``.
        shares: probability of each class, ``[C]``; 0 for classes without images.
        seed: seed of the run.
        rank: rank of this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        targets: ArrayLike,
        counts: ArrayLike,
        *,
        shares: ArrayLike,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(targets, counts, seed=seed, rank=rank, world_size=world_size)
        self.shares = np.asarray(shares, dtype=np.float64)
        if self.shares.shape != self.counts.shape or not (self.shares >= 0).all():
            raise UsageError(
                f"shares must be one probability for each of {len(self.counts)} classes, got "
                f"{self.shares.tolist()!s:.60}"
            )
        total = self.shares[self.counts > 0].sum()
        if not np.isclose(total, 1):
            raise UsageError(
                f"shares of the classes that have images must add up to 1, got {total:g}; divide them by "
                "their sum"
            )
        self.shares = self.shares / total  # NumPy's choice() tolerates less rounding than isclose()

    def class_shares(self, epoch: int) -> NDArray[np.float64]:
        """Return the probability of each class, float64 ``[C]``."""
        return self.shares


def _integers(name: str, values: ArrayLike) -> NDArray[np.int64]:
    """Convert labels or counts to int64.

    Raises:
        UsageError: if they are not a one-dimensional array of non-negative integers.
    """
    array = np.asarray(values)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and len(array)) or (array < 0).any():
        raise UsageError(
            f"{name} must be a one-dimensional array of non-negative integers, got {array.dtype} of shape "
            f"{array.shape}"
        )
    return array.astype(np.int64)


class DeferredSampler:
    """Uses one sampler up to the deferral epoch and another one after it.

    Args:
        early: sampler up to the deferral epoch.
        late: sampler after it.
        defer_epoch: last epoch of ``early``.
    """

    def __init__(self, early: EpochSampler, late: EpochSampler, *, defer_epoch: int) -> None:
        self.early = early
        self.late = late
        self.defer_epoch = defer_epoch

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Return the indices of this rank in ``epoch`` (counted from 1), int64."""
        return (self.late if epoch > self.defer_epoch else self.early).order(epoch)


class HasOrder(Protocol):
    """Interface of samplers that the trainer accepts. The trainer splits their batches among the ranks."""

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Return the indices of ``epoch`` (counted from 1), int64."""
        ...
