"""Classifiers: a feature extractor and a head."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from torch import Tensor, nn


class Outputs(NamedTuple):
    """Outputs of a network for one view of a batch.

    Attributes:
        features: inputs of the head, ``[B, D]``.
        logits: ``[B, C]``.
        projections: vectors that a contrastive loss compares, ``[B, P]``; None for other losses.
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
        forward_methods: methods besides :meth:`forward` that compute with the parameters. Parameters that are
            sharded are gathered before each.
    """

    forward_methods: ClassVar[tuple[str, ...]] = ("outputs",)

    def __init__(self, features: nn.Module, head: nn.Module, feature_width: int) -> None:
        super().__init__()
        self.features = features
        self.head = head
        self.feature_width = feature_width

    def forward(self, inputs: Tensor) -> Tensor:
        """Map images ``[B, channels, H, W]`` to logits ``[B, C]``."""
        logits: Tensor = self.head(self.features(inputs))
        return logits

    def outputs(self, inputs: Tensor) -> Outputs:
        """Compute all outputs that a loss may read, from images ``[B, channels, H, W]``."""
        features = self.features(inputs)
        return Outputs(features, self.head(features))
