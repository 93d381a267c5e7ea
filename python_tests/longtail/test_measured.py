"""Mean and deviation over seeds, against NumPy, and of numbers that a seed lacks."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastsam.longtail.measured import Measured


def test_mean_and_deviation_are_those_of_numpy(seed: int) -> None:
    values = np.random.default_rng(seed).normal(70, 3, size=7)
    found = Measured.of(values.tolist())
    assert found == pytest.approx((values.mean(), values.std(ddof=1)))
    assert str(found) == f"{values.mean():.1f} +- {values.std(ddof=1):.1f}"
    assert found.mean_text(3) == f"{values.mean():.3f}"


def test_one_seed_has_no_deviation() -> None:
    assert Measured.of([80.04]) == (80.04, None)
    assert str(Measured.of([80.04])) == "80.0"


@pytest.mark.parametrize(
    "values", [[None], [math.nan], [math.nan, 1.0], [1.0, None, 2.0], [math.nan, math.nan]]
)
def test_a_number_that_a_seed_lacks_is_unknown(values: list[float | None]) -> None:
    found = Measured.of(values)
    assert math.isnan(found.mean)
    assert found.deviation is None
    assert not found.known
    assert str(found) == found.mean_text(2) == ""


def test_infinite_numbers_have_no_deviation() -> None:
    assert Measured.of([math.inf, 1.0]) == (math.inf, None)
