"""Influence-balanced loss."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from fastsam.longtail.classes import inverse_frequency_weights
from fastsam.longtail.errors import UsageError
from fastsam.longtail.losses.base import LongTailLoss, Loss, check_number, register_loss
from fastsam.longtail.settings import DeferralSettings, Entry, setting


class InfluenceBalancedLoss(LongTailLoss):
    """Cross-entropy divided by each sample's influence on the decision boundary.

    Park et al., "Influence-Balanced Loss for Imbalanced Visual Classification" (ICCV 2021), section
    3.3: ``alpha CE / (|softmax - onehot|_1 |h|_1 + epsilon)``, where h are the inputs of the head.
    The mean is over samples.

    Args:
        alpha: overall factor; 1000 in the authors' code.
        epsilon: added to the divisor, which may be 0; 0.001 in the authors' code.
        weight: class weights ``[C]``; inverse frequencies in the authors' code.
    """

    def __init__(
        self, alpha: float = 1000.0, epsilon: float = 1e-3, *, weight: Tensor | None = None
    ) -> None:
        super().__init__(weight=weight, mean="samples")
        check_number("alpha", alpha, positive=True)
        check_number("epsilon", epsilon, positive=True)
        self.alpha = alpha
        self.epsilon = epsilon

    def per_sample(self, logits: Tensor, targets: Tensor, features: Tensor | None) -> Tensor:
        """Compute the influence-balanced loss of every sample, ``[B]``."""
        if features is None:
            raise UsageError(
                "the influence-balanced loss got features=None; pass the inputs of the head, shape [B, D]"
            )
        onehot = functional.one_hot(targets, logits.shape[1])
        error = (logits.softmax(dim=1) - onehot).abs().sum(dim=1)
        influence = error * features.to(logits).abs().sum(dim=1)
        losses = super().per_sample(logits, targets, features)
        return self.alpha * losses / (influence + self.epsilon)


@dataclass(frozen=True, kw_only=True)
class InfluenceBalancedSettings(DeferralSettings):
    """Settings of the influence-balanced loss."""

    ib_alpha: float = setting(
        "factor of the influence-balanced loss",
        default=Entry(1000.0, "code of Park et al. 2021"),
        above=0,
    )


register_loss(
    Loss(
        name="ib",
        build=lambda settings, classes: InfluenceBalancedLoss(
            settings.ib_alpha, weight=inverse_frequency_weights(classes.counts)
        ),
        settings=InfluenceBalancedSettings,
        summary="influence-balanced loss; cross-entropy up to the deferral epoch",
        early="ce",
        balances_classes=True,
    )
)
