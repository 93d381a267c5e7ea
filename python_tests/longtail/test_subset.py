"""The long-tailed subsets: published counts, and the selection of Cao et al."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsam.longtail.data import (
    groups_by_count,
    longtail_counts,
    longtail_indices,
    shuffled_by_class,
    subset_hash,
)
from fastsam.longtail.errors import DataError, UsageError

PUBLISHED_CIFAR10 = {
    10: [5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500],
    50: [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100],
    100: [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50],
    200: [5000, 2775, 1540, 854, 474, 263, 146, 81, 45, 25],
}
PUBLISHED_TOTALS = {
    (5000, 10): {10: 20431, 50: 13996, 100: 12406, 200: 11203},
    (500, 100): {10: 19573, 50: 12608, 100: 10847, 200: 9502},
}


@pytest.mark.parametrize("imbalance", PUBLISHED_CIFAR10)
def test_cifar10_counts_are_the_published_ones(imbalance: int) -> None:
    assert longtail_counts(5000, 10, imbalance).tolist() == PUBLISHED_CIFAR10[imbalance]


@pytest.mark.parametrize(("n_max", "classes"), PUBLISHED_TOTALS)
def test_totals_are_the_published_ones(n_max: int, classes: int) -> None:
    totals = PUBLISHED_TOTALS[n_max, classes]
    for imbalance, total in totals.items():
        assert longtail_counts(n_max, classes, imbalance).sum() == total


def test_step_profile_has_two_levels() -> None:
    assert longtail_counts(500, 7, 100, "step").tolist() == [500] * 3 + [5] * 4


@given(
    n_max=st.integers(1, 10**6),
    classes=st.integers(2, 300),
    imbalance=st.floats(1, 1e6),
    kind=st.sampled_from(["exp", "step"]),
)
def test_counts_fall_and_keep_the_factor(
    n_max: int, classes: int, imbalance: float, kind: str
) -> None:
    if imbalance > n_max * (1 - 1e-9):
        return
    counts = longtail_counts(n_max, classes, imbalance, kind)  # type: ignore[arg-type]
    assert counts[0] == n_max
    assert (np.diff(counts) <= 0).all()
    assert counts[-1] in (math.floor(n_max / imbalance), math.ceil(n_max / imbalance))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 10, 10), "n_max"),
        ((10, 1, 10), "classes"),
        ((10, 10, 0.5), "imbalance"),
        ((10, 10, float("nan")), "imbalance"),
        ((10, 10, 100), "imbalance must be at most"),
        ((10, 10, 2, "linear"), "exp, step"),
    ],
)
def test_impossible_profiles_are_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        longtail_counts(*arguments)  # type: ignore[arg-type]


def cao_selection(targets: np.ndarray, counts: list[int]) -> list[int]:
    """Select images as described by Cao et al., with NumPy's global legacy generator."""
    state = np.random.get_state()
    np.random.seed(0)
    chosen: list[int] = []
    for label, count in enumerate(counts):
        index = np.where(targets == label)[0]
        np.random.shuffle(index)
        chosen.extend(index[:count].tolist())
    np.random.set_state(state)
    return chosen


@pytest.mark.parametrize(("per_class", "classes", "imbalance"), [(5000, 10, 100), (500, 100, 50)])
def test_subset_of_seed_0_is_that_of_cao(
    per_class: int, classes: int, imbalance: int, seed: int
) -> None:
    targets = np.random.default_rng(seed).permutation(np.repeat(np.arange(classes), per_class))
    counts = longtail_counts(per_class, classes, imbalance)
    assert longtail_indices(targets, counts).tolist() == cao_selection(targets, counts.tolist())


def test_selection_leaves_the_global_generator_alone() -> None:
    before = np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
    longtail_indices(np.repeat(np.arange(10), 50), longtail_counts(50, 10, 10))
    assert (np.random.get_state()[1] == before).all()  # type: ignore[index]


def test_selection_is_nested_and_exact(seed: int) -> None:
    targets = np.random.default_rng(seed).integers(0, 5, 1000)
    small = longtail_indices(targets, [9, 7, 5, 3, 1], seed=3)
    large = longtail_indices(targets, [19, 17, 15, 13, 11], seed=3)
    assert set(small) < set(large)
    assert np.bincount(targets[small]).tolist() == [9, 7, 5, 3, 1]
    assert set(small) != set(longtail_indices(targets, [9, 7, 5, 3, 1], seed=4))


def test_too_few_images_are_named() -> None:
    with pytest.raises(DataError, match="class 1 must have at least 3 images, got 2"):
        longtail_indices([0, 0, 0, 1, 1], [3, 3])


def test_every_index_is_in_its_class(seed: int) -> None:
    targets = np.random.default_rng(seed).integers(0, 4, 57)
    for label, indices in enumerate(shuffled_by_class(targets, 4, seed=1)):
        assert sorted(indices) == np.flatnonzero(targets == label).tolist()


def test_hash_depends_on_order_and_not_on_byte_order() -> None:
    indices = np.array([3, 1, 2])
    assert subset_hash(indices) == subset_hash(indices.astype(">i8"))
    assert subset_hash(indices) != subset_hash(indices[::-1])


def test_count_groups_at_their_edges() -> None:
    groups = groups_by_count(np.array([101, 100, 20, 19, 1]))
    assert groups == {"head": (0,), "mid": (1, 2), "tail": (3, 4)}
