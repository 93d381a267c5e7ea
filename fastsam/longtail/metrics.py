"""What a classifier gets right, class by class and group by group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastsam.longtail.data import groups_by_count


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
        confusion: images of class i taken for class j, ``[C][C]``.
        ece: expected calibration error, 15 equal bins of confidence.
    """

    accuracy: float
    balanced: float
    groups: dict[str, float]
    groups_by_count: dict[str, float]
    per_class: list[float]
    confusion: list[list[int]]
    ece: float


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _group_means(
    shares: NDArray[np.float64], groups: Mapping[str, tuple[int, ...]]
) -> dict[str, float]:
    """Mean over the classes of each group that has any."""
    return {name: _mean(shares[list(members)]) for name, members in groups.items() if members}


def evaluate(
    logits: Tensor,
    targets: Tensor,
    groups: Mapping[str, tuple[int, ...]],
    counts: NDArray[np.int64],
) -> Metrics:
    """Judge logits against the truth.

    Args:
        logits: ``[N, C]``, any floating dtype.
        targets: int64 ``[N]``.
        groups: classes of each group.
        counts: training images of each class, ``[C]``, for the groups by count.

    Example:
        >>> import torch
        >>> logits = torch.eye(3)[torch.tensor([0, 0, 2, 2])]
        >>> truth, groups = torch.tensor([0, 1, 2, 2]), {"head": (0, 1), "tail": (2,)}
        >>> evaluate(logits, truth, groups, np.array([200, 50, 3])).groups
        {'head': 50.0, 'tail': 100.0}
    """
    from torchmetrics.functional.classification import multiclass_calibration_error

    classes = logits.shape[1]
    pairs = targets.cpu().numpy() * classes + logits.argmax(dim=1).cpu().numpy()
    confusion = np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
    ece = multiclass_calibration_error(logits.float().softmax(dim=1), targets, classes, n_bins=15)
    totals = confusion.sum(axis=1)
    right = np.diagonal(confusion)
    shares = np.where(totals > 0, 100.0 * right / np.maximum(totals, 1), np.nan)
    return Metrics(
        accuracy=100.0 * float(right.sum()) / len(targets),
        balanced=_mean(shares),
        groups=_group_means(shares, groups),
        groups_by_count=_group_means(shares, groups_by_count(counts)),
        per_class=shares.tolist(),
        confusion=confusion.tolist(),
        ece=100.0 * float(ece),
    )
