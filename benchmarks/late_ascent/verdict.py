"""Paired differences between arms, their intervals, and what they say."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from scipy.stats import t

SMALLEST_EFFECT = 1.0
"""Points of balanced accuracy below which a difference does not matter."""
LEVEL = 0.05

Verdict = Literal["better", "worse", "no difference", "undecided"]


@dataclass(frozen=True)
class Difference:
    """Mean of the paired differences of n seeds.

    Attributes:
        mean: left minus right, in points.
        half_width: of the 95 % t interval; infinite for one pair.
        p: two-sided p value of a paired t test; 1 for one pair.
        n: number of pairs.
    """

    mean: float
    half_width: float
    p: float
    n: int

    @property
    def interval(self) -> tuple[float, float]:
        """Ends of the 95 % interval."""
        return self.mean - self.half_width, self.mean + self.half_width


def paired(left: Sequence[float], right: Sequence[float]) -> Difference:
    """Return the difference of two arms over the same seeds.

    Args:
        left: a score of each seed.
        right: that of the other arm, in the same order of seeds.

    Example:
        >>> paired([3.0, 4.0, 5.0], [2.0, 3.0, 4.5]).mean
        0.8333333333333334
    """
    gaps = [a - b for a, b in zip(left, right, strict=True)]
    mean, n = statistics.mean(gaps), len(gaps)
    if n < 2:
        return Difference(mean, math.inf, 1.0, n)
    error = statistics.stdev(gaps) / math.sqrt(n)
    half_width = float(t.ppf(1 - LEVEL / 2, n - 1)) * error
    p = 2 * float(t.sf(abs(mean) / error, n - 1)) if error else float(mean == 0)
    return Difference(mean, half_width, p, n)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return p values corrected for their number, after Holm (1979).

    Example:
        >>> holm({"a": 0.01, "b": 0.04})
        {'a': 0.02, 'b': 0.04}
    """
    corrected: dict[str, float] = {}
    largest = 0.0
    for place, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[name]))
        corrected[name] = largest
    return {name: corrected[name] for name in p_values}


def verdict(difference: Difference, p: float) -> Verdict:
    """Return what a difference says.

    Args:
        difference: the paired difference.
        p: its p value after correction.
    """
    low, high = difference.interval
    if low >= -SMALLEST_EFFECT and high <= SMALLEST_EFFECT:
        return "no difference"
    if p < LEVEL:
        return "better" if difference.mean > 0 else "worse"
    return "undecided"


def score_of(record: Mapping[str, Any], kind: str, name: str) -> float:
    """Return a score of a run on the test set.

    Args:
        record: its record.
        kind: ``raw``, ``tau`` or ``tau, few``.
        name: name of the score.
    """
    return float(record["test"][kind][name])
