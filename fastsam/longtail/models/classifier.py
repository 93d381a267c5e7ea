"""Classifiers: a feature extractor and a head."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar, Literal, NamedTuple, TypeVar

from torch import Tensor, nn

from fastsam.longtail.precision import at_least_float32, autocast
from fastsam.optim.batch_norm import batch_norm_layers

BatchNormMode = Literal["train", "frozen", "statistics"]
"""Batch normalization in training: ``frozen`` uses the stored statistics and does not update them."""

_Network = TypeVar("_Network", bound="Classifier")


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
        batch_norm: batch normalization in training mode.
        frozen: names of the parameters that the settings exclude from training. Others without a gradient,
            such as those of a momentum encoder, are changed by the loss.
        added: names of the entries of the state dict that the tuning added. Start weights may lack them.
        forward_methods: methods besides :meth:`forward` that compute with the parameters. Parameters that are
            sharded are gathered before each.
        run_buffers: names of the buffers that belong to one run, such as a queue of its batches. A run that
            starts from the weights of another one does not load them.
    """

    forward_methods: ClassVar[tuple[str, ...]] = ("outputs",)
    run_buffers: ClassVar[tuple[str, ...]] = ()

    def __init__(self, features: nn.Module, head: nn.Module, feature_width: int) -> None:
        super().__init__()
        self.features = features
        self.head = head
        self.feature_width = feature_width
        self.batch_norm: BatchNormMode = "train"
        self.frozen: frozenset[str] = frozenset()
        self.added: frozenset[str] = frozenset()

    def train(self: _Network, mode: bool = True) -> _Network:
        """Set the training mode; frozen batch normalization stays in evaluation mode."""
        super().train(mode)
        for layer in self.frozen_norms():
            layer.eval()
        return self

    def frozen_norms(self) -> list[nn.Module]:
        """Return the layers whose running statistics training does not update."""
        return [*batch_norm_layers(self)] if self.batch_norm == "frozen" else []

    def adopt(self, loaded: Collection[str]) -> None:
        """Derive weights that depend on others after some were loaded.

        Args:
            loaded: names of the entries of the state dict that were loaded.
        """

    def forward(self, inputs: Tensor) -> Tensor:
        """Map images ``[B, channels, H, W]`` to logits ``[B, C]``."""
        return self._logits(self.features(inputs))

    def outputs(self, inputs: Tensor) -> Outputs:
        """Compute all outputs that a loss may read, from images ``[B, channels, H, W]``."""
        features = self.features(inputs)
        return Outputs(features, self._logits(features))

    def _logits(self, features: Tensor) -> Tensor:
        """Apply the head in float32, also under autocast.

        Cosines and logits in 16 bits tie, and ``argmax`` gives ties to the class with the most images.
        """
        with autocast("float32", features.device):
            logits: Tensor = self.head(at_least_float32(features))
        return logits
