"""Label-distribution-aware margin loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional

from fastsam.longtail.classes import checked_counts
from fastsam.longtail.losses.base import LongTailLoss, Loss, Mean, check_number, register_loss
from fastsam.longtail.settings import Entry, Settings, layer, setting


class LDAMLoss(LongTailLoss):
    """LDAM loss: cross-entropy of scaled logits after a margin is subtracted from that of the true class.

    Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss" (NeurIPS
    2019), equations 12 and 13: ``CE(scale * (z - margin_y onehot(y)))`` with margins proportional
    to ``n^(-1/4)``. The logits should be cosines.

    Args:
        counts: training images of each class, ``[C]``, each at least 1.
        max_margin: margin of the smallest class; 0.5 for CIFAR-LT, 0.3 for ImageNet-LT.
        scale: factor on logits and margins; 30 in the authors' code.
        weight: class weights ``[C]``.
        mean: see :class:`LongTailLoss`.

    Example:
        >>> LDAMLoss([625, 1]).margins.tolist()
        [0.1, 0.5]
    """

    margins: Tensor

    def __init__(
        self,
        counts: ArrayLike,
        max_margin: float = 0.5,
        scale: float = 30.0,
        weight: Tensor | None = None,
        *,
        mean: Mean = "weights",
    ) -> None:
        super().__init__(weight=weight, mean=mean)
        check_number("max_margin", max_margin)
        check_number("scale", scale, positive=True)
        margins = checked_counts(counts) ** -0.25
        self.register_buffer("margins", torch.from_numpy(margins / margins.max() * max_margin))
        self.scale = scale
        self.logit_scale = scale

    def per_sample(self, logits: Tensor, targets: Tensor, features: Tensor | None) -> Tensor:
        """Compute the LDAM loss of every sample, ``[B]``."""
        handicap = functional.one_hot(targets, logits.shape[1]) * self.margins.to(logits)
        return super().per_sample(self.scale * (logits - handicap), targets, features)


@dataclass(frozen=True, kw_only=True)
class LDAMSettings(Settings):
    """Settings of the LDAM loss."""

    max_margin: float = setting(
        "margin of the smallest class in the LDAM loss",
        default=Entry(0.5, "Cao et al. 2019 (CIFAR)"),
        low=0,
    )
    scale: float = setting(
        "factor on the cosine logits of the LDAM loss",
        default=Entry(30.0, "code of Cao et al. 2019"),
        above=0,
        high=10**6,
    )


register_loss(
    Loss(
        name="ldam",
        build=lambda settings, classes: LDAMLoss(
            classes.counts, settings.max_margin, settings.scale, classes.weight, mean=classes.mean
        ),
        settings=LDAMSettings,
        summary="label-distribution-aware margin loss on cosine logits",
        head="cosine",
        recipe=layer("code of Cao et al. 2019", head="cosine"),
    )
)
