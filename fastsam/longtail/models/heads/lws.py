"""Linear head with one learnable factor per class (LWS)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastsam.longtail.models.heads.base import Head, register_head
from fastsam.longtail.models.heads.linear import LinearSettings, build_linear, inner_linear
from fastsam.longtail.settings import Entry, setting


class ScaledHead(nn.Module):
    """Learnable weight scaling (LWS): logits ``f_c (w_c . h + b_c)`` with one factor f per class.

    Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition" (ICLR 2020), section
    4. As in the authors' code (``TauNormClassifier.py`` of facebookresearch/classifier-balancing), the
    factors start at 1 and multiply the bias too, and vectors and biases are frozen. Zhong et al. (CVPR 2021)
    train both.

    Args:
        linear: the linear head, with C class vectors.
        trains_vectors: whether class vectors and biases are trained too.

    Example:
        >>> head = ScaledHead(nn.Linear(64, 10))
        >>> [name for name, value in head.named_parameters() if value.requires_grad]
        ['scale']
    """

    def __init__(self, linear: nn.Linear, *, trains_vectors: bool = False) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(trains_vectors)
        self.scale = nn.Parameter(torch.ones(linear.out_features))

    def forward(self, features: Tensor) -> Tensor:
        """Map features ``[B, D]`` to logits ``[B, C]``."""
        logits: Tensor = self.scale * self.linear(features)
        return logits


@dataclass(frozen=True, kw_only=True)
class ScaledHeadSettings(LinearSettings):
    """Settings of the head ``lws``."""

    lws_trains_vectors: bool = setting(
        "also train class vectors and biases, not only the factor of each class",
        default=Entry(False, "code of Kang et al. 2020; True in the code of Zhong et al. 2021"),
    )


def _build(settings: ScaledHeadSettings, in_features: int, num_classes: int) -> ScaledHead:
    linear = build_linear(settings, in_features, num_classes)
    return ScaledHead(linear, trains_vectors=settings.lws_trains_vectors)


register_head(
    Head(
        name="lws",
        summary="one learnable factor per class on a frozen linear head",
        build=_build,
        settings=ScaledHeadSettings,
        from_linear=inner_linear,
    )
)
