"""Scores of heads on features: balanced accuracy, likelihood and the best temperature."""

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
"""Number of logits in memory at a time: with thousands of classes they are computed in chunks."""
_STEPS = 200
_PRECISION = 1e-12
"""Relative error of the temperature at which the search stops."""


class Fit(NamedTuple):
    """A fitted temperature and its likelihood.

    Attributes:
        temperature: temperature that minimizes ``nll``; None if no finite temperature does, and 1 is used.
        nll: mean negative log-likelihood of the true classes at this temperature, in nats.
    """

    temperature: float | None
    nll: float


@dataclass(frozen=True, eq=False)
class HeadScores:
    """Computes scores of heads on the features of N images of C classes.

    Attributes:
        features: the features.
        classes: number of classes C.
        device: device of the heads.
    """

    features: Features
    classes: int
    device: torch.device

    @torch.no_grad()
    def balanced_accuracy(self, head: nn.Module) -> float:
        """Compute the balanced accuracy in percent: the mean over classes that have images.

        Raises:
            TrainingError: if a logit is infinite or NaN.
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
        """Fit the temperature T that minimizes the negative log-likelihood of ``softmax(logits / T)``.

        As a function of ``1 / T`` the negative log-likelihood is convex (a mean of log-sum-exps minus linear
        terms), so Newton's method with a bracket finds its only minimum. All sums are in float64. There is no
        finite minimum if every image is classified correctly, or if on average the logit of the true class is
        not larger than the mean logit. The temperature is then None.

        Raises:
            TrainingError: if a logit is infinite or NaN.
        """
        if not self._has_minimum(head):
            return Fit(None, self._slopes(head, 1.0)[0])
        low, high, place = -math.inf, math.inf, 0.0  # bracket and iterate of log(1 / T)
        for _ in range(_STEPS):
            inverse = math.exp(place)
            _, slope, curvature = self._slopes(head, inverse)
            if slope == 0:
                break
            low, high = (place, high) if slope < 0 else (low, place)
            divisor = curvature * inverse
            step = -slope / divisor if divisor > 0 else math.inf
            # Far from the minimum the quadratic model is poor, so a step changes 1 / T by at most 8x.
            step = math.copysign(min(abs(step), math.log(8)), -slope)
            following = place + step
            if not low < following < high and abs(step) >= _PRECISION:
                following = (low + high) / 2
            if abs(following - place) < _PRECISION:
                break
            place = following
        return Fit(math.exp(-place), self._slopes(head, math.exp(place))[0])

    def _logits(self, head: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over logits ``[B, C]`` and true classes ``[B]`` in chunks."""
        for chunk in self.features.chunks(max(1, _LOGITS // self.classes), self.device):
            logits: Tensor = head(chunk.values)
            if not logits.isfinite().all():
                raise TrainingError(
                    "logits of a calibrated head are infinite or NaN; choose another calibrator or train "
                    "again with a lower learning rate"
                )
            yield logits, chunk.targets

    def _margins(self, head: nn.Module) -> Iterator[Tensor]:
        """Iterate in chunks over logits minus the logit of the true class, float64 ``[B, C]``."""
        for logits, targets in self._logits(head):
            logits = logits.double()
            yield logits - logits.gather(1, targets[:, None])

    def _has_minimum(self, head: nn.Module) -> bool:
        """Return whether the derivative by 1 / T is negative at 0 and positive at infinity."""
        first = last = 0.0
        for margins in self._margins(head):
            first += float(margins.mean(dim=1).sum())
            last += float(margins.amax(dim=1).sum())
        return first < 0 < last

    def _slopes(self, head: nn.Module, inverse: float) -> tuple[float, float, float]:
        """Compute the mean negative log-likelihood at ``1 / T = inverse`` and its two derivatives there."""
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)
        for margins in self._margins(head):
            log_sums = (inverse * margins).logsumexp(dim=1)
            shares = (inverse * margins - log_sums[:, None]).exp()
            means = (shares * margins).sum(dim=1)
            spreads = (shares * (margins - means[:, None]).square()).sum(dim=1)
            totals += torch.stack([log_sums.sum(), means.sum(), spreads.sum()])
        nll, slope, curvature = (totals / len(self.features)).tolist()
        return nll, slope, curvature
