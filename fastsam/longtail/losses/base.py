"""Base classes of the losses, and their registry."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional

from fastsam.longtail.classes import MEANS, Mean
from fastsam.longtail.data.batch import Batch
from fastsam.longtail.errors import UsageError, unknown
from fastsam.longtail.models.classifier import Classifier, Outputs
from fastsam.longtail.models.heads.base import Logits
from fastsam.longtail.objective import Given, Term
from fastsam.longtail.precision import at_least_float32
from fastsam.longtail.registry import Registry, RunPart

__all__ = ["LOSSES", "MEANS", "ClassStatistics", "LongTailLoss", "Loss", "Mean", "register_loss"]


def check_targets(logits: Tensor, targets: Tensor) -> Tensor:
    """Check that targets are class indices, and return them as int64 ``[B]``.

    Soft targets ``[B, C]`` are refused because some losses would accept them and compute something else.

    Args:
        logits: ``[B, C]``.
        targets: integers ``[B]``.

    Raises:
        UsageError: if ``targets`` is not one class index for each row of ``logits``.
    """
    fits = targets.ndim == 1 and logits.ndim == 2 and len(targets) == len(logits)
    if (
        not fits
        or targets.is_floating_point()
        or targets.is_complex()
        or targets.dtype == torch.bool
    ):
        raise UsageError(
            "targets must be class indices: integers of shape [B] for logits of shape [B, C]; got "
            f"{targets.dtype} {tuple(targets.shape)} for logits {tuple(logits.shape)}. Soft targets are not "
            "supported"
        )
    return targets.long()


def check_number(name: str, value: float, *, positive: bool = False) -> None:
    """Raise :class:`UsageError` unless ``value`` is finite and at least 0, or above 0."""
    if not (math.isfinite(value) and (value > 0 if positive else value >= 0)):
        bound = "above 0" if positive else "at least 0"
        raise UsageError(f"{name} must be finite and {bound}, got {value}")


class LongTailLoss(Term):
    """Mean of per-sample losses over the batch, weighted by class.

    Subclasses override :meth:`per_sample`.

    Attributes:
        weight: class weights, float64 ``[C]``, or None for equal weights.
        mean: ``weights`` divides by the sum of the batch's weights, as ``nn.CrossEntropyLoss``
            does; ``samples`` divides by the number of samples.
        mixes: see :class:`Term`. It is False for a subclass that overrides :meth:`sum` or :meth:`loss`,
            unless the subclass sets it.
    """

    mixes = True
    weight: Tensor | None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "mixes" not in vars(cls) and {"sum", "loss"} & vars(cls).keys():
            cls.mixes = False  # another sum may not multiply by the shares

    def __init__(self, *, weight: Tensor | None = None, mean: Mean = "weights") -> None:
        super().__init__()
        if mean not in MEANS:
            raise unknown("mean", mean, MEANS)
        if weight is not None and not (
            weight.ndim == 1 and bool(weight.isfinite().all() and (weight >= 0).all())
        ):
            raise UsageError(
                "weight must be one finite number of at least 0 per class, got a tensor of shape "
                f"{tuple(weight.shape)}"
            )
        self.register_buffer("weight", None if weight is None else weight.double())
        self.mean = mean

    def per_sample(self, logits: Tensor, targets: Tensor, features: Tensor | None) -> Tensor:
        """Compute the unweighted loss of every sample, ``[B]``."""
        return functional.cross_entropy(logits, targets, reduction="none")

    def sum(
        self,
        logits: Tensor,
        targets: Tensor,
        features: Tensor | None = None,
        *,
        factors: Tensor | None = None,
        shares: Tensor | None = None,
    ) -> Tensor:
        """Compute the weighted sum of the losses, a scalar.

        Args:
            logits: ``[B, C]``.
            targets: int64 ``[B]``.
            features: ``[B, D]``; only the influence-balanced loss reads them.
            factors: additional factor on the loss of each class, ``[C]``. It does not enter the divisor.
            shares: additional factor on the loss of each sample, ``[B]``. It does not enter the divisor.

        Raises:
            UsageError: if targets are not class indices.
        """
        targets = check_targets(logits, targets)
        losses = self.per_sample(at_least_float32(logits), targets, features)
        if factors is not None:
            losses = losses * factors.to(losses)[targets]
        if shares is not None:
            losses = losses * shares.to(losses)
        if self.weight is not None:
            losses = self.weight.to(losses)[targets] * losses
        return losses.sum()

    def divisor(self, batch: Batch) -> Tensor:
        """See :meth:`Term.divisor`."""
        if self.weight is None or self.mean == "samples":
            return super().divisor(batch)
        return self.weight[batch.targets].sum()

    def forward(self, logits: Tensor, targets: Tensor, features: Tensor | None = None) -> Tensor:
        """Compute the mean loss; see :meth:`sum` for the arguments."""
        total = self.sum(logits, targets, features)
        return total / self.divisor(Batch((), targets.long(), targets)).to(total)

    def loss(self, outputs: Outputs, batch: Batch, given: Given) -> Tensor:
        """See :meth:`Term.loss`."""
        inputs = (outputs.logits, batch.targets, outputs.features)
        if given.shares is None:  # a subclass that does not mix need not accept them
            return self.sum(*inputs, factors=given.factors)
        return self.sum(*inputs, factors=given.factors, shares=given.shares)


@dataclass(frozen=True, eq=False)
class ClassStatistics:
    """Class statistics that a loss is built from.

    Attributes:
        counts: training images of each class, ``[C]``.
        weight: class weights of the rule, float64 ``[C]``; None for equal weights.
        mean: divisor of the weighted sum: the sum of the weights or the number of samples.
    """

    counts: ArrayLike
    weight: Tensor | None = None
    mean: Mean = "weights"


@dataclass(frozen=True, kw_only=True)
class Loss(RunPart):
    """A loss. Once it is registered, ``--method NAME`` trains with it.

    Attributes:
        build: ``build(settings, classes)`` creates the term from a :class:`ClassStatistics`.
        head: kind of logits that the head must have; None for any head.
        early: name of the loss that is used up to the deferral epoch; None for this loss throughout.
        balances_classes: whether the loss balances classes itself. Rules that weight classes are then
            refused, and a rule that re-samples them is reported.
        adjusts_logits: ``adjusts_logits(settings)`` describes the logit adjustment of the loss; it returns
            None if there is none.
        network: ``network(settings, classifier)`` extends the network; None for no extension.
    """

    build: Callable[..., Term]
    head: Logits | None = "linear"
    early: str | None = None
    balances_classes: bool = False
    adjusts_logits: Callable[[Any], str | None] = field(default=lambda settings: None)
    network: Callable[[Any, Classifier], Classifier] | None = None

    def examples(self, settings: Any) -> list[Term]:
        """Return the terms of a run with two classes: this loss, and the early one if there is one."""
        classes = ClassStatistics([1, 1])
        early = [] if self.early is None else [LOSSES[self.early].build(None, classes)]
        return [self.build(settings, classes), *early]


LOSSES: Registry[Loss] = Registry("loss", "fastsam.longtail.losses")
register_loss = LOSSES.add
