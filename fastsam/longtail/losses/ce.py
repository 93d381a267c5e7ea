"""Cross-entropy."""

from __future__ import annotations

from fastsam.longtail.losses.base import LongTailLoss, Loss, register_loss


class CrossEntropyLoss(LongTailLoss):
    """Cross-entropy, equal to ``nn.CrossEntropyLoss``.

    Example:
        >>> import torch
        >>> round(CrossEntropyLoss()(torch.zeros(4, 10), torch.arange(4)).item(), 4)
        2.3026
    """


register_loss(
    Loss(
        name="ce",
        build=lambda settings, classes: CrossEntropyLoss(weight=classes.weight, mean=classes.mean),
        summary="cross-entropy",
    )
)
