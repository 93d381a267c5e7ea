"""A head around another head, for logit scales, adjustments and calibrations."""

from __future__ import annotations

from torch import Tensor, nn


class AffineHead(nn.Module):
    """A head whose logits are those of another head, multiplied by a scale and shifted for each class.

    Args:
        head: maps features ``[B, D]`` to logits ``[B, C]``.
        scale: factor on the logits.
        offset: added to the scaled logits, ``[C]``.

    Example:
        >>> import torch
        >>> AffineHead(nn.Identity(), 2.0, torch.tensor([0.0, -1.0]))(torch.ones(1, 2))
        tensor([[2., 1.]])
    """

    def __init__(self, head: nn.Module, scale: float, offset: Tensor) -> None:
        super().__init__()
        self.head = head
        self.scale = scale
        self.register_buffer("offset", offset)

    def forward(self, features: Tensor) -> Tensor:
        """Map features ``[B, D]`` to logits ``[B, C]``."""
        logits: Tensor = self.head(features) * self.scale + self.offset
        return logits
