"""Scores of a classifier, and their bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastsam.longtail.predictions import Predictions

BINS = 15
"""Number of equal-width confidence bins of the calibration error."""
TOP = 5

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class ConfidenceBin:
    """The images whose confidence lies in one bin; all numbers are in percent.

    Attributes:
        share: share of all images.
        confidence: their mean confidence.
        accuracy: share of them that are right.
    """

    share: float
    confidence: float
    accuracy: float


@dataclass(frozen=True, eq=False)
class Scorer:
    """Computes scores of predictions, with a weight for each image.

    Attributes:
        predictions: the predictions for N images.
        num_classes: number of classes C.
        groups: classes of head, mid and tail.
        prior: share of each class in the test distribution, ``[C]``; None for the shares of the images. An
            image of class c has weight ``prior[c] / n_c``, where n_c is the number of images of class c.
    """

    predictions: Predictions
    num_classes: int
    groups: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    prior: Floats | None = None

    @cached_property
    def targets(self) -> Ints:
        """True classes, int64 ``[N]``."""
        return _integers(self.predictions.targets)

    @cached_property
    def images(self) -> Ints:
        """Number of images of each class, int64 ``[C]``."""
        return np.bincount(self.targets, minlength=self.num_classes).astype(np.int64)

    def scores(self, times: Floats | None = None) -> dict[str, float]:
        """Return every score by name, in percent except for ``nll`` (nats); NaN if no image counts.

        ``accuracy``, ``top5``, ``nll``, ``ece`` and ``macro_f1`` depend on the prior. ``balanced``, the
        groups, ``harmonic_mean`` and ``worst_class`` are computed from the accuracy of each class, which does
        not. ``macro_f1`` is a mean over the classes that have images.

        Args:
            times: how often each image is counted, ``[N]``; None for once each.
        """
        shares = self.shares(times)
        weights = self._weights(times)
        total = weights.sum()
        by_class = self._sum_by_class(self._right * weights)
        taken = np.bincount(self._classes, weights=weights, minlength=self.num_classes)
        true = self._sum_by_class(weights)
        known = self.images > 0
        f1 = 2 * by_class[known] / np.maximum(true + taken, np.finfo(float).tiny)[known]
        return {
            "accuracy": 100.0 * float(by_class.sum() / total),
            "balanced": mean(shares),
            **{
                name: mean(shares[list(members)])
                for name, members in self.groups.items()
                if members
            },
            "harmonic_mean": harmonic_mean(shares),
            "worst_class": float(np.nanmin(shares)),
            "top5": 100.0 * float(weights @ self._in_top / total),
            "macro_f1": 100.0 * float(f1.mean()),
            "nll": float(weights @ self._nll / total),
            "ece": 100.0 * self._calibration_error(weights / total),
        }

    def shares(self, times: Floats | None = None) -> Floats:
        """Return the accuracy of each class in percent, float64 ``[C]``; NaN for a class without images."""
        times = np.ones(len(self.targets)) if times is None else times
        images = self._sum_by_class(times)
        right = self._sum_by_class(self._right * times)
        return np.where(images > 0, 100.0 * right / np.maximum(images, 1e-300), np.nan)

    def bins(self) -> list[ConfidenceBin]:
        """Return the bins of the calibration error that have images; they follow the prior."""
        weights = self._weights(None)
        shares, confidence, right = (
            np.bincount(self._bins, weights=weights * values / weights.sum(), minlength=BINS)
            for values in (1.0, self._confidence, self._right)
        )
        return [
            ConfidenceBin(*(100.0 * float(x) for x in (share, sure / share, true / share)))
            for share, sure, true in zip(shares, confidence, right, strict=True)
            if share > 0
        ]

    def _weights(self, times: Floats | None) -> Floats:
        """Return the weight of each image, ``[N]``."""
        weights = np.ones(len(self.targets)) if times is None else times
        if self.prior is None:
            return weights
        return weights * (self.prior / np.maximum(self.images, 1))[self.targets]

    def _calibration_error(self, weights: Floats) -> float:
        """Compute the expected calibration error as a fraction; ``weights`` must sum to 1."""
        gaps = np.bincount(
            self._bins, weights=weights * (self._right - self._confidence), minlength=BINS
        )
        return float(np.abs(gaps).sum())

    def _sum_by_class(self, values: Floats) -> Floats:
        sums = np.bincount(self.targets, weights=values, minlength=self.num_classes)
        return sums.astype(np.float64, copy=False)

    @cached_property
    def _classes(self) -> Ints:
        return _integers(self.predictions.classes)

    @cached_property
    def _right(self) -> Floats:
        return np.where(self._classes == self.targets, 1.0, 0.0)

    @cached_property
    def _in_top(self) -> Floats:
        return np.where(_integers(self.predictions.rank) < TOP, 1.0, 0.0)

    @cached_property
    def _nll(self) -> Floats:
        return _floats(self.predictions.nll)

    @cached_property
    def _confidence(self) -> Floats:
        return _floats(self.predictions.confidence)

    @cached_property
    def _bins(self) -> Ints:
        return np.minimum((self._confidence * BINS).astype(np.int64), BINS - 1)


def _integers(values: Tensor) -> Ints:
    return np.asarray(values.cpu().numpy(), dtype=np.int64)


def _floats(values: Tensor) -> Floats:
    return np.asarray(values.cpu().numpy(), dtype=np.float64)


def mean(values: Floats) -> float:
    """Return the mean of the values that are not NaN; NaN if there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def harmonic_mean(shares: Floats) -> float:
    """Return the harmonic mean of the shares that are not NaN; 0 if one of them is 0."""
    known = shares[~np.isnan(shares)]
    if len(known) == 0 or (known == 0).any():
        return 0.0 if len(known) else float("nan")
    return float(len(known) / (1 / known).sum())


def intervals(
    scorer: Scorer, *, samples: int = 1000, level: float = 0.95, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Return a percentile bootstrap interval of every score.

    Each bootstrap sample resamples the images of every class with replacement, so the number of images per
    class is fixed. The intervals cover the choice of test images only; runs with other seeds vary more.

    Args:
        scorer: the predictions.
        samples: number of bootstrap samples, at least 1.
        level: confidence level of the intervals.
        seed: seed of the resampling.
    """
    generator = np.random.default_rng(seed)
    order = np.argsort(scorer.targets, kind="stable")
    images = scorer.images
    first = (np.cumsum(images) - images)[scorer.targets[order]]
    count = images[scorer.targets[order]]
    drawn: dict[str, list[float]] = {}
    for _ in range(samples):
        chosen = order[first + (generator.random(len(order)) * count).astype(np.int64)]
        times = np.bincount(chosen, minlength=len(order)).astype(np.float64)
        for name, value in scorer.scores(times).items():
            drawn.setdefault(name, []).append(value)
    edges = (1 - level) / 2, (1 + level) / 2
    found = {name: np.quantile(values, edges) for name, values in drawn.items()}
    return {name: (float(low), float(high)) for name, (low, high) in found.items()}
