"""Linear head with a learnable adjustment of its logits (DisAlign)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastsam.longtail.models.heads.base import Head, register_head
from fastsam.longtail.models.heads.linear import LinearSettings, build_linear, inner_linear
from fastsam.longtail.settings import Entry, setting


class DisAlignHead(nn.Module):
    """Adaptive calibration of the logits z of a frozen linear head: ``(1 + s f_c) z_c + s o_c``.

    Zhang et al., "Distribution Alignment: A Unified Framework for Long-tail Visual Recognition" (CVPR 2021).
    Each class has a factor f and an offset o; the confidence ``s = sigmoid(v . h + u)``
    depends on the features h. This is the form of the authors' code for classification (``DisAlignLinear``
    of Megvii's cvpods). The paper writes
    ``s (a_c z_c + o_c) + (1 - s) z_c``, which is the same with ``a_c = 1 + f_c``. So weight decay pulls f
    toward unchanged logits.

    Args:
        linear: the linear head, with C class vectors. It is frozen.
        scale: initial factors: 1 in the authors' code; 0 starts from the logits of ``linear``.

    Example:
        >>> head = DisAlignHead(nn.Linear(64, 10))
        >>> sum(p.numel() for p in head.parameters() if p.requires_grad)  # 2 C + D + 1
        85
    """

    def __init__(self, linear: nn.Linear, *, scale: float = 1.0) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(requires_grad=False)
        self.scale = nn.Parameter(torch.full((linear.out_features,), scale))
        self.offset = nn.Parameter(torch.zeros(linear.out_features))
        self.confidence = nn.Linear(linear.in_features, 1)
        nn.init.constant_(self.confidence.weight, 0.1)  # as in the authors' code

    def forward(self, features: Tensor) -> Tensor:
        """Map features ``[B, D]`` to logits ``[B, C]``."""
        logits = self.linear(features)
        confidence = self.confidence(features).sigmoid()
        aligned: Tensor = (1 + confidence * self.scale) * logits + confidence * self.offset
        return aligned


@dataclass(frozen=True, kw_only=True)
class DisAlignSettings(LinearSettings):
    """Settings of the head ``disalign``."""

    disalign_scale: float = setting(
        "initial factor of each class in the head disalign; 0 starts from the logits of the linear head",
        default=Entry(1.0, "code of Zhang et al. 2021"),
        low=-1000,
        high=1000,
    )


def _build(settings: DisAlignSettings, in_features: int, num_classes: int) -> DisAlignHead:
    linear = build_linear(settings, in_features, num_classes)
    return DisAlignHead(linear, scale=settings.disalign_scale)


register_head(
    Head(
        name="disalign",
        summary="factor, offset and confidence that adjust the logits of a frozen linear head",
        build=_build,
        settings=DisAlignSettings,
        from_linear=inner_linear,
    )
)
