"""Losses for long-tailed classes and the class weights that go with them.

Every loss maps logits ``[B, C]`` and targets ``[B]`` to a scalar. Half-precision logits (autocast)
are raised to float32 first; float64 stays. All are twice differentiable, so that Hessians of them
exist.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn import functional

from fastsam.longtail.errors import UsageError, unknown

Mean = Literal["weights", "samples"]
MEANS: tuple[Mean, ...] = ("weights", "samples")


def _checked_counts(counts: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(counts, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise UsageError(
            f"counts must be one number per class, at least 2; got shape {values.shape}"
        )
    if not (np.isfinite(values).all() and (values >= 1).all()):
        empty = np.flatnonzero(~(values >= 1)).tolist()
        raise UsageError(f"every class needs at least 1 training image; classes {empty} have none")
    return values


def prior(counts: ArrayLike) -> Tensor:
    """Share of each class among the training images, float64 ``[C]``.

    Args:
        counts: training images of each class, ``[C]``, each at least 1.
    """
    values = _checked_counts(counts)
    return torch.from_numpy(values / values.sum())


def class_balanced_weights(counts: ArrayLike, beta: float = 0.9999) -> Tensor:
    """Inverse effective numbers of samples, ``(1 - beta) / (1 - beta^n)``, scaled to sum to C.

    Cui et al., "Class-Balanced Loss Based on Effective Number of Samples" (CVPR 2019), section 3.

    Args:
        counts: training images of each class, ``[C]``, each at least 1.
        beta: in [0, 1); 0 gives equal weights, near 1 inverse frequencies.

    Returns:
        Weights, float64 ``[C]``.

    Example:
        >>> [round(w, 2) for w in class_balanced_weights([100, 1]).tolist()]
        [0.02, 1.98]
    """
    values = _checked_counts(counts)
    if not 0 <= beta < 1:
        raise UsageError(f"beta must be in [0, 1), got {beta}")
    effective = values * 0 + 1 if beta == 0 else -np.expm1(values * math.log(beta))
    weights = (1 - beta) / effective
    return torch.from_numpy(weights / weights.sum() * len(weights))


def inverse_frequency_weights(counts: ArrayLike) -> Tensor:
    """Weights in inverse proportion to the counts, scaled to sum to C; float64 ``[C]``.

    Args:
        counts: training images of each class, ``[C]``, each at least 1.
    """
    weights = 1 / _checked_counts(counts)
    return torch.from_numpy(weights / weights.sum() * len(weights))


def adjust_logits(logits: Tensor, counts: ArrayLike, tau: float = 1.0) -> Tensor:
    """Post-hoc logit adjustment: ``z - tau log(prior)``, applied to the logits at test time.

    Menon et al., "Long-tail learning via logit adjustment" (ICLR 2021), section 4.

    Args:
        logits: ``[B, C]`` of a model trained without adjustment.
        counts: training images of each class, ``[C]``.
        tau: strength; 1 is the consistent choice.
    """
    if not math.isfinite(tau):
        raise UsageError(f"tau must be finite, got {tau}")
    return logits - tau * prior(counts).log().to(logits)


def check_targets(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the class indices, int64 ``[B]``.

    Args:
        logits: ``[B, C]``.
        targets: integers ``[B]``.

    Raises:
        UsageError: for anything but one index per row of the logits, soft targets ``[B, C]`` above
            all: some losses would take them, and mean something else.
    """
    fits = targets.ndim == 1 and logits.ndim == 2 and len(targets) == len(logits)
    if (
        not fits
        or targets.is_floating_point()
        or targets.is_complex()
        or targets.dtype == torch.bool
    ):
        raise UsageError(
            f"targets must be class indices, integers [B] for logits [B, C]; got {targets.dtype} "
            f"{tuple(targets.shape)} for logits {tuple(logits.shape)}; soft targets are not supported"
        )
    return targets.long()


def _check_setting(name: str, value: float, *, positive: bool = False) -> None:
    """Raise :class:`UsageError` unless ``value`` is finite and at least 0, or above 0."""
    if not (math.isfinite(value) and (value > 0 if positive else value >= 0)):
        bound = "above 0" if positive else "at least 0"
        raise UsageError(f"{name} must be finite and {bound}, got {value}")


class LongTailLoss(nn.Module):
    """A mean over the batch of per-sample losses, weighted by class.

    Attributes:
        weight: class weights, float64 ``[C]``, or None for equal ones.
        mean: ``weights`` divides by the sum of the batch's weights, as ``nn.CrossEntropyLoss``
            does; ``samples`` divides by the number of samples.
    """

    weight: Tensor | None

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
        """Unweighted loss of every sample, ``[B]``."""
        return functional.cross_entropy(logits, targets, reduction="none")

    def sums(
        self, logits: Tensor, targets: Tensor, features: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The weighted sum of the losses and what to divide it by, both scalars.

        Args:
            logits: ``[B, C]``.
            targets: int64 ``[B]``.
            features: ``[B, D]``; only the influence-balanced loss reads them.

        Raises:
            UsageError: targets are not class indices.
        """
        targets = check_targets(logits, targets)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        losses = self.per_sample(logits, targets, features)
        # Not torch.tensor(), whose copy to a GPU would wait for it.
        samples = torch.full((), len(losses), dtype=losses.dtype, device=losses.device)
        if self.weight is None:
            return losses.sum(), samples
        weights = self.weight.to(losses)[targets]
        return (weights * losses).sum(), weights.sum() if self.mean == "weights" else samples

    def forward(self, logits: Tensor, targets: Tensor, features: Tensor | None = None) -> Tensor:
        """The mean loss; see :meth:`sums` for the arguments."""
        total, weight = self.sums(logits, targets, features)
        return total / weight

    def reseed(self, seed: int) -> None:
        """Start the draws of the next batch at ``seed``. Most losses draw nothing."""


class CrossEntropyLoss(LongTailLoss):
    """Cross-entropy, equal to ``nn.CrossEntropyLoss``.

    Example:
        >>> round(CrossEntropyLoss()(torch.zeros(4, 10), torch.arange(4)).item(), 4)
        2.3026
    """


class FocalLoss(LongTailLoss):
    """``(1 - p)^gamma * CE`` with p the probability of the true class.

    Lin et al., "Focal Loss for Dense Object Detection" (ICCV 2017), equation 4. The class weight
    multiplies the loss and does not enter p.

    Args:
        gamma: focusing exponent, at least 0; 1 in Cao et al. 2019.
        weight: class weights ``[C]``.
        mean: what the weighted sum is divided by: ``samples`` by their number, as in the code of
            Cao et al. 2019, or ``weights`` by the sum of their weights, as ``nn.CrossEntropyLoss``
            divides.
    """

    def __init__(
        self, gamma: float = 1.0, *, weight: Tensor | None = None, mean: Mean = "weights"
    ) -> None:
        super().__init__(weight=weight, mean=mean)
        _check_setting("gamma", gamma)
        self.gamma = gamma

    def per_sample(self, logits: Tensor, targets: Tensor, features: Tensor | None) -> Tensor:
        """Focal loss of every sample, ``[B]``."""
        losses = super().per_sample(logits, targets, features)
        # 1 - p = -expm1(-CE); bounded away from 0, where a fractional power has no derivative.
        missing = (-torch.expm1(-losses)).clamp_min(torch.finfo(losses.dtype).tiny)
        return missing**self.gamma * losses


class LDAMLoss(LongTailLoss):
    """Cross-entropy of scaled logits whose true class is handicapped by a margin.

    Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss" (NeurIPS
    2019), equations 12 and 13: ``CE(scale * (z - margin_y onehot(y)))`` with margins proportional
    to ``n^(-1/4)``. Meant for cosine logits.

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
        _check_setting("max_margin", max_margin)
        _check_setting("scale", scale, positive=True)
        margins = _checked_counts(counts) ** -0.25
        self.register_buffer("margins", torch.from_numpy(margins / margins.max() * max_margin))
        self.scale = scale

    def per_sample(self, logits: Tensor, targets: Tensor, features: Tensor | None) -> Tensor:
        """LDAM loss of every sample, ``[B]``."""
        handicap = functional.one_hot(targets, logits.shape[1]) * self.margins.to(logits)
        return super().per_sample(self.scale * (logits - handicap), targets, features)


class VSLoss(LongTailLoss):
    """Vector-scaling loss: cross-entropy of ``z / (n_max / n)^gamma + tau log(prior)``.

    Kini et al., "Label-Imbalanced and Group-Sensitive Classification under Overparameterization"
    (NeurIPS 2021), equation 2. ``tau = 0`` is CDT, ``gamma = 0`` logit adjustment, and ``gamma = 0,
    tau = 1`` balanced softmax.

    Args:
        counts: training images of each class, ``[C]``, each at least 1.
        gamma: exponent of the multiplicative part, at least 0; 0.3 in the official code.
        tau: strength of the additive part; 1 in the official code.
        weight: class weights ``[C]``.
        mean: see :class:`LongTailLoss`.
    """

    divisors: Tensor
    offsets: Tensor

    def __init__(
        self,
        counts: ArrayLike,
        gamma: float = 0.3,
        tau: float = 1.0,
        weight: Tensor | None = None,
        *,
        mean: Mean = "weights",
    ) -> None:
        super().__init__(weight=weight, mean=mean)
        values = _checked_counts(counts)
        if not (math.isfinite(gamma) and gamma >= 0 and math.isfinite(tau)):
            raise UsageError(
                f"gamma must be at least 0 and tau finite, got gamma={gamma}, tau={tau}"
            )
        self.register_buffer("divisors", torch.from_numpy((values.max() / values) ** gamma))
        self.register_buffer("offsets", tau * prior(counts).log())

    def per_sample(self, logits: Tensor, targets: Tensor, features: Tensor | None) -> Tensor:
        """VS loss of every sample, ``[B]``."""
        adjusted = logits / self.divisors.to(logits) + self.offsets.to(logits)
        return super().per_sample(adjusted, targets, features)


class EqualizationLoss(LongTailLoss):
    """Softmax equalization: rare classes are mostly left out of other samples' denominators.

    Tan et al., "Equalization Loss for Long-Tailed Object Recognition" (CVPR 2020), section 3.3:
    ``-log(e^{z_y} / sum_k w_k e^{z_k})`` with ``w_k = 1 - b T_k (1 - y_k)``, T_k = 1 where the
    frequency of class k is below ``threshold`` and b a draw that is 1 with probability ``drop``.
    The draws (one per sample and class) happen in training mode; in evaluation mode b is ``drop``.

    Args:
        counts: training images of each class, ``[C]``, each at least 1.
        threshold: frequency (share of all images) below which a class counts as rare.
        drop: probability of leaving a rare class out.
        weight: class weights ``[C]``.
        mean: see :class:`LongTailLoss`.
    """

    rare: Tensor

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
        values = _checked_counts(counts)
        if not (0 <= drop < 1 and 0 <= threshold <= 1):
            raise UsageError(
                f"drop must be in [0, 1) and threshold in [0, 1], got {drop} and {threshold}"
            )
        self.register_buffer("rare", torch.from_numpy(values / values.sum() < threshold))
        self.drop = drop
        self._seed = 0

    def reseed(self, seed: int) -> None:
        """Every call of the loss draws the same mask until the next ``reseed``."""
        self._seed = seed

    def per_sample(self, logits: Tensor, targets: Tensor, features: Tensor | None) -> Tensor:
        """Equalization loss of every sample, ``[B]``."""
        if self.training:
            generator = torch.Generator().manual_seed(self._seed)
            dropped = torch.rand(logits.shape, generator=generator).lt(self.drop).to(logits)
        else:
            dropped = torch.full_like(logits, self.drop)
        others = 1 - functional.one_hot(targets, logits.shape[1])
        kept = 1 - dropped * self.rare.to(logits) * others
        # log(0) = -inf takes a dropped class out of the log-sum-exp.
        return super().per_sample(logits + kept.log(), targets, features)


class InfluenceBalancedLoss(LongTailLoss):
    """Cross-entropy divided by each sample's influence on the decision boundary.

    Park et al., "Influence-Balanced Loss for Imbalanced Visual Classification" (ICCV 2021), section
    3.3: ``alpha CE / (|softmax - onehot|_1 |h|_1 + epsilon)`` with h the features before the head.
    The mean is over samples.

    Args:
        alpha: overall factor; 1000 in the authors' code.
        epsilon: bound on the division; 0.001 in the authors' code.
        weight: class weights ``[C]``; inverse frequencies in the authors' code.
    """

    def __init__(
        self, alpha: float = 1000.0, epsilon: float = 1e-3, *, weight: Tensor | None = None
    ) -> None:
        super().__init__(weight=weight, mean="samples")
        _check_setting("alpha", alpha, positive=True)
        _check_setting("epsilon", epsilon, positive=True)
        self.alpha = alpha
        self.epsilon = epsilon

    def per_sample(self, logits: Tensor, targets: Tensor, features: Tensor | None) -> Tensor:
        """Influence-balanced loss of every sample, ``[B]``."""
        if features is None:
            raise UsageError("the influence-balanced loss needs the features before the head")
        onehot = functional.one_hot(targets, logits.shape[1])
        error = (logits.softmax(dim=1) - onehot).abs().sum(dim=1)
        influence = error * features.to(logits).abs().sum(dim=1)
        losses = super().per_sample(logits, targets, features)
        return self.alpha * losses / (influence + self.epsilon)
