"""Cross-entropy."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from fastsam.longtail.errors import UsageError
from fastsam.longtail.losses.base import ClassStatistics, LongTailLoss, Loss, Mean, register_loss
from fastsam.longtail.settings import Settings, setting


class CrossEntropyLoss(LongTailLoss):
    """Cross-entropy, equal to ``nn.CrossEntropyLoss``, with optional label smoothing.

    With smoothing the target is ``(1 - smoothing) onehot(y) + smoothing / C``: Szegedy et al., "Rethinking
    the Inception Architecture for Computer Vision" (CVPR 2016), section 7. The weight of the class y
    multiplies the smoothed loss, whereas ``nn.CrossEntropyLoss`` weights each class of the smoothed target.

    Args:
        smoothing: share of the target that is spread evenly over all classes, in [0, 1].
        weight: class weights ``[C]``.
        mean: see :class:`LongTailLoss`.

    Example:
        >>> import torch
        >>> round(CrossEntropyLoss()(torch.zeros(4, 10), torch.arange(4)).item(), 4)
        2.3026
    """

    def __init__(
        self, smoothing: float = 0.0, *, weight: Tensor | None = None, mean: Mean = "weights"
    ) -> None:
        super().__init__(weight=weight, mean=mean)
        if not 0 <= smoothing <= 1:
            raise UsageError(f"smoothing must be in [0, 1], got {smoothing}")
        self.smoothing = smoothing

    def per_sample(self, logits: Tensor, targets: Tensor, features: Tensor | None) -> Tensor:
        """Compute the cross-entropy of every sample, ``[B]``."""
        return functional.cross_entropy(
            logits, targets, reduction="none", label_smoothing=self.smoothing
        )


@dataclass(frozen=True, kw_only=True)
class CrossEntropySettings(Settings):
    """Settings of cross-entropy."""

    label_smoothing: float = setting(
        "share of the target of cross-entropy that is spread evenly over all classes",
        default=0.0,
        before=0.0,
        low=0,
        high=1,
    )


def _build(settings: CrossEntropySettings | None, classes: ClassStatistics) -> CrossEntropyLoss:
    """Create the loss. There are no settings where it is the early loss of another one."""
    smoothing = 0.0 if settings is None else settings.label_smoothing
    return CrossEntropyLoss(smoothing, weight=classes.weight, mean=classes.mean)


register_loss(Loss(name="ce", build=_build, settings=CrossEntropySettings, summary="cross-entropy"))
