"""Binary cross-entropy of softmax probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsam.longtail.losses.base import LongTailLoss, Loss, register_loss


class SoftmaxBinaryLoss(LongTailLoss):
    """Mean over classes of the binary cross-entropy of the softmax probabilities p and the one-hot target.

    ``(-log p_y - sum_{c != y} log(1 - p_c)) / C``. With the class weights of the effective number of samples
    and a mean over samples, it is the "CB softmax" loss in the code of Alshammari et al., "Long-Tailed
    Recognition via Weight Balancing" (CVPR 2022). It is about C times smaller than the cross-entropy, so the
    same weight decay is about C times stronger.

    Example:
        >>> loss = SoftmaxBinaryLoss(mean="samples")
        >>> round(loss(torch.zeros(1, 2), torch.tensor([0])).item(), 4)  # both terms are log 2
        0.6931
    """

    def per_sample(self, logits: Tensor, targets: Tensor, features: Tensor | None) -> Tensor:
        """Compute the loss of every sample, ``[B]``."""
        logs = logits.log_softmax(dim=1)
        # log(1 - p). Where p rounds to 1, it is bounded, as torch's binary cross-entropy bounds it at -100.
        others = torch.log((-torch.expm1(logs)).clamp_min(torch.finfo(logs.dtype).tiny))
        place = targets[:, None]
        total = others.sum(dim=1) - others.gather(1, place)[:, 0] + logs.gather(1, place)[:, 0]
        return -total / logits.shape[1]


register_loss(
    Loss(
        name="softmax-bce",
        build=lambda settings, classes: SoftmaxBinaryLoss(weight=classes.weight, mean="samples"),
        summary="binary cross-entropy of softmax probabilities, mean over classes",
    )
)
