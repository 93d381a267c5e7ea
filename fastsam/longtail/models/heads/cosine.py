"""Cosine head."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastsam.longtail.models.heads.base import Head, register_head


class CosineHead(nn.Module):
    """Cosine head: logits are cosines between the features and one vector per class, without bias.

    Args:
        in_features: length D of the feature vector.
        num_classes: number of classes C.

    Example:
        >>> CosineHead(64, 10)(torch.ones(2, 64)).shape
        torch.Size([2, 10])
    """

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        weight = torch.empty(in_features, num_classes).uniform_(-1, 1)
        # Normalize the columns. renorm_ only shortens them, so it gets a tiny bound and mul_ undoes it.
        self.weight = nn.Parameter(weight.renorm_(2, 1, 1e-5).mul_(1e5))  # [D, C]

    def forward(self, features: Tensor) -> Tensor:
        """Map features ``[B, D]`` to cosines ``[B, C]``."""
        return functional.normalize(features, dim=1) @ functional.normalize(self.weight, dim=0)


@torch.no_grad()
def set_directions(head: CosineHead, vectors: Tensor) -> None:
    """Replace the class vectors by the directions of others, ``[C, D]``."""
    head.weight.copy_(functional.normalize(vectors, dim=1).T)


def directions(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take over the directions of the class vectors. A cosine head has no bias."""
    return {"weight": functional.normalize(weights["weight"], dim=1).T.contiguous()}


register_head(
    Head(
        name="cosine",
        summary="cosines between normalized features and class vectors",
        build=lambda settings, in_features, num_classes: CosineHead(in_features, num_classes),
        logits="cosine",
        from_linear=directions,
        set_vectors=set_directions,
    )
)
