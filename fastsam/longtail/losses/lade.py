"""LADE: balanced softmax with a regularizer that disentangles the label distribution."""

from __future__ import annotations

import math
from dataclasses import dataclass

from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional

from fastsam.longtail.classes import prior
from fastsam.longtail.data.batch import Batch
from fastsam.longtail.losses.base import (
    Loss,
    check_number,
    check_targets,
    register_loss,
)
from fastsam.longtail.models.classifier import Outputs
from fastsam.longtail.objective import Given, Term
from fastsam.longtail.precision import at_least_float32
from fastsam.longtail.settings import Entry, Settings, setting


class LADELoss(Term):
    """LADE: cross-entropy of ``z + log(prior)`` minus a bound on how much the logits depend on the labels.

    Hong et al., "Disentangling Label Distribution for Long-Tailed Visual Recognition" (CVPR 2021),
    equations 8 to 10. For class c the regularized Donsker-Varadhan bound is ``r_c = mean_{y=c} z_c - s_c -
    lambda s_c^2`` with ``s_c = log mean exp(z_c - log prior_c - log C)``; both means are over the batch, so
    the loss is not a sum over samples. The loss is ``CE - alpha sum_c prior_c r_c``.

    Args:
        counts: training images of each class, ``[C]``, each at least 1.
        alpha: weight of the bound; 0.1 in the authors' code.
        regularization: lambda; 0.1 in the authors' code.

    Example:
        >>> import torch
        >>> round(LADELoss([3, 1])(torch.zeros(2, 2), torch.tensor([0, 1])).item(), 4)
        0.8263
    """

    couples_batch = True
    log_prior: Tensor

    def __init__(self, counts: ArrayLike, alpha: float = 0.1, regularization: float = 0.1) -> None:
        super().__init__()
        check_number("alpha", alpha)
        check_number("regularization", regularization)
        self.register_buffer("log_prior", prior(counts).log())
        self.alpha = alpha
        self.regularization = regularization

    def forward(self, logits: Tensor, targets: Tensor, factors: Tensor | None = None) -> Tensor:
        """Return the mean loss of a batch.

        Args:
            logits: ``[B, C]``.
            targets: int64 ``[B]``.
            factors: factor on the loss of each class, ``[C]``.
        """
        targets = check_targets(logits, targets)
        logits = at_least_float32(logits)
        batch, classes = logits.shape
        log_prior = self.log_prior.to(logits)
        losses = functional.cross_entropy(logits + log_prior, targets, reduction="none")
        onehot = functional.one_hot(targets, classes).to(logits)
        own = (logits * onehot).sum(dim=0) / onehot.sum(dim=0).clamp_min(1)
        spread = logits - log_prior - math.log(classes)
        everyone = spread.logsumexp(dim=0) - math.log(batch)
        bounds = log_prior.exp() * (own - everyone - self.regularization * everyone.square())
        if factors is not None:
            losses = losses * factors.to(losses)[targets]
            bounds = bounds * factors.to(bounds)
        return losses.mean() - self.alpha * bounds.sum()

    def loss(self, outputs: Outputs, batch: Batch, given: Given) -> Tensor:
        """See :meth:`Term.loss`."""
        mean: Tensor = self(outputs.logits, batch.targets, given.factors)
        return mean * len(batch.targets)


@dataclass(frozen=True, kw_only=True)
class LADESettings(Settings):
    """Settings of LADE."""

    lade_alpha: float = setting(
        "weight of LADE's regularizer", default=Entry(0.1, "code of Hong et al. 2021"), low=0
    )
    lade_lambda: float = setting(
        "weight of the quadratic penalty inside LADE's regularizer",
        default=Entry(0.1, "code of Hong et al. 2021"),
        low=0,
    )


register_loss(
    Loss(
        name="lade",
        build=lambda settings, classes: LADELoss(
            classes.counts, settings.lade_alpha, settings.lade_lambda
        ),
        settings=LADESettings,
        summary="balanced softmax with label-distribution disentangling",
        balances_classes=True,
        adjusts_logits=lambda settings: "log prior (balanced softmax)",
    )
)
