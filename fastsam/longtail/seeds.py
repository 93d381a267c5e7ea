"""Independent random streams of a run, derived from its seed. Global generators are not changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray


class Stream(IntEnum):
    """Uses of random numbers. Each has an independent stream.

    ``AUGMENT`` numbers depend on epoch, view and image (:class:`SampleSeeds`). ``RANK`` separates the ranks
    where they sample different numbers. ``LAYERS`` is for layers such as dropout. ``MIX`` is for mixers.
    """

    MODEL = 0
    ORDER = 1
    AUGMENT = 2
    NOISE = 3
    LOSS = 4
    RANK = 5
    ASCENT = 6
    LABELS = 7
    LAYERS = 8
    MIX = 9


_CPU = torch.device("cpu")


def derived_seed(seed: int, stream: Stream, *position: int) -> int:
    """Derive a 63-bit seed for a stream at a position (epoch, batch, ...) from the seed of the run.

    It depends on nothing else, so a resumed run samples the same numbers as an uninterrupted one.
    """
    entropy = np.random.SeedSequence([seed, int(stream), *position])
    return int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1))


def torch_generator(seed: int, stream: Stream, *position: int) -> torch.Generator:
    """Return a CPU generator seeded by :func:`derived_seed`.

    Sample on the CPU and copy to the device: this gives the same numbers on all devices.
    """
    return torch.Generator().manual_seed(derived_seed(seed, stream, *position))


def numpy_generator(seed: int, stream: Stream, *position: int) -> np.random.Generator:
    """Return a NumPy generator seeded by :func:`derived_seed`."""
    return np.random.default_rng(derived_seed(seed, stream, *position))


@contextmanager
def global_seed(seed: int, device: torch.device = _CPU) -> Iterator[None]:
    """Seed torch's global generator of a device inside the context, and restore its state afterwards.

    Other devices are left alone: ``torch.manual_seed`` visits every device, which takes far longer.

    Args:
        seed: the seed.
        device: the device, a CPU or a GPU.
    """
    generator = torch.default_generator
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generator = torch.cuda.default_generators[index]
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)


_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
_TOP_53 = np.uint64(11)


@dataclass(frozen=True)
class SampleSeeds:
    """One seed for each sample of a batch, from which its random numbers are computed.

    The numbers of a sample depend on its seed only, not on the other samples of the batch. They are those of
    the generator SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014),
    which computes the n-th number without the numbers before it. So a few NumPy operations compute the
    numbers of a whole batch.

    Attributes:
        keys: one seed per sample, uint64 ``[B]``.

    Example:
        >>> seeds = SampleSeeds.derived(0, Stream.AUGMENT, 1, samples=np.array([[7, 0], [7, 1]]))
        >>> bool((seeds.uniform(2)[:1] == seeds.take(0).uniform(2)).all())
        True
    """

    keys: NDArray[np.uint64]

    @classmethod
    def derived(
        cls, seed: int, stream: Stream, *position: int, samples: NDArray[np.int64]
    ) -> SampleSeeds:
        """Derive the seeds of samples from the seed of the run.

        Args:
            seed: seed of the run.
            stream: use of the random numbers.
            *position: position that all samples share, such as the epoch.
            samples: position of each sample, integers of at least 0, ``[B, K]``.
        """
        keys = np.full(len(samples), derived_seed(seed, stream, *position), np.uint64)
        for column in samples.astype(np.uint64).T:
            keys = _mixed(keys + (column + np.uint64(1)) * _INCREMENT)
        return cls(keys)

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, rows: int | slice | NDArray[np.int64]) -> SampleSeeds:
        """Return the seeds of the samples at ``rows``."""
        return SampleSeeds(np.atleast_1d(self.keys[rows]))

    def spawn(self, number: int) -> SampleSeeds:
        """Return seeds for part ``number`` of a computation, independent of these and of other parts."""
        step = np.full(1, number + 1, np.uint64) * _INCREMENT  # an array may overflow silently
        return SampleSeeds(_mixed(~self.keys + step))

    def bits(self, count: int) -> NDArray[np.uint64]:
        """Return the first ``count`` numbers of each sample, uint64 ``[B, count]``."""
        steps = np.arange(1, count + 1, dtype=np.uint64) * _INCREMENT
        return _mixed(self.keys[:, None] + steps)

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Return uniform numbers in [0, 1), float64 ``[B, count]``. They have 53 random bits."""
        return np.asarray((self.bits(count) >> _TOP_53) * 2.0**-53)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the bijection of SplitMix64 to each value. Products wrap around."""
    for shift, multiplier in zip(_SHIFTS, _MULTIPLIERS, strict=False):
        values = (values ^ (values >> shift)) * multiplier
    return values ^ (values >> _SHIFTS[2])
