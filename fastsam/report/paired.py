"""Paired differences over seeds, their intervals, and the verdict on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fastsam.extras import requires_extra
from fastsam.longtail.measured import Measured

SMALLEST_EFFECT = 1.0
"""Points of accuracy below which a difference does not matter."""
LEVEL = 0.05
"""Significance level of verdicts; intervals cover 1 minus this."""

_ROUNDING = 1e-9
"""Points of accuracy below which a number counts as 0."""

Verdict = Literal["better", "worse", "no difference", "undecided", "unknown"]


@dataclass(frozen=True)
class Difference:
    """Mean of the paired differences of n seeds.

    Attributes:
        mean: left minus right, in points; NaN if a seed lacks one of the two scores.
        half_width: half the width of the 95 % t interval; infinite for one pair, for pairs with the same
            difference other than 0, and for an unknown mean.
        p: two-sided p value of a paired t test; 1 in the same cases.
        n: number of pairs.
    """

    mean: float
    half_width: float
    p: float
    n: int

    @property
    def known(self) -> bool:
        """Whether both ways to train have the score with all seeds."""
        return not math.isnan(self.mean)

    @property
    def interval(self) -> tuple[float, float]:
        """Ends of the 95 % interval."""
        return self.mean - self.half_width, self.mean + self.half_width

    def verdict(self, p: float | None = None) -> Verdict:
        """Return the verdict on the difference.

        ``no difference`` if the interval lies within plus or minus :data:`SMALLEST_EFFECT`, also if it
        excludes 0. Otherwise ``better`` or ``worse`` if the p value is below :data:`LEVEL`, which for its own
        p value means that the interval excludes 0; else ``undecided``. ``unknown`` if the mean is NaN.

        Args:
            p: p value after a correction for several comparisons; by default its own.
        """
        if not self.known:
            return "unknown"
        low, high = self.interval
        if low >= -SMALLEST_EFFECT and high <= SMALLEST_EFFECT:
            return "no difference"
        if (self.p if p is None else p) < LEVEL:
            return "better" if self.mean > 0 else "worse"
        return "undecided"

    def __str__(self) -> str:
        """Return the mean with its interval, ``+1.2 [0.3, 2.1]``; empty if the mean is NaN."""
        if not self.known:
            return ""
        if math.isinf(self.half_width):
            return f"{self.mean:+.1f}"
        low, high = self.interval
        return f"{self.mean:+.1f} [{low:.1f}, {high:.1f}]"


def paired(left: Sequence[float], right: Sequence[float]) -> Difference:
    """Return the difference of two ways to train over the same seeds.

    Args:
        left: a score of each seed, in percent; NaN for a seed that lacks it, which makes the difference
            unknown.
        right: that of the other way, in the same order of seeds.

    Raises:
        ImportError: scipy is not installed.

    Example:
        >>> print(paired([3.0, 4.0, 5.0], [2.0, 3.0, 4.5]))
        +0.8 [0.1, 1.6]
    """
    with requires_extra("longtail", "a t interval"):
        from scipy.stats import t

    gaps = [a - b for a, b in zip(left, right, strict=True)]
    (mean, deviation), n = Measured.of(gaps), len(gaps)
    # Few test images make accuracies coarse, so that equal differences occur. They say nothing about others.
    if deviation is None or (deviation < _ROUNDING and abs(mean) > _ROUNDING):
        return Difference(mean, math.inf, 1.0, n)
    error = deviation / math.sqrt(n)
    half_width = float(t.ppf(1 - LEVEL / 2, n - 1)) * error
    p = 2 * float(t.sf(abs(mean) / error, n - 1)) if error else float(mean == 0)
    return Difference(mean, half_width, p, n)
