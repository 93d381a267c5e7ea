"""The search space of a tuning: where the values of each setting come from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fastsam.longtail.errors import UsageError

_DIGITS = 4
"""Significant digits of values from an interval, so that they are easy to read and to type."""


class Dimension(Protocol):
    """The values that a setting may have."""

    def value(self, place: float) -> Any:
        """Return the value at a place from 0 (included) to 1 (excluded)."""


@dataclass(frozen=True)
class Choices:
    """A list of values, each as likely as the others.

    Example:
        >>> Choices(("sgd", "sam")).value(0.7)
        'sam'
    """

    values: Sequence[Any]

    def __post_init__(self) -> None:
        if not self.values:
            raise UsageError("a search needs at least one value of each setting")

    def value(self, place: float) -> Any:
        """Return the value at a place from 0 (included) to 1 (excluded)."""
        return self.values[int(place * len(self.values))]

    def __str__(self) -> str:
        return ",".join(map(str, self.values))


@dataclass(frozen=True)
class Interval:
    """Numbers between two bounds, uniform on a linear or logarithmic scale, with 4 significant digits.

    If both bounds are of type int, so are the values, and both bounds are possible.

    Attributes:
        low: smallest value.
        high: largest value.
        log: whether the scale is logarithmic.

    Raises:
        UsageError: if the bounds are not finite and in ascending order, or not positive on a logarithmic
            scale.

    Example:
        >>> Interval(0.01, 1.0, log=True).value(0.5), Interval(1, 4).value(0.99)
        (0.1, 4)
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise UsageError(
                f"the bounds of a search must be finite and in ascending order, got {self.low}:{self.high}"
            )
        if self.log and self.low <= 0:
            raise UsageError(
                f"a logarithmic scale requires positive bounds, got log:{self.low}:{self.high}"
            )

    def value(self, place: float) -> float:
        """Return the value at a place from 0 (included) to 1 (excluded)."""
        whole = isinstance(self.low, int) and isinstance(self.high, int)
        low, high = (self.low, self.high + 1) if whole else (self.low, self.high)
        if self.log:
            found = math.exp(math.log(low) + place * (math.log(high) - math.log(low)))
        else:
            found = low + place * (high - low)
        if whole:
            return min(max(math.floor(found), self.low), self.high)
        return min(max(float(f"{found:.{_DIGITS}g}"), self.low), self.high)

    def __str__(self) -> str:
        return f"{'log:' if self.log else ''}{self.low}:{self.high}"
