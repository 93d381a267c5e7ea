"""Groups of classes: head, mid and tail."""

from __future__ import annotations

from collections.abc import Sized

import numpy as np
from numpy.typing import NDArray

from fastsam.longtail.errors import DataError

GROUPS = ("head", "mid", "tail")


def groups_by_rank(num_classes: int, boundaries: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Split classes that are sorted by decreasing count into head, mid and tail, by rank (as in the paper).

    Args:
        num_classes: number of classes C.
        boundaries: first class of mid and first class of tail.

    Example:
        >>> groups_by_rank(10, (3, 7))["tail"]
        (7, 8, 9)
    """
    edges = (0, *boundaries, num_classes)
    return {name: tuple(range(edges[i], edges[i + 1])) for i, name in enumerate(GROUPS)}


def groups_by_count(
    counts: NDArray[np.int64], *, many: int = 100, few: int = 20
) -> dict[str, tuple[int, ...]]:
    """Split classes into head, mid and tail by their number of training images.

    This is the usual rule since Liu et al., "Large-Scale Long-Tailed Recognition in an Open World"
    (CVPR 2019).

    Args:
        counts: training images of each class, int64 ``[C]``.
        many: head classes have more images than this.
        few: tail classes have fewer images than this.

    Example:
        >>> groups_by_count(np.array([500, 100, 20, 19]))
        {'head': (0,), 'mid': (1, 2), 'tail': (3,)}
    """
    head, tail = counts > many, counts < few
    members = {"head": head, "mid": ~(head | tail), "tail": tail}
    return {name: tuple(np.flatnonzero(members[name]).tolist()) for name in GROUPS}


def check_several(classes: Sized, name: str) -> None:
    """Raise :class:`DataError` if a data set has fewer than two classes.

    Args:
        classes: one item for each class.
        name: name of the data set.
    """
    if len(classes) < 2:
        raise DataError(
            f"{name} has {len(classes)} class(es), but at least 2 are required; add classes"
        )


def check_every_class(counts: NDArray[np.int64], where: str) -> None:
    """Raise :class:`DataError` if a class has no image in ``where``."""
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        shown = ", ".join(str(label) for label in empty[:10]) + (", ..." if len(empty) > 10 else "")
        raise DataError(
            f"{len(empty)} of {len(counts)} classes have no image in {where}: {shown}; add images of these "
            "classes or remove the classes"
        )
