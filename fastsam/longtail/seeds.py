"""Independent random streams of a run, derived from its seed. Global generators are not changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """Uses of random numbers. Each has an independent stream."""

    MODEL = 0
    ORDER = 1
    AUGMENT = 2
    NOISE = 3
    LOSS = 4
    RANK = 5
    ASCENT = 6
    LABELS = 7


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
def global_seed(seed: int) -> Iterator[None]:
    """Seed torch's global CPU generator inside the context, and restore its state afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
