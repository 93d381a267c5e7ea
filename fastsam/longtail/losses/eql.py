"""Softmax equalization loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional

from fastsam.longtail.classes import checked_counts
from fastsam.longtail.data.batch import Batch
from fastsam.longtail.errors import UsageError
from fastsam.longtail.losses.base import LongTailLoss, Loss, Mean, register_loss
from fastsam.longtail.models.classifier import Classifier, Outputs
from fastsam.longtail.objective import Given
from fastsam.longtail.settings import Entry, Settings, setting


class EqualizationLoss(LongTailLoss):
    """Softmax equalization loss: rare classes are dropped at random from other samples' denominators.

    Tan et al., "Equalization Loss for Long-Tailed Object Recognition" (CVPR 2020), section 3.3:
    ``-log(e^{z_y} / sum_k w_k e^{z_k})`` with ``w_k = 1 - b T_k (1 - y_k)``. T_k is 1 if the frequency of
    class k is below ``threshold``, else 0. In training mode b is sampled for every sample and class and is 1
    with probability ``drop``; in evaluation mode b is ``drop``.

    Args:
        counts: training images of each class, ``[C]``, each at least 1.
        threshold: frequency (share of all images) below which a class counts as rare.
        drop: probability of dropping a rare class from a denominator.
        weight: class weights ``[C]``.
        mean: see :class:`LongTailLoss`.
    """

    rare: Tensor

    mixes = True

    def __init__(
        self,
        counts: ArrayLike,
        threshold: float = 5e-3,
        drop: float = 0.9,
        weight: Tensor | None = None,
        *,
        mean: Mean = "weights",
    ) -> None:
        super().__init__(weight=weight, mean=mean)
        values = checked_counts(counts)
        for name, value in (("drop", drop), ("threshold", threshold)):
            if not 0 <= value <= 1:
                raise UsageError(f"{name} must be from 0 to 1, got {value}")
        self.register_buffer("rare", torch.from_numpy(values / values.sum() < threshold))
        self.drop = drop
        self._seed = 0

    def reseed(self, seed: int) -> None:
        """Set the seed of the mask. Every call samples the same mask until the next ``reseed``."""
        self._seed = seed

    def prepare(self, batch: Batch, network: Classifier, seed: int) -> int:
        """Return the seed of the batch's mask. All passes of a step share it."""
        return seed

    def loss(self, outputs: Outputs, batch: Batch, given: Given) -> Tensor:
        """See :meth:`Term.loss`."""
        if given.prepared is not None:
            self.reseed(given.prepared)
        return super().loss(outputs, batch, given)

    def per_sample(self, logits: Tensor, targets: Tensor, features: Tensor | None) -> Tensor:
        """Compute the equalization loss of every sample, ``[B]``."""
        if self.training:
            generator = torch.Generator().manual_seed(self._seed)
            dropped = torch.rand(logits.shape, generator=generator).lt(self.drop).to(logits)
        else:
            dropped = torch.full_like(logits, self.drop)
        others = 1 - functional.one_hot(targets, logits.shape[1])
        kept = 1 - dropped * self.rare.to(logits) * others
        # log(0) = -inf removes a dropped class from the log-sum-exp.
        return super().per_sample(logits + kept.log(), targets, features)


@dataclass(frozen=True, kw_only=True)
class EqualizationSettings(Settings):
    """Settings of the equalization loss."""

    eql_threshold: float = setting(
        "share of the training images below which a class counts as rare",
        default=Entry(0.005, "starting point", known=False),
        low=0,
        high=1,
    )
    eql_drop: float = setting(
        "probability of dropping a rare class from the softmax denominator of a sample",
        default=Entry(0.9, "starting point", known=False),
        low=0,
        high=1,
    )


register_loss(
    Loss(
        name="eql",
        build=lambda settings, classes: EqualizationLoss(
            classes.counts,
            settings.eql_threshold,
            settings.eql_drop,
            classes.weight,
            mean=classes.mean,
        ),
        settings=EqualizationSettings,
        summary="softmax equalization loss",
    )
)
