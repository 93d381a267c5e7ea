"""The figures of the curvature during training."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from fastsam.curvature import CurvaturePoint
from fastsam.longtail import Result
from fastsam.report import Run, by_settings
from fastsam.report.training_charts import curvature
from python_tests.report.made_runs import random_result


def tracked(generator: random.Random, classes: tuple[str, ...], **settings: Any) -> Result:
    """A run that was measured every 4 of its 8 steps per epoch."""
    points = [
        CurvaturePoint(
            step=step,
            group=name,
            lambda_max=generator.uniform(1, 9),
            lambda_min=generator.uniform(-2, 0),
            residuals=(0.0, 0.0),
            converged=True,
            products=10,
            seconds=1.0,
            loss=1.0,
            gradient_norm=1.0,
            lr=0.1,
        )
        for step in range(0, 40, 4)
        for name in classes
    ]
    result = random_result(generator, "sam", ascent_start=3, **settings)
    return replace(result, steps_per_epoch=8, curvature=points)


def test_eigenvalues_are_those_of_the_runs(seed: int) -> None:
    generator = random.Random(seed)
    one = tracked(generator, ("head", "9"), seed=0)
    other = tracked(generator, ("head",), seed=1)
    charts = {chart.title: chart for chart in curvature(by_settings([Run(one), Run(other)]))}
    assert list(charts) == [
        "Largest Hessian eigenvalue, head classes; 2/lr is pale",
        "Smallest Hessian eigenvalue, head classes",
        "Largest Hessian eigenvalue, class 9; 2/lr is pale",
        "Smallest Hessian eigenvalue, class 9",
    ]
    largest, smallest, *_ = charts.values()
    assert len(largest.data) == 4
    assert len(smallest.data) == 2
    for number, result in enumerate((one, other)):
        points = [point for point in result.curvature if point.group == "head"]
        upper, limit = largest.data[2 * number : 2 * number + 2]
        assert upper["name"].endswith(f"seed {number}")
        assert upper["y"] == [point.lambda_max for point in points]
        assert upper["x"] == pytest.approx([point.step / 8 + 0.5 for point in points])
        assert limit["y"] == pytest.approx([20.0] * len(points))
        assert smallest.data[number]["y"] == [point.lambda_min for point in points]
    # Ascents begin after epoch 3, hence after step 24 = 3 * 8.
    assert 24 / 8 + 0.5 in [shape["x0"] for shape in largest.layout["shapes"]]


def test_runs_without_measurements_have_no_figure(seed: int) -> None:
    assert curvature(by_settings([Run(random_result(random.Random(seed), "sgd"))])) == []
