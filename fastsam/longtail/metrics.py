"""What a classifier gets right, class by class and group by group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastsam.extras import requires_extra
from fastsam.longtail.data import groups_by_count
from fastsam.longtail.predictions import Predictions


@dataclass(frozen=True)
class Metrics:
    """Results on one evaluation set; all shares are in percent.

    Attributes:
        accuracy: share of images that are right.
        balanced: mean over classes of the share that is right; equal to ``accuracy`` on a balanced
            set.
        groups: mean of ``per_class`` over the classes of each group, head, mid and tail.
        groups_by_count: the same with the usual rule of >100, 20 to 100 and <20 training images.
        per_class: share of each class's images that are right, ``[C]``; NaN for a class without
            any.
        confusion: ``[i, j, n]`` for every two classes where n > 0 images of class i were taken for
            class j, right answers included: of thousands of classes most pairs do not occur.
        ece: expected calibration error, 15 equal bins of confidence.
    """

    accuracy: float
    balanced: float
    groups: dict[str, float]
    groups_by_count: dict[str, float]
    per_class: list[float]
    confusion: list[list[int]]
    ece: float

    @property
    def images(self) -> int:
        """Number of images that were judged."""
        return sum(images for _, _, images in self.confusion)

    def confusion_matrix(self) -> NDArray[np.int64]:
        """Images of class i taken for class j, int64 ``[C, C]``."""
        matrix = np.zeros((len(self.per_class),) * 2, dtype=np.int64)
        for true, taken, images in self.confusion:
            matrix[true, taken] = images
        return matrix


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _group_means(
    shares: NDArray[np.float64], groups: Mapping[str, tuple[int, ...]]
) -> dict[str, float]:
    """Mean over the classes of each group that has any."""
    return {name: _mean(shares[list(members)]) for name, members in groups.items() if members}


def evaluate(
    predictions: Predictions,
    groups: Mapping[str, tuple[int, ...]],
    counts: NDArray[np.int64],
) -> Metrics:
    """Judge predictions against the truth.

    Args:
        predictions: what a network says of N images.
        groups: classes of each group.
        counts: training images of each class, ``[C]``, for the groups by count.

    Example:
        >>> import torch
        >>> logits = torch.eye(3)[torch.tensor([0, 0, 2, 2])]
        >>> predictions = Predictions.of(logits, torch.tensor([0, 1, 2, 2]))
        >>> groups = {"head": (0, 1), "tail": (2,)}
        >>> evaluate(predictions, groups, np.array([200, 50, 3])).groups
        {'head': 50.0, 'tail': 100.0}
    """
    with requires_extra("longtail", "the calibration error"):
        from torchmetrics.functional.classification import binary_calibration_error

    classes = len(counts)
    pairs = (predictions.targets * classes + predictions.classes).cpu().numpy()
    occurring, images = np.unique(pairs, return_counts=True)
    true, taken = np.divmod(occurring, classes)
    totals = np.bincount(true, weights=images, minlength=classes)
    right = np.bincount(true, weights=images * (true == taken), minlength=classes)
    shares = np.where(totals > 0, 100.0 * right / np.maximum(totals, 1), np.nan)
    # Whether the most probable class is right is a question of yes or no.
    ece = binary_calibration_error(predictions.confidence, predictions.right.long(), n_bins=15)
    return Metrics(
        accuracy=predictions.accuracy,
        balanced=_mean(shares),
        groups=_group_means(shares, groups),
        groups_by_count=_group_means(shares, groups_by_count(counts)),
        per_class=shares.tolist(),
        confusion=np.stack([true, taken, images], axis=1).tolist(),
        ece=100.0 * float(ece),
    )
