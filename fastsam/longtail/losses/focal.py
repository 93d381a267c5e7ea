"""Focal loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastsam.longtail.losses.base import (
    ClassStatistics,
    LongTailLoss,
    Loss,
    Mean,
    check_number,
    register_loss,
)
from fastsam.longtail.settings import Entry, Settings, setting


class FocalLoss(LongTailLoss):
    """Focal loss ``(1 - p)^gamma * CE``, where p is the probability of the true class.

    Lin et al., "Focal Loss for Dense Object Detection" (ICCV 2017), equation 4. The class weight
    multiplies the loss and does not enter p. In the code of Cao et al. 2019 it does: p is ``exp(-w CE)``.

    Args:
        gamma: focusing exponent, at least 0; 1 in Cao et al. 2019.
        weight: class weights ``[C]``.
        mean: divisor of the weighted sum: ``samples`` (their number, as in the code of Cao et al. 2019)
            or ``weights`` (the sum of their weights, as in ``nn.CrossEntropyLoss``).
    """

    def __init__(
        self, gamma: float = 1.0, *, weight: Tensor | None = None, mean: Mean = "weights"
    ) -> None:
        super().__init__(weight=weight, mean=mean)
        check_number("gamma", gamma)
        self.gamma = gamma

    def per_sample(self, logits: Tensor, targets: Tensor, features: Tensor | None) -> Tensor:
        """Compute the focal loss of every sample, ``[B]``."""
        losses = super().per_sample(logits, targets, features)
        # 1 - p = -expm1(-CE), clamped above 0 because a fractional power has no derivative at 0.
        missing = (-torch.expm1(-losses)).clamp_min(torch.finfo(losses.dtype).tiny)
        return missing**self.gamma * losses


@dataclass(frozen=True, kw_only=True)
class FocalSettings(Settings):
    """Settings of the focal loss."""

    focal_gamma: float = setting(
        "exponent of the focal loss", default=Entry(1.0, "code of Cao et al. 2019"), low=0
    )
    focal_mean: Mean = setting(
        "divisor of the class-weighted focal loss: samples (their number) or weights (their sum). With "
        "weighting algorithm1 it is always the number of samples",
        default=Entry("samples", "code of Cao et al. 2019"),
        before="weights",
    )


def _build(settings: FocalSettings, classes: ClassStatistics) -> FocalLoss:
    # The weighting algorithm1 averages over samples for every loss.
    mean: Mean = "samples" if classes.mean == "samples" else settings.focal_mean
    return FocalLoss(settings.focal_gamma, weight=classes.weight, mean=mean)


register_loss(Loss(name="focal", build=_build, settings=FocalSettings, summary="focal loss"))
