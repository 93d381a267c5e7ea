"""Losses for long-tailed classes. Each file defines one loss with its settings, and registers it.

Every loss maps logits ``[B, C]`` and targets ``[B]`` to a scalar. Half-precision logits (autocast) are
converted to float32 first; float64 logits are not. All losses are twice differentiable, as Hessians require.
"""

from fastsam.longtail.classes import (
    adjust_logits,
    class_balanced_weights,
    inverse_frequency_weights,
    prior,
)
from fastsam.longtail.losses.base import (
    LOSSES,
    MEANS,
    ClassStatistics,
    LongTailLoss,
    Loss,
    Mean,
    check_targets,
    register_loss,
)
from fastsam.longtail.losses.ce import CrossEntropyLoss
from fastsam.longtail.losses.eql import EqualizationLoss
from fastsam.longtail.losses.focal import FocalLoss
from fastsam.longtail.losses.ib import InfluenceBalancedLoss
from fastsam.longtail.losses.las import LabelAwareSmoothingLoss
from fastsam.longtail.losses.ldam import LDAMLoss
from fastsam.longtail.losses.paco import PaCoClassifier, PaCoLoss
from fastsam.longtail.losses.vs import VSLoss

__all__ = [
    "LOSSES",
    "MEANS",
    "ClassStatistics",
    "CrossEntropyLoss",
    "EqualizationLoss",
    "FocalLoss",
    "InfluenceBalancedLoss",
    "LDAMLoss",
    "LabelAwareSmoothingLoss",
    "LongTailLoss",
    "Loss",
    "Mean",
    "PaCoClassifier",
    "PaCoLoss",
    "VSLoss",
    "adjust_logits",
    "check_targets",
    "class_balanced_weights",
    "inverse_frequency_weights",
    "prior",
    "register_loss",
]
