"""Cosine head whose logits are scaled, for losses without a scale of their own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastsam.longtail.models.heads.base import Head, register_head
from fastsam.longtail.models.heads.cosine import CosineHead, directions, set_directions
from fastsam.longtail.settings import Entry, Settings, setting


class ScaledCosineHead(CosineHead):
    """Cosine head with logits ``s cos(h, w_c)``.

    Args:
        in_features: length D of the feature vector.
        num_classes: number of classes C.
        scale: fixed scale s.

    Example:
        >>> import torch
        >>> bool(ScaledCosineHead(64, 10, scale=25)(torch.ones(2, 64)).abs().max() <= 25)
        True
    """

    def __init__(self, in_features: int, num_classes: int, *, scale: float) -> None:
        super().__init__(in_features, num_classes)
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        """Map features ``[B, D]`` to logits ``[B, C]``."""
        return self.scale * super().forward(features)


@dataclass(frozen=True, kw_only=True)
class ScaledCosineSettings(Settings):
    """Settings of the head ``scaled-cosine``."""

    cosine_scale: float = setting(
        "factor on the cosines of the head scaled-cosine",
        default=Entry(25.0, "code of Shi et al. 2024 (shijxcs/LIFT)"),
        above=0,
        high=10**6,
    )


def _build(settings: ScaledCosineSettings, in_features: int, num_classes: int) -> ScaledCosineHead:
    return ScaledCosineHead(in_features, num_classes, scale=settings.cosine_scale)


register_head(
    Head(
        name="scaled-cosine",
        summary="cosines times a fixed scale, for losses that do not scale their logits, such as ce and la",
        build=_build,
        settings=ScaledCosineSettings,
        from_linear=directions,
        set_vectors=set_directions,
    )
)
