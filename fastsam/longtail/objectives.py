"""From the settings of a run to the loss of an epoch."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fastsam.longtail.config import TrainConfig, given
from fastsam.longtail.contrastive import PaCoLoss
from fastsam.longtail.losses import (
    CrossEntropyLoss,
    EqualizationLoss,
    FocalLoss,
    InfluenceBalancedLoss,
    LDAMLoss,
    LongTailLoss,
    Mean,
    VSLoss,
    class_balanced_weights,
    inverse_frequency_weights,
)


class Objective:
    """The loss of every epoch of a run.

    Args:
        config: settings of the run.
        counts: training images of each class, ``[C]``.
        device: where the losses' tables live.
    """

    def __init__(
        self, config: TrainConfig, counts: ArrayLike, *, device: torch.device | str = "cpu"
    ) -> None:
        method = config.parsed_method
        weight, mean = _class_weights(config, counts)
        self._late: LongTailLoss | PaCoLoss
        if method.loss == "paco":
            self._late = PaCoLoss(
                counts,
                alpha=given(config.paco_alpha),
                temperature=given(config.paco_temperature),
            ).to(device)
        else:
            self._late = _loss(config, method.loss, counts, weight, mean).to(device)
        self._early = self._late
        if method.loss == "ib":
            self._early = CrossEntropyLoss().to(device)
        elif method.rule == "drw":
            self._early = _loss(config, method.loss, counts, None, mean).to(device)
        self._defer_epoch = config.defer_epoch or 0

    @property
    def logit_scale(self) -> float:
        """What the loss multiplies logits by, and whoever wants probabilities must."""
        return self._late.scale if isinstance(self._late, LDAMLoss) else 1.0

    def at(self, epoch: int) -> LongTailLoss | PaCoLoss:
        """The loss of ``epoch`` (counted from 1)."""
        return self._late if epoch > self._defer_epoch else self._early


def double_adjustment(config: TrainConfig) -> str | None:
    """Describe the two logit adjustments of a run that adjusts twice; None for others."""
    method = config.parsed_method
    offsets = {
        "bs": "log prior (balanced softmax)",
        "paco": "log prior (centers of paco)",
        "la": f"tau * log prior with tau {config.tau}",
        "vs": f"tau * log prior with tau {config.tau}",
    }
    adjusts = method.loss in offsets and (config.tau is None or config.tau != 0)
    if config.posthoc_tau == 0 or not adjusts:
        return None
    return (
        f"logits are adjusted twice: the loss {method.loss} adds {offsets[method.loss]} in training, "
        f"and posthoc_tau {config.posthoc_tau:g} subtracts {config.posthoc_tau:g} * log prior at test "
        "time; posthoc_tau 0 leaves the loss's own adjustment alone"
    )


def _class_weights(config: TrainConfig, counts: ArrayLike) -> tuple[Tensor | None, Mean]:
    """Class weights of the method, and what the mean over a batch divides by."""
    if config.parsed_method.loss == "ib":
        return inverse_frequency_weights(counts), "samples"
    if config.weighting == "effective":
        return class_balanced_weights(counts, given(config.beta)), "weights"
    if config.weighting == "inverse":
        return inverse_frequency_weights(counts), "weights"
    if config.weighting == "algorithm1":
        # Rangwani et al. 2022, Algorithm 1: w_j = 1 / n_j and a plain mean over the batch.
        return torch.from_numpy(1 / np.asarray(counts, dtype=np.float64)), "samples"
    return None, "weights"


def _loss(
    config: TrainConfig, name: str, counts: ArrayLike, weight: Tensor | None, mean: Mean
) -> LongTailLoss:
    match name:
        case "ce":
            return CrossEntropyLoss(weight=weight, mean=mean)
        case "focal":
            # Algorithm 1 is a mean over samples, whatever the loss.
            divided: Mean = "samples" if mean == "samples" else given(config.focal_mean)
            return FocalLoss(given(config.focal_gamma), weight=weight, mean=divided)
        case "ldam":
            margin, scale = given(config.max_margin), given(config.scale)
            return LDAMLoss(counts, margin, scale, weight, mean=mean)
        case "vs":
            return VSLoss(counts, given(config.gamma), given(config.tau), weight, mean=mean)
        case "cdt":
            return VSLoss(counts, given(config.gamma), 0.0, weight, mean=mean)
        case "la":
            return VSLoss(counts, 0.0, given(config.tau), weight, mean=mean)
        case "bs":
            return VSLoss(counts, 0.0, 1.0, weight, mean=mean)
        case "eql":
            threshold, drop = given(config.eql_threshold), given(config.eql_drop)
            return EqualizationLoss(counts, threshold, drop, weight, mean=mean)
        case "ib":
            return InfluenceBalancedLoss(given(config.ib_alpha), weight=weight)
    raise AssertionError(f"TrainConfig accepted the loss {name!r} that nothing builds")
