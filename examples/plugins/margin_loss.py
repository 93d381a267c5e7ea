"""A loss as a plug-in: cross-entropy with a margin for the true class."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fastsam.longtail.losses import ClassStatistics, LongTailLoss, Loss, register_loss
from fastsam.longtail.settings import Entry, Settings, setting


class MarginLoss(LongTailLoss):
    """Cross-entropy after subtracting ``margin`` from the logit of the true class."""

    def __init__(self, margin: float, classes: ClassStatistics) -> None:
        super().__init__(weight=classes.weight, mean=classes.mean)
        self.margin = margin

    def per_sample(self, logits: Tensor, targets: Tensor, features: Tensor | None) -> Tensor:
        """Compute the loss of every sample, ``[B]``."""
        handicap = self.margin * functional.one_hot(targets, logits.shape[1])
        return functional.cross_entropy(logits - handicap, targets, reduction="none")


@dataclass(frozen=True, kw_only=True)
class MarginSettings(Settings):
    """Settings of the loss; the command line shows them as ``--margin-loss-margin``."""

    margin_loss_margin: float = setting(
        "margin that is subtracted from the logit of the true class",
        default=Entry(0.5, "an example"),
        low=0,
    )


register_loss(
    Loss(
        name="margin-loss",
        build=lambda settings, classes: MarginLoss(settings.margin_loss_margin, classes),
        settings=MarginSettings,
        summary="cross-entropy with a margin",
    )
)

if __name__ == "__main__":
    loss = MarginLoss(0.5, ClassStatistics(counts=[5, 3]))
    print(float(loss(torch.zeros(2, 2), torch.tensor([0, 1]))))
