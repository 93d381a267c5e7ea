"""Quantities computed from class counts: priors, class weights and logit adjustments."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fastsam.longtail.errors import UsageError, unknown
from fastsam.longtail.registry import Registry, RunPart
from fastsam.longtail.settings import Entry, Settings, setting

Mean = Literal["weights", "samples"]
MEANS: tuple[Mean, ...] = ("weights", "samples")
"""Divisors of a weighted sum of losses: the sum of the weights, or the number of samples."""


def checked_counts(counts: ArrayLike) -> NDArray[np.float64]:
    """Check class counts and return them as float64 ``[C]``.

    Args:
        counts: training images of each class, ``[C]``.

    Raises:
        UsageError: if there are fewer than 2 classes, or a class has no image.
    """
    values = np.asarray(counts, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise UsageError(
            f"counts must have one entry for each of at least 2 classes, got shape {values.shape}"
        )
    if not (np.isfinite(values).all() and (values >= 1).all()):
        empty = np.flatnonzero(~(values >= 1)).tolist()
        raise UsageError(f"counts must be at least 1, but classes {empty} have no training image")
    return values


def prior(counts: ArrayLike) -> Tensor:
    """Return the share of each class among the training images, float64 ``[C]``.

    Args:
        counts: training images of each class, ``[C]``, each at least 1.
    """
    values = checked_counts(counts)
    return torch.from_numpy(values / values.sum())


TargetPrior = Literal["as-is", "uniform", "trained", "reversed"]


def target_prior(name: TargetPrior, counts: ArrayLike) -> NDArray[np.float64] | None:
    """Return the share of each class in a test distribution, ``[C]``; None for ``as-is``.

    Args:
        name: ``as-is`` for the shares of the evaluation set; ``uniform`` for equal shares; ``trained`` for
            the shares of the training set; ``reversed`` for the shares of the training set in reversed
            order, so that the rarest class becomes the most frequent.
        counts: training images of each class, ``[C]``, each at least 1.

    Example:
        >>> target_prior("reversed", [6, 3, 1])
        array([0.1, 0.3, 0.6])
    """
    if name == "as-is":
        return None
    shares = prior(counts).numpy()
    if name == "uniform":
        return np.full(len(shares), 1 / len(shares))
    if name == "trained":
        return shares
    if name != "reversed":
        raise unknown("prior", name, get_args(TargetPrior))
    by_rank = np.argsort(-shares, kind="stable")
    turned = np.empty_like(shares)
    turned[by_rank] = shares[by_rank[::-1]]
    return turned


def class_balanced_weights(counts: ArrayLike, beta: float = 0.9999) -> Tensor:
    """Compute inverse effective numbers of samples, ``(1 - beta) / (1 - beta^n)``, scaled to sum to C.

    Cui et al., "Class-Balanced Loss Based on Effective Number of Samples" (CVPR 2019), section 3.

    Args:
        counts: training images of each class, ``[C]``, each at least 1.
        beta: in [0, 1). 0 gives equal weights; values near 1 approach inverse frequencies.

    Returns:
        Weights, float64 ``[C]``.

    Example:
        >>> [round(w, 2) for w in class_balanced_weights([100, 1]).tolist()]
        [0.02, 1.98]
    """
    values = checked_counts(counts)
    if not 0 <= beta < 1:
        raise UsageError(f"beta must be in [0, 1), got {beta}")
    effective = values * 0 + 1 if beta == 0 else -np.expm1(values * math.log(beta))
    weights = (1 - beta) / effective
    return torch.from_numpy(weights / weights.sum() * len(weights))


def inverse_frequency_weights(counts: ArrayLike, power: float = 1.0) -> Tensor:
    """Compute class weights proportional to ``1 / n^power``, scaled to sum to C; float64 ``[C]``.

    Args:
        counts: training images of each class, ``[C]``, each at least 1.
        power: exponent; 0 gives equal weights.
    """
    values = checked_counts(counts)
    weights = (values.min() / values) ** power  # at most 1, so that no power overflows
    return torch.from_numpy(weights / weights.sum() * len(weights))


def adjust_logits(logits: Tensor, counts: ArrayLike, tau: float = 1.0) -> Tensor:
    """Adjust logits at test time: ``z - tau log(prior)``.

    Menon et al., "Long-tail learning via logit adjustment" (ICLR 2021), section 4.

    Args:
        logits: logits ``[B, C]`` of a model that was trained without logit adjustment.
        counts: training images of each class, ``[C]``.
        tau: factor on the log prior; 1 is the consistent choice.
    """
    if not math.isfinite(tau):
        raise UsageError(f"tau must be finite, got {tau}")
    return logits - tau * prior(counts).log().to(logits)


@dataclass(frozen=True, kw_only=True)
class ClassWeights(RunPart):
    """A scheme of class weights.

    Attributes:
        build: ``build(settings, counts)`` computes the weights, float64 ``[C]``.
        mean: divisor of the weighted sum of losses.
    """

    build: Callable[..., Tensor]
    mean: Mean = "weights"


CLASS_WEIGHTS: Registry[ClassWeights] = Registry("weighting")
"""Schemes of class weights by name, the values of the setting ``weighting``."""


@dataclass(frozen=True, kw_only=True)
class EffectiveNumberSettings(Settings):
    """Settings of the effective number of samples."""

    beta: float = setting(
        "beta of the effective number of samples (1 - beta^n) / (1 - beta)",
        default=Entry(0.9999, "[code]"),
        low=0,
        high=1,
    )


CLASS_WEIGHTS.add(
    ClassWeights(
        name="effective",
        summary="inverse effective number of samples",
        build=lambda settings, counts: class_balanced_weights(counts, settings.beta),
        settings=EffectiveNumberSettings,
    )
)
CLASS_WEIGHTS.add(
    ClassWeights(
        name="inverse",
        summary="inverse frequency",
        build=lambda settings, counts: inverse_frequency_weights(counts),
    )
)


@dataclass(frozen=True, kw_only=True)
class PowerSettings(Settings):
    """Setting of weights that are a power of the inverse frequency."""

    weight_power: float = setting(
        "exponent p of the class weights 1/n^p",
        default=Entry(1.2, "code of Zhang et al. 2021 (DisAlign on ImageNet-LT)"),
        low=0,
        high=100,
    )


CLASS_WEIGHTS.add(
    # The generalized re-weighting of Zhang et al., "Distribution Alignment" (CVPR 2021).
    ClassWeights(
        name="power",
        summary="power of the inverse frequency",
        build=lambda settings, counts: inverse_frequency_weights(counts, settings.weight_power),
        settings=PowerSettings,
    )
)
CLASS_WEIGHTS.add(
    # Rangwani et al. 2022, Algorithm 1: w_j = 1 / n_j and a plain mean over the batch.
    ClassWeights(
        name="algorithm1",
        summary="1/n, mean over samples",
        build=lambda settings, counts: torch.from_numpy(1 / np.asarray(counts, dtype=np.float64)),
        mean="samples",
    )
)


@dataclass(frozen=True, kw_only=True)
class ClassWeightSettings(Settings):
    """Setting of rules with class weights."""

    weighting: str = setting(
        "class weights: effective (inverse effective number of samples), inverse (inverse frequency) or "
        "power (a power of it), scaled to sum to the number of classes, with the loss divided by the sum of "
        "the batch's weights; or algorithm1 (1/n, with the loss divided by the number of samples)",
        default=Entry("effective", "[code]"),
        names=CLASS_WEIGHTS,
    )
