"""Linear head with bias, and the settings of heads that contain one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from fastsam.longtail.models.heads.base import Head, register_head
from fastsam.longtail.settings import Settings, setting

HeadInit = Literal["he", "torch"]


@dataclass(frozen=True, kw_only=True)
class LinearSettings(Settings):
    """Settings of a linear head."""

    head_init: HeadInit = setting(
        "initial weights of a linear head: he (He et al.'s normal) or torch (that of nn.Linear)",
        before="he",
    )


def build_linear(settings: LinearSettings, in_features: int, num_classes: int) -> nn.Linear:
    """Create a freshly initialized linear head."""
    linear = nn.Linear(in_features, num_classes)
    if settings.head_init == "he":
        nn.init.kaiming_normal_(linear.weight)
    return linear


def inner_linear(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a linear head as entries of a head that contains it as ``linear``."""
    return {f"linear.{name}": value for name, value in weights.items()}


register_head(
    Head(
        name="linear",
        summary="linear with bias",
        build=build_linear,
        settings=LinearSettings,
        from_linear=dict,
    )
)
