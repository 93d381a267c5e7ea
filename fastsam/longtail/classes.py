"""Counts of classes: priors, class weights, and the adjustment of logits by the prior."""

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
"""What a weighted sum of losses is divided by: the sum of the weights, or the number of samples."""


def checked_counts(counts: ArrayLike) -> NDArray[np.float64]:
    """Return the counts, float64 ``[C]``.

    Args:
        counts: training images of each class, ``[C]``.

    Raises:
        UsageError: there are fewer than 2 classes, or one has no image.
    """
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
    values = checked_counts(counts)
    return torch.from_numpy(values / values.sum())


TargetPrior = Literal["as-is", "uniform", "trained", "reversed"]


def target_prior(name: TargetPrior, counts: ArrayLike) -> NDArray[np.float64] | None:
    """Return the share of each class in a test distribution, ``[C]``; None for that of the images.

    Args:
        name: ``as-is``, the classes as the evaluation set has them; ``uniform``; ``trained``, as the
            training set has them; ``reversed``, the training shares with the rarest class the most
            frequent, the second rarest the second, and so on.
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
    values = checked_counts(counts)
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
    weights = 1 / checked_counts(counts)
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


@dataclass(frozen=True, kw_only=True)
class ClassWeights(RunPart):
    """A scheme of class weights; ``build(settings, counts)`` makes them, float64 ``[C]``.

    Attributes:
        mean: what the weighted sum of losses is divided by.
    """

    build: Callable[..., Tensor]
    mean: Mean = "weights"


CLASS_WEIGHTS: Registry[ClassWeights] = Registry("weighting")
"""Schemes of class weights by the names of the setting ``weighting``."""


@dataclass(frozen=True, kw_only=True)
class EffectiveNumberSettings(Settings):
    """Settings of the effective number of samples."""

    beta: float = setting(
        "beta of the effective number of samples", default=Entry(0.9999, "[code]"), low=0, high=1
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
    """The setting of a rule that weights classes."""

    weighting: str = setting(
        "class weights: effective (number of samples) or inverse (frequency), both summing to the "
        "number of classes, mean over the batch's weights; algorithm1: 1/n, mean over samples",
        default=Entry("effective", "[code]"),
        names=CLASS_WEIGHTS,
    )
