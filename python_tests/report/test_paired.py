"""Paired differences against scipy's paired t test."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import ttest_rel

from fastsam.report.paired import Difference, paired


def test_differences_are_those_of_a_paired_t_test(seed: int) -> None:
    generator = np.random.default_rng(seed)
    left, right = generator.normal(70, 2, size=(2, 9))
    found, expected = paired(left.tolist(), right.tolist()), ttest_rel(left, right)
    assert found.p == pytest.approx(expected.pvalue)
    assert found.interval == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert paired([1.0], [2.0]) == Difference(-1.0, math.inf, 1.0, 1)


@pytest.mark.parametrize("gap", [2.0, -0.1])
def test_equal_differences_are_no_certainty(gap: float) -> None:
    """With 12 test images of a class, an accuracy is a multiple of 8.3 points."""
    right = [100 * n / 12 for n in (1, 4, 7)]
    found = paired([value + gap for value in right], right)
    assert found.mean == pytest.approx(gap)
    assert (found.half_width, found.p, found.n) == (math.inf, 1.0, 3)
    assert found.verdict() == "undecided"
    equal = paired(right, right)
    assert (equal.mean, equal.half_width, equal.p) == (0.0, 0.0, 1.0)
    assert equal.verdict() == "no difference"


@pytest.mark.parametrize("left", [[math.nan], [math.nan, 2.0, 4.0], [math.nan] * 3])
def test_a_missing_score_makes_a_difference_unknown(left: list[float]) -> None:
    found = paired(left, [1.0, 2.0, 4.0][: len(left)])
    assert math.isnan(found.mean)
    assert (found.half_width, found.p, found.n) == (math.inf, 1.0, len(left))
    assert found.verdict() == found.verdict(0.001) == "unknown"
    assert str(found) == ""


@pytest.mark.parametrize(
    ("mean", "half_width", "p", "expected"),
    [
        (0.2, 0.7, 0.5, "no difference"),
        (0.6, 0.3, 0.001, "no difference"),
        (2.0, 1.5, 0.01, "better"),
        (-2.0, 1.5, 0.01, "worse"),
        (2.0, 1.5, 0.06, "undecided"),
        (0.5, 1.5, 0.4, "undecided"),
    ],
)
def test_verdicts(mean: float, half_width: float, p: float, expected: str) -> None:
    assert Difference(mean, half_width, p, 10).verdict() == expected
    assert Difference(mean, half_width, 1.0, 10).verdict(p) == expected
