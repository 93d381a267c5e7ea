"""Independent random streams of one run, derived from its seed; no global generator is touched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """What a stream of random numbers is used for; each use has its own."""

    MODEL = 0
    ORDER = 1
    AUGMENT = 2
    NOISE = 3
    LOSS = 4
    RANK = 5
    ASCENT = 6
    LABELS = 7


def derived_seed(seed: int, stream: Stream, *position: int) -> int:
    """A 63-bit seed for one stream at one position (epoch, batch, ...) of the run with ``seed``.

    It depends on nothing else, so a resumed run draws the same numbers as an uninterrupted one.
    """
    entropy = np.random.SeedSequence([seed, int(stream), *position])
    return int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1))


def torch_generator(seed: int, stream: Stream, *position: int) -> torch.Generator:
    """A CPU generator at :func:`derived_seed`: drawn on the CPU and moved, all devices agree."""
    return torch.Generator().manual_seed(derived_seed(seed, stream, *position))


def numpy_generator(seed: int, stream: Stream, *position: int) -> np.random.Generator:
    """The NumPy counterpart of :func:`torch_generator`."""
    return np.random.default_rng(derived_seed(seed, stream, *position))


@contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """Run code that can only draw from torch's global CPU generator, and put the generator back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
