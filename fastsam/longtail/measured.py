"""A number that was measured with several seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import NamedTuple


class Measured(NamedTuple):
    """Mean and standard deviation of a number over seeds.

    Attributes:
        mean: the mean; NaN if the number is not known.
        deviation: the standard deviation; None for one seed, or if it is not known.
    """

    mean: float
    deviation: float | None = None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Measured:
        """Compute mean and standard deviation of a number over seeds.

        If one seed lacks the number, the mean and the deviation are not known. Those of the other seeds
        would stand beside numbers of more seeds, and no reader could tell.

        Args:
            values: the number of each seed, at least one; None or NaN for a seed that lacks it.

        Example:
            >>> str(Measured.of([80.0, 81.0])), str(Measured.of([80.0])), str(Measured.of([80.0, None]))
            ('80.5 +- 0.7', '80.0', '')
        """
        numbers = [math.nan if value is None else float(value) for value in values]
        mean = statistics.mean(numbers)
        # statistics.stdev fails on numbers that are not finite.
        spread = len(numbers) > 1 and all(map(math.isfinite, numbers))
        return cls(mean, statistics.stdev(numbers) if spread else None)

    @property
    def known(self) -> bool:
        """Whether all seeds have the number."""
        return not math.isnan(self.mean)

    def mean_text(self, digits: int) -> str:
        """Return the mean with this number of decimal places; empty if it is not known."""
        return f"{self.mean:.{digits}f}" if self.known else ""

    def __str__(self) -> str:
        """``80.1``, or ``80.1 +- 0.4`` for several seeds; empty if the number is not known."""
        mean = self.mean_text(1)
        return mean if self.deviation is None else f"{mean} +- {self.deviation:.1f}"
