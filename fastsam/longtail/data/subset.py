"""Selection of the images of a long-tailed training set.

Counts and selection are those of Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware
Margin Loss" (NeurIPS 2019), whose CIFAR-LT subsets later papers use.
"""

from __future__ import annotations

import hashlib
import math
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastsam.longtail.errors import DataError, UsageError, unknown

ImbalanceKind = Literal["exp", "step"]
IMBALANCE_KINDS: tuple[ImbalanceKind, ...] = ("exp", "step")


def longtail_counts(
    n_max: int, num_classes: int, imbalance: float, kind: ImbalanceKind = "exp"
) -> NDArray[np.int64]:
    """Compute the images per class of a long-tailed data set, largest class first.

    ``exp``: ``n_c = int(n_max * f^(c / (C - 1)))`` with ``f = 1 / imbalance``. ``step``: the first half of
    the classes has ``n_max`` images, the others have ``int(n_max * f)`` (Cao et al. 2019, section 4.1).

    Args:
        n_max: images of the largest class.
        num_classes: number of classes C, at least 2.
        imbalance: imbalance factor, at least 1: size of the largest class divided by size of the smallest.
        kind: profile, ``exp`` or ``step``.

    Returns:
        Counts, int64 ``[C]``, each at least 1.

    Raises:
        UsageError: if a value is out of range, or a class would have no image.

    Example:
        >>> longtail_counts(5000, 10, 100).tolist()
        [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    """
    if n_max < 1:
        raise UsageError(f"n_max must be at least 1, got {n_max}")
    if num_classes < 2:
        raise UsageError(f"num_classes must be at least 2, got {num_classes}")
    if not (math.isfinite(imbalance) and imbalance >= 1):
        raise UsageError(f"imbalance must be finite and at least 1, got {imbalance}")
    fraction = 1.0 / imbalance
    if kind == "exp":
        counts = [int(n_max * fraction ** (c / (num_classes - 1.0))) for c in range(num_classes)]
    elif kind == "step":
        half = num_classes // 2
        counts = [n_max] * half + [int(n_max * fraction)] * (num_classes - half)
    else:
        raise unknown("kind of imbalance", kind, IMBALANCE_KINDS)
    if counts[-1] < 1:
        raise UsageError(
            f"imbalance must be at most {n_max}, the images of the largest class, or the smallest class "
            f"would have none; got {imbalance:g}"
        )
    return np.array(counts, dtype=np.int64)


def shuffled_by_class(
    targets: ArrayLike, num_classes: int, seed: int = 0
) -> list[NDArray[np.int64]]:
    """Shuffle the indices of each class, as in the code of Cao et al.

    Classes are shuffled in ascending order by NumPy's legacy generator. The global generator is not changed.

    Args:
        targets: class of every image, integers ``[N]``.
        num_classes: number of classes C.
        seed: seed of the legacy generator; 0 in all published CIFAR-LT results.

    Returns:
        For each class, its shuffled indices into ``targets``, int64.
    """
    labels = np.asarray(targets)
    generator = np.random.RandomState(seed)
    order = []
    for label in range(num_classes):
        indices = np.where(labels == label)[0]
        generator.shuffle(indices)
        order.append(indices.astype(np.int64))
    return order


def longtail_indices(targets: ArrayLike, counts: ArrayLike, seed: int = 0) -> NDArray[np.int64]:
    """Select the images of a long-tailed subset, class by class.

    With seed 0 the indices are equal to the subset of Cao et al. 2019.

    Args:
        targets: class of every image of the balanced set, integers ``[N]``.
        counts: number of images to select of each class, integers ``[C]``; see :func:`longtail_counts`.
        seed: seed of the selection (not of the training).

    Returns:
        Indices into ``targets``, int64 ``[sum(counts)]``.

    Raises:
        DataError: if a class has fewer images than requested.

    Example:
        >>> longtail_indices([0, 1, 0, 1, 0], [2, 1]).tolist()
        [4, 2, 1]
    """
    wanted = np.asarray(counts)
    order = shuffled_by_class(targets, len(wanted), seed)
    for label, (indices, count) in enumerate(zip(order, wanted, strict=True)):
        if len(indices) < count:
            raise DataError(
                f"class {label} must have at least {count} images, got {len(indices)}; lower n_max"
            )
    return np.concatenate([indices[:count] for indices, count in zip(order, wanted, strict=True)])


def subset_hash(indices: NDArray[np.int64]) -> str:
    """Return the SHA-256 of a selection, which identifies runs on the same images.

    Args:
        indices: the selected indices in order, int64 ``[n]``.

    Returns:
        64 hexadecimal digits, which do not depend on the byte order of the machine.
    """
    return hashlib.sha256(np.ascontiguousarray(indices, dtype="<i8").tobytes()).hexdigest()
