"""Which runs are compared in pairs, and with which seeds."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from fastsam.longtail import Result
from fastsam.report import Run, by_settings
from fastsam.report.comparison import PairedPanel
from fastsam.report.pairs import paired_panels
from python_tests.report.made_runs import random_result


@pytest.fixture
def generator(seed: int) -> random.Random:
    return random.Random(seed)


def panels(*results: Result) -> list[PairedPanel]:
    return paired_panels(by_settings([Run(each) for each in results]))


def test_runs_of_another_optimizer_are_compared_seed_by_seed(generator: random.Random) -> None:
    def trained(optimizer: str, **settings: Any) -> list[Result]:
        return [random_result(generator, optimizer, seed=k, **settings) for k in (2, 0, 1)]

    sam, late, sgd = trained("sam"), trained("sam", ascent_start="defer"), trained("sgd")
    (panel,) = panels(*sam, *late, *sgd)
    assert panel.title == "digits-lt, imbalance 50, ce-drw"
    assert [arm.name for arm in panel.arms] == [
        "sgd",
        "sam, ascent_start 0",
        "sam, ascent_start defer",
    ]
    found = panel.difference("sam, ascent_start defer", "sgd", "raw", "tail")
    gaps = [a.test.groups["tail"] - b.test.groups["tail"] for a, b in zip(late, sgd, strict=True)]
    assert found.mean == pytest.approx(np.mean(gaps))
    assert found.n == 3
    by_seed = {each.config["seed"]: each.test.balanced for each in sgd}
    assert panel.arms[0].raw["balanced"] == [by_seed[k] for k in range(3)]
    costs = [np.mean([r.gradients for r in each]) for each in (sam, sgd)]
    assert panel.cost("sam, ascent_start 0") == pytest.approx(costs[0] / costs[1])


def test_only_common_seeds_count_and_a_pair_needs_two(generator: random.Random) -> None:
    sgd = [random_result(generator, "sgd", seed=k) for k in range(3)]
    wide = [random_result(generator, "sam", seed=k) for k in (1, 2, 3)]
    lone = [random_result(generator, "sam", seed=k, rho=0.5) for k in (2, 4)]
    (panel,) = panels(*sgd, *wide, *lone)
    assert [arm.name for arm in panel.arms] == ["sgd", "sam, rho 0.05"]
    assert panel.arms[0].raw["accuracy"] == [each.test.accuracy for each in sgd[1:]]
    assert panels(sgd[0], wide[0]) == []


@pytest.mark.parametrize("other", [{"lr": 0.01}, {"imbalance": 20.0}, {"epochs": 30}])
def test_runs_that_differ_in_more_are_not_compared(
    other: dict[str, Any], generator: random.Random
) -> None:
    sgd = [random_result(generator, "sgd", seed=k) for k in range(2)]
    sam = [random_result(generator, "sam", seed=k, **other) for k in range(2)]
    assert panels(*sgd, *sam) == []
