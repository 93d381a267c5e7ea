"""What a classifier gets right, class by class and group by group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Metrics:
    """Results on one evaluation set; all shares are in percent.

    Attributes:
        accuracy: share of images that are right.
        balanced: mean over classes of the share that is right; equal to ``accuracy`` on a balanced
            set.
        groups: mean of ``per_class`` over the classes of each group, head, mid and tail.
        per_class: share of each class's images that are right, ``[C]``; NaN for a class without
            any.
        confusion: images of class i taken for class j, ``[C][C]``.
        ece: expected calibration error, 15 equal bins of confidence.
    """

    accuracy: float
    balanced: float
    groups: dict[str, float]
    per_class: list[float]
    confusion: list[list[int]]
    ece: float


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def evaluate(logits: Tensor, targets: Tensor, groups: Mapping[str, tuple[int, ...]]) -> Metrics:
    """Judge logits against the truth.

    Args:
        logits: ``[N, C]``, any floating dtype.
        targets: int64 ``[N]``.
        groups: classes of each group.

    Example:
        >>> import torch
        >>> logits = torch.eye(3)[torch.tensor([0, 0, 2, 2])]
        >>> evaluate(logits, torch.tensor([0, 1, 2, 2]), {"head": (0, 1), "tail": (2,)}).groups
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
        groups={name: _mean(shares[list(members)]) for name, members in groups.items() if members},
        per_class=shares.tolist(),
        confusion=confusion.tolist(),
        ece=100.0 * float(ece),
    )
