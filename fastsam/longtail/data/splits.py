"""Split of labeled images into training, validation and test, stratified by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastsam.longtail.data.batch import occurrences
from fastsam.longtail.data.subset import longtail_counts, longtail_indices
from fastsam.longtail.errors import DataError, UsageError


class HeldOut(NamedTuple):
    """Indices of the images of each part, int64, ascending."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]


def hold_out(
    targets: NDArray[np.int64],
    *,
    test: float,
    validation: float,
    seed: int,
    groups: NDArray[np.int64] | None = None,
) -> HeldOut:
    """Choose test and validation images of each class.

    Of n images of a class, ``round(share * n)`` are held out for a part, but at least one, and at least one
    stays in training. The only image of a class stays in training; of two images, one is for the test. Groups
    stay together: each is added to a part if this brings the counts of its classes closer to these numbers.
    Then a class that has no image in the part yet gives its smallest group, if its classes keep training
    images.

    Args:
        targets: classes, int64 ``[N]``.
        test: share of the test images, from 0 to below 1.
        validation: share of the validation images.
        seed: seed of NumPy's legacy generator.
        groups: group of each image, integers from 0, ``[N]``; None for no groups.

    Example:
        >>> parts = hold_out(np.array([0] * 8 + [1]), test=0.25, validation=0.1, seed=0)
        >>> [len(part) for part in parts]
        [6, 1, 2]
    """
    counts = np.bincount(targets)
    wanted_test = _wanted(test, counts, counts - 1)
    wanted_validation = _wanted(validation, counts, counts - 1 - wanted_test)
    generator = np.random.RandomState(seed)
    part = np.zeros(len(targets), np.int64)  # 0 training, 1 validation, 2 test
    if groups is None:
        order = generator.permutation(len(targets))
        ranks = np.empty(len(targets), np.int64)
        ranks[order] = occurrences(targets[order])
        part[ranks < (wanted_test + wanted_validation)[targets]] = 1
        part[ranks < wanted_test[targets]] = 2
    else:
        order = generator.permutation(int(groups.max(initial=-1)) + 1)
        chosen = _Groups(_members(targets, groups), order.tolist(), counts)
        for number, wanted in ((2, wanted_test), (1, wanted_validation)):
            chosen.hold_out(number, wanted)
        part = chosen.part[groups]
    return HeldOut(*(np.flatnonzero(part == number) for number in range(3)))


def _wanted(share: float, counts: NDArray[np.int64], most: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the number of images of each class to hold out: at least one, at most ``most``."""
    if share == 0:
        return np.zeros_like(counts)
    rounded = np.floor(share * counts + 0.5).astype(np.int64)
    wanted: NDArray[np.int64] = np.minimum(np.maximum(rounded, 1), np.maximum(most, 0))
    return wanted


class _Groups:
    """Assigns whole groups to parts.

    Args:
        members: classes of each group, and the number of images of each of them.
        order: groups in random order.
        counts: images of each class, int64 ``[C]``.
    """

    def __init__(
        self,
        members: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
        order: Sequence[int],
        counts: NDArray[np.int64],
    ) -> None:
        self.members = members
        self.order = order
        self.left = counts.copy()
        self.part = np.zeros(len(members), np.int64)

    def hold_out(self, number: int, wanted: NDArray[np.int64]) -> None:
        """Choose the groups of a part.

        Args:
            number: number of the part.
            wanted: images of each class to hold out, int64 ``[C]``.
        """
        held = np.zeros_like(wanted)
        for group in filter(self._free, self.order):
            classes, sizes = self.members[group]
            missing = held[classes] - wanted[classes]
            change = sizes * (sizes + 2 * missing) / np.maximum(wanted[classes], 1)
            if change.sum() < 0:
                self._take(group, number, held)
        # A class of few large groups would have no image: each group overshoots its share.
        for label in np.flatnonzero(wanted):
            having = [group for group in self.order if label in self.members[group][0]]
            free = list(filter(self._free, having))
            if held[label] == 0 and free:
                smallest = min(free, key=lambda group: int(self.members[group][1].sum()))
                self._take(smallest, number, held)

    def _free(self, group: int) -> bool:
        """Return whether a group is in training, and its classes keep training images without it."""
        classes, sizes = self.members[group]
        return not self.part[group] and bool((self.left[classes] - sizes >= 1).all())

    def _take(self, group: int, number: int, held: NDArray[np.int64]) -> None:
        classes, sizes = self.members[group]
        self.part[group] = number
        held[classes] += sizes
        self.left[classes] -= sizes


def _members(
    targets: NDArray[np.int64], groups: NDArray[np.int64]
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Return the classes of each group, and the number of images of each of them."""
    by_group = np.argsort(groups, kind="stable")
    cuts = np.flatnonzero(np.diff(groups[by_group])) + 1
    found = (np.unique(targets[places], return_counts=True) for places in np.split(by_group, cuts))
    return [(classes, sizes.astype(np.int64)) for classes, sizes in found]


def check_groups(groups: Mapping[str, NDArray[np.object_]], column: str) -> None:
    """Raise :class:`DataError` if a group has images in several given parts.

    Args:
        groups: group of each image of each part.
        column: name of the column, for the message.
    """
    seen: dict[object, str] = {}
    for part, names in groups.items():
        for name in dict.fromkeys(names.tolist()):
            if seen.setdefault(name, part) != part:
                raise DataError(
                    f"group {name!r} of column {column!r} has images in {seen[name]} and in {part}, so the "
                    f"{part} part would not be independent; move its images to one part, or omit "
                    "--group-column"
                )


def cut_to_imbalance(targets: NDArray[np.int64], imbalance: float, seed: int) -> NDArray[np.int64]:
    """Choose images for an exponential long tail, with as many images as possible.

    The classes keep their order by size; ties keep the order of the labels.

    Args:
        targets: classes, int64 ``[N]``. Every class has an image, and there are at least two classes.
        imbalance: size of the largest class divided by the size of the smallest.
        seed: seed of NumPy's legacy generator.

    Returns:
        Indices of the chosen images, int64, ascending.

    Raises:
        UsageError: if the smallest class would have no image.
    """
    available = np.bincount(targets)
    order = np.argsort(-available, kind="stable")
    ranked = available[order]
    ratios = imbalance ** (np.arange(len(ranked)) / (len(ranked) - 1.0))
    largest = int(min(ranked[0], ((ranked + 1) * ratios).min()))
    while True:
        if largest < imbalance:
            raise UsageError(
                f"cut_imbalance {imbalance:g} would leave the smallest class without images, because the "
                f"classes have {ranked[-1]} to {ranked[0]} training images; lower it"
            )
        counts = longtail_counts(largest, len(ranked), imbalance)
        if (counts <= ranked).all():
            break
        largest -= 1
    ranks = np.argsort(order)
    return np.sort(longtail_indices(ranks[targets], counts, seed))
