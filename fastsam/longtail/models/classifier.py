"""Classifiers: a feature extractor and a head."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


class Outputs(NamedTuple):
    """What a network makes of one view of a batch.

    Attributes:
        features: what the head is given, ``[B, D]``.
        logits: ``[B, C]``.
        projections: vectors that a contrastive loss compares, ``[B, P]``; None without one.
    """

    features: Tensor
    logits: Tensor
    projections: Tensor | None = None


class Classifier(nn.Module):
    """A feature extractor followed by a classification head.

    Attributes:
        features: maps images ``[B, channels, H, W]`` to features ``[B, D]``.
        head: maps features ``[B, D]`` to logits ``[B, C]``.
        feature_width: D.
    """

    def __init__(self, features: nn.Module, head: nn.Module, feature_width: int) -> None:
        super().__init__()
        self.features = features
        self.head = head
        self.feature_width = feature_width

    def forward(self, inputs: Tensor) -> Tensor:
        """Images ``[B, channels, H, W]`` to logits ``[B, C]``."""
        logits: Tensor = self.head(self.features(inputs))
        return logits

    def outputs(self, inputs: Tensor) -> Outputs:
        """Everything that a loss may read, of images ``[B, channels, H, W]``."""
        features = self.features(inputs)
        return Outputs(features, self.head(features))
