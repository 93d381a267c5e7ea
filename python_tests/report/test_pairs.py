"""Which runs are compared in pairs, and with which seeds."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fastsam.longtail import Result
from fastsam.report import Run, by_settings
from fastsam.report.comparison import PairedPanel
from fastsam.report.groups import data_title
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


def test_a_run_with_a_single_seed_leaves_the_others_compared(generator: random.Random) -> None:
    def trained(optimizer: str, seeds: range, **settings: Any) -> list[Result]:
        return [random_result(generator, optimizer, seed=k, **settings) for k in seeds]

    lone = trained("sam", range(1), rho=0.02)
    small, large = trained("sam", range(2)), trained("sam", range(2), rho=0.1)
    (panel,) = panels(*lone, *small, *large)
    assert [arm.name for arm in panel.arms] == ["sam, rho 0.05", "sam, rho 0.1"]
    found = panel.difference("sam, rho 0.1", "sam, rho 0.05", "raw", "balanced")
    gaps = [b.test.balanced - a.test.balanced for a, b in zip(small, large, strict=True)]
    assert found.mean == pytest.approx(np.mean(gaps))
    # SGD with a single seed is compared with nothing; with two it is the first arm.
    sgd = trained("sgd", range(2))
    assert [arm.name for arm in panels(*small, *large, sgd[0])[0].arms] == [
        "sam, rho 0.05",
        "sam, rho 0.1",
    ]
    assert panels(*lone, *small, *large, *sgd)[0].arms[0].name == "sgd"


def test_groups_without_common_seeds_have_panels_of_their_own(generator: random.Random) -> None:
    def trained(optimizer: str, seeds: range, **settings: Any) -> list[Result]:
        return [random_result(generator, optimizer, seed=k, **settings) for k in seeds]

    every = [
        *trained("sgd", range(2)),
        *trained("sam", range(2)),
        *trained("sam", range(5, 8), rho=0.1),
        *trained("sam", range(6, 9), rho=0.2),
    ]
    first, second = panels(*every)
    assert [arm.name for arm in first.arms] == ["sgd", "sam, rho 0.05"]
    assert [arm.name for arm in second.arms] == ["sam, rho 0.1", "sam, rho 0.2"]
    assert (first.seeds, second.seeds) == (2, 2)


def test_runs_on_other_images_are_other_groups(generator: random.Random) -> None:
    """Images of a class were removed between the runs, which renumbers the classes by size."""
    sgd = [random_result(generator, "sgd", seed=k) for k in range(2)]
    names = ["a", "b", "c", "d"]
    before = [replace(each, class_names=names) for each in sgd]
    renumbered = replace(before[1], class_names=["b", "a", "c", "d"], subset_hash="89abcdef01")
    changed = replace(before[1], subset_hash="456789abcd")
    for other in (renumbered, changed):
        groups = by_settings([Run(before[0]), Run(other)])
        assert [group.label for group in groups] == [
            "ce-drw sgd, training set 0123",
            f"ce-drw sgd, training set {other.subset_hash[:8]}",
        ]
        sam = [random_result(generator, "sam", seed=k) for k in range(2)]
        sam = [replace(each, class_names=names) for each in sam]
        assert panels(before[0], other, *sam) == []
    (group,) = by_settings([Run(each) for each in before])
    assert len(group.runs) == 2
    # Another seed of the subset selects other images of the same classes.
    drawn = replace(changed, config={**changed.config, "subset_seed": 1})
    older = replace(before[1], subset_hash=None)
    for other in (drawn, older):
        (group,) = by_settings([Run(before[0]), Run(other)])
        assert len(group.runs) == 2


def test_titles_name_the_folder_of_own_images(generator: random.Random) -> None:
    made = random_result(generator, "sgd")
    shown = made.config | {"data_root": "/data/photosA", "imbalance": None}
    assert data_title(replace(made, config={**shown, "data": "folder"})) == "folder photosA"
    assert data_title(replace(made, config=shown)) == "digits-lt"
