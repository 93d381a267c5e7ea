"""Judge heads on collected features: accuracy, likelihood, and the temperature that fits best."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastsam.longtail.errors import TrainingError
from fastsam.longtail.features import Features

_LOGITS = 1 << 22
"""Logits in memory at the same time; those of thousands of classes are not kept whole."""
_STEPS = 200
_PRECISION = 1e-12
"""Relative error of the temperature where the search ends."""


class Fit(NamedTuple):
    """A temperature and what it gives.

    Attributes:
        temperature: minimizes ``nll``; None where no finite temperature does, and 1 is used.
        nll: mean negative log-likelihood of the true classes at that temperature.
    """

    temperature: float | None
    nll: float


@dataclass(frozen=True, eq=False)
class HeadScores:
    """Judges heads on the features of N images of C classes.

    Attributes:
        features: the features.
        classes: number of classes C.
        device: where the heads are.
    """

    features: Features
    classes: int
    device: torch.device

    @torch.no_grad()
    def balanced_accuracy(self, head: nn.Module) -> float:
        """Mean over the classes with images of the percentage that is right.

        Raises:
            TrainingError: a logit is infinite or NaN.
        """
        right = torch.zeros(self.classes, dtype=torch.int64)
        for logits, targets in self._logits(head):
            hits = targets[logits.argmax(dim=1) == targets]
            right += torch.bincount(hits, minlength=self.classes).cpu()
        images = torch.bincount(self.features.targets, minlength=self.classes)
        shares = 100.0 * right.double() / images
        return float(shares[images > 0].mean())

    @torch.no_grad()
    def fit_temperature(self, head: nn.Module) -> Fit:
        """The temperature T whose ``softmax(logits / T)`` has the smallest negative log-likelihood.

        In ``1 / T`` the negative log-likelihood is convex (a mean of log-sum-exps minus linear terms), so
        Newton's method between two bounds finds its only minimum; all sums are in float64. There is no
        finite minimum where every image is right, or where the true class has no larger logit, in the
        mean, than the others: the temperature is None then.

        Raises:
            TrainingError: a logit is infinite or NaN.
        """
        if not self._has_minimum(head):
            return Fit(None, self._slopes(head, 1.0)[0])
        low, high, place = -math.inf, math.inf, 0.0  # of the logarithm of 1 / T
        for _ in range(_STEPS):
            inverse = math.exp(place)
            _, slope, curvature = self._slopes(head, inverse)
            if slope == 0:
                break
            low, high = (place, high) if slope < 0 else (low, place)
            divisor = curvature * inverse
            step = -slope / divisor if divisor > 0 else math.inf
            # Far from the minimum the logarithm of the curvature misleads: a factor of 8 at most.
            step = math.copysign(min(abs(step), math.log(8)), -slope)
            following = place + step
            if not low < following < high and abs(step) >= _PRECISION:
                following = (low + high) / 2
            if abs(following - place) < _PRECISION:
                break
            place = following
        return Fit(math.exp(-place), self._slopes(head, math.exp(place))[0])

    def _logits(self, head: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits ``[B, C]`` and classes of chunk after chunk."""
        for chunk in self.features.chunks(max(1, _LOGITS // self.classes), self.device):
            logits: Tensor = head(chunk.values)
            if not logits.isfinite().all():
                raise TrainingError(
                    "logits of a calibrated head are infinite or NaN; choose another calibrator, or train "
                    "again with a lower learning rate"
                )
            yield logits, chunk.targets

    def _margins(self, head: nn.Module) -> Iterator[Tensor]:
        """Logits minus that of the true class, float64 ``[B, C]``, of chunk after chunk."""
        for logits, targets in self._logits(head):
            logits = logits.double()
            yield logits - logits.gather(1, targets[:, None])

    def _has_minimum(self, head: nn.Module) -> bool:
        """Whether the slope has both signs between 1 / T = 0 and infinity."""
        first = last = 0.0
        for margins in self._margins(head):
            first += float(margins.mean(dim=1).sum())
            last += float(margins.amax(dim=1).sum())
        return first < 0 < last

    def _slopes(self, head: nn.Module, inverse: float) -> tuple[float, float, float]:
        """Mean negative log-likelihood at ``1 / T = inverse``, with two derivatives by ``1 / T``."""
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)
        for margins in self._margins(head):
            log_sums = (inverse * margins).logsumexp(dim=1)
            shares = (inverse * margins - log_sums[:, None]).exp()
            means = (shares * margins).sum(dim=1)
            spreads = (shares * (margins - means[:, None]).square()).sum(dim=1)
            totals += torch.stack([log_sums.sum(), means.sum(), spreads.sum()])
        nll, slope, curvature = (totals / len(self.features)).tolist()
        return nll, slope, curvature
