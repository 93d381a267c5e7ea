"""Losses for long-tailed classes: one file for each, with its settings and its registration.

Every loss maps logits ``[B, C]`` and targets ``[B]`` to a scalar. Half-precision logits (autocast)
are raised to float32 first; float64 stays. All are twice differentiable, so that their Hessians exist.
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
