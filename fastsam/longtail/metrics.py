"""Metrics of a classifier on an evaluation set: overall, by class and by group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastsam.longtail.data import groups_by_count
from fastsam.longtail.predictions import Predictions
from fastsam.longtail.scores import ConfidenceBin, Floats, Scorer, harmonic_mean, mean


@dataclass(frozen=True)
class Metrics:
    """Metrics on one evaluation set. All except ``nll`` are in percent.

    Attributes:
        accuracy: share of images classified correctly.
        balanced: mean of ``per_class`` over the classes with images; equal to ``accuracy`` on a balanced set.
        groups: mean of ``per_class`` over the classes of each group: head, mid and tail.
        groups_by_count: mean of ``per_class`` over classes with >100, 20 to 100, and <20 training images,
            the usual definition of head, mid and tail.
        per_class: accuracy of each class, ``[C]``; NaN for a class without images.
        confusion: the nonzero entries of the confusion matrix, ``[i, j, n]`` where n images of class i were
            classified as class j. With thousands of classes most entries are zero.
        ece: expected calibration error, with 15 equal-width bins of confidence.
        top5: share of images whose class is among the five most probable. ``top5``, ``macro_f1`` and ``nll``
            are None in results of older versions.
        macro_f1: mean over classes of the F1 score.
        nll: mean negative log-probability of the true class, in nats.
        bins: the bins of confidence behind ``ece`` that have images; None in results of older versions.
    """

    accuracy: float
    balanced: float
    groups: dict[str, float]
    groups_by_count: dict[str, float]
    per_class: list[float]
    confusion: list[list[int]]
    ece: float
    top5: float | None = None
    macro_f1: float | None = None
    nll: float | None = None
    bins: list[ConfidenceBin] | None = None

    @property
    def harmonic_mean(self) -> float:
        """Harmonic mean of ``per_class``; a single class with low accuracy makes it small."""
        return harmonic_mean(np.array(self.per_class, dtype=np.float64))

    @property
    def worst_class(self) -> float:
        """Smallest of ``per_class``."""
        return float(np.nanmin(np.array(self.per_class, dtype=np.float64)))

    def group_accuracy(self, name: str) -> float:
        """Return the accuracy on ``all`` images, ``balanced`` or of a group; NaN for an unknown group."""
        known = {"all": self.accuracy, "balanced": self.balanced, **self.groups}
        return known.get(name, float("nan"))

    @property
    def images(self) -> int:
        """Number of images that were evaluated."""
        return sum(images for _, _, images in self.confusion)

    def confusion_matrix(self) -> NDArray[np.int64]:
        """Return the confusion matrix, int64 ``[C, C]``: [i, j] counts images of class i predicted as j."""
        matrix = np.zeros((len(self.per_class),) * 2, dtype=np.int64)
        for true, taken, images in self.confusion:
            matrix[true, taken] = images
        return matrix


def evaluate(
    predictions: Predictions,
    groups: Mapping[str, tuple[int, ...]],
    counts: NDArray[np.int64],
    *,
    prior: Floats | None = None,
) -> Metrics:
    """Compute the metrics of predictions.

    Args:
        predictions: the predictions for N images.
        groups: classes of each group.
        counts: training images of each class, ``[C]``, for ``groups_by_count``.
        prior: share of each class in the test distribution, ``[C]``; None for the shares of the images.
            :meth:`fastsam.longtail.scores.Scorer.scores` lists the metrics that depend on it.

    Example:
        >>> import torch
        >>> logits = torch.eye(3)[torch.tensor([0, 0, 2, 2])]
        >>> predictions = Predictions.of(logits, torch.tensor([0, 1, 2, 2]))
        >>> groups = {"head": (0, 1), "tail": (2,)}
        >>> evaluate(predictions, groups, np.array([200, 50, 3])).groups
        {'head': 50.0, 'tail': 100.0}
    """
    scorer = Scorer(predictions, len(counts), groups, prior)
    scores, shares = scorer.scores(), scorer.shares()
    pairs = (predictions.targets * len(counts) + predictions.classes).cpu().numpy()
    occurring, images = np.unique(pairs, return_counts=True)
    true, taken = np.divmod(occurring, len(counts))
    return Metrics(
        accuracy=scores["accuracy"],
        balanced=scores["balanced"],
        groups={name: scores[name] for name, members in groups.items() if members},
        groups_by_count={
            name: mean(shares[list(members)])
            for name, members in groups_by_count(counts).items()
            if members
        },
        per_class=shares.tolist(),
        confusion=np.stack([true, taken, images], axis=1).tolist(),
        ece=scores["ece"],
        top5=scores["top5"],
        macro_f1=scores["macro_f1"],
        nll=scores["nll"],
        bins=scorer.bins(),
    )
