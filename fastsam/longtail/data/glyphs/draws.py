"""Random numbers that depend on a key and nothing else, the same bits everywhere.

SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014),
in integers: no library's generator or its version takes part. A key names an image; what is drawn
for one image does not depend on which others are drawn with it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: a bijection whose outputs look independent."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def keys(*parts: int | NDArray[np.int64]) -> NDArray[np.uint64]:
    """One key for each combination of ``parts`` (seed, purpose, number, ...), uint64 ``[N]``.

    Args:
        *parts: integers, or integer arrays of one length.

    Example:
        >>> keys(0, 1, np.arange(3)).shape
        (3,)
    """
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        key = mix(key + _GOLDEN + np.atleast_1d(np.asarray(part)).astype(np.uint64))
    return key


class Draws:
    """The numbers of N keys, drawn one after the other for all keys at once.

    Args:
        key: uint64 ``[N]``, from :func:`keys`.
    """

    def __init__(self, key: NDArray[np.uint64]) -> None:
        self._key = key
        self._count = 0

    def bits(self, count: int) -> NDArray[np.uint64]:
        """Uniform 64-bit integers ``[N, count]``."""
        steps = np.arange(self._count + 1, self._count + count + 1, dtype=np.uint64)
        self._count += count
        return mix(self._key[:, None] + steps * _GOLDEN)

    def uniform(self, low: float, high: float, count: int = 1) -> NDArray[np.float64]:
        """Uniform numbers of ``[low, high)``, float64 ``[N, count]``."""
        unit = (self.bits(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return low + (high - low) * unit

    def bell(self, width: float, count: int = 1) -> NDArray[np.float64]:
        """Bell-shaped numbers of ``(-width, width)``, mean 0: of three uniform ones the mean."""
        a, b, c = (self.uniform(-1.0, 1.0, count) for _ in range(3))
        return (a + b + c) * (width / 3.0)

    def below(self, limit: int) -> NDArray[np.int64]:
        """Integers 0 to ``limit`` - 1 (at most 2^32), int64 ``[N]``."""
        high = self.bits(1)[:, 0] >> np.uint64(32)
        return ((high * np.uint64(limit)) >> np.uint64(32)).astype(np.int64)

    def chance(self, probability: float) -> NDArray[np.bool_]:
        """True with the given probability, bool ``[N]``."""
        return self.uniform(0.0, 1.0)[:, 0] < probability
