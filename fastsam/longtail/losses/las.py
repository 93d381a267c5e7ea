"""Label-aware smoothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fastsam.longtail.classes import checked_counts
from fastsam.longtail.errors import UsageError, unknown
from fastsam.longtail.losses.base import LongTailLoss, Loss, Mean, register_loss
from fastsam.longtail.settings import Entry, Settings, setting

Shape = Literal["concave", "linear", "convex"]


class LabelAwareSmoothingLoss(LongTailLoss):
    """Label-aware smoothing: cross-entropy whose label smoothing grows with the size of the class.

    Zhong et al., "Improving Calibration for Long-Tailed Recognition" (CVPR 2021). With
    ``t = (n_y - n_min) / (n_max - n_min)`` a sample of class y has the smoothing ``tail + (head - tail)
    g(t)``, where g is ``sin(t pi / 2)`` (concave), ``t`` (linear) or ``1 + sin((3 + t) pi / 2)`` (convex).
    As in the authors' code, the smoothed part is spread over all C classes. If all classes have the same
    size, all have the smoothing ``head``.

    Args:
        counts: training images of each class, ``[C]``, each at least 1.
        head: smoothing of the largest class, at least ``tail``.
        tail: smoothing of the smallest class, at least 0.
        shape: growth between the two: ``concave``, ``linear`` or ``convex``.
        weight: class weights ``[C]``.
        mean: see :class:`LongTailLoss`.

    Example:
        >>> LabelAwareSmoothingLoss([101, 51, 1], 0.4, 0.2, "linear").smoothing.tolist()
        [0.4, 0.30000000000000004, 0.2]
    """

    smoothing: Tensor

    def __init__(
        self,
        counts: ArrayLike,
        head: float = 0.3,
        tail: float = 0.0,
        shape: Shape = "concave",
        weight: Tensor | None = None,
        *,
        mean: Mean = "weights",
    ) -> None:
        super().__init__(weight=weight, mean=mean)
        if not 0 <= tail <= head <= 1:
            raise UsageError(f"expected 0 <= tail <= head <= 1, got tail={tail} and head={head}")
        if shape not in get_args(Shape):
            raise unknown("shape", shape, get_args(Shape))
        values = checked_counts(counts)
        spread = values.max() - values.min()
        progress = (values - values.min()) / spread if spread > 0 else np.ones_like(values)
        if shape == "concave":
            progress = np.sin(progress * math.pi / 2)
        elif shape == "convex":
            progress = 1 + np.sin((3 + progress) * math.pi / 2)
        self.register_buffer("smoothing", torch.from_numpy(tail + (head - tail) * progress))

    def per_sample(self, logits: Tensor, targets: Tensor, features: Tensor | None) -> Tensor:
        """Compute the smoothed cross-entropy of every sample, ``[B]``."""
        smoothing = self.smoothing.to(logits)[targets]
        even = -logits.log_softmax(dim=1).mean(dim=1)
        return (1 - smoothing) * super().per_sample(logits, targets, features) + smoothing * even


_CODE = "code of Zhong et al. 2021"
_LIKE = f"the ImageNet-LT configuration of the {_CODE}"


@dataclass(frozen=True, kw_only=True)
class LabelAwareSmoothingSettings(Settings):
    """Settings of label-aware smoothing."""

    las_head: float = setting(
        "label smoothing of the largest class in the loss las; published for CIFAR-LT with imbalance 100, 50 "
        "and 10, ImageNet-LT, iNaturalist 2018 and Places-LT",
        default=Entry(0.3, _LIKE, known=False),
        low=0,
        high=1,
    )
    las_tail: float = setting(
        "label smoothing of the smallest class in the loss las",
        default=Entry(0.0, _LIKE, known=False),
        low=0,
        high=1,
    )
    las_shape: Shape = setting(
        "growth of label smoothing with the size of the class in the loss las: concave, linear or convex",
        default=Entry("concave", _CODE),
    )

    def check(self, run: Mapping[str, Any]) -> None:
        """Check that smoothing does not fall with the size of the class."""
        super().check(run)
        if self.las_tail > self.las_head:
            raise UsageError(
                f"las_tail must be at most las_head ({self.las_head:g}), got {self.las_tail:g}; the loss las "
                "smooths large classes more than small ones"
            )


register_loss(
    Loss(
        name="las",
        build=lambda settings, classes: LabelAwareSmoothingLoss(
            classes.counts,
            settings.las_head,
            settings.las_tail,
            settings.las_shape,
            classes.weight,
            mean=classes.mean,
        ),
        settings=LabelAwareSmoothingSettings,
        summary="cross-entropy with label smoothing that grows with the size of the class",
    )
)
