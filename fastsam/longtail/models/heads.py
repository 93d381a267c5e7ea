"""Heads of a classifier: linear or cosine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastsam.longtail.registry import Registry, RunPart
from fastsam.longtail.settings import Settings, setting

HeadInit = Literal["he", "torch"]


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


class AffineHead(nn.Module):
    """A head whose logits are those of another head, multiplied by a scale and shifted for each class.

    Args:
        head: maps features ``[B, D]`` to logits ``[B, C]``.
        scale: factor on the logits.
        offset: added to the scaled logits, ``[C]``.

    Example:
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


@dataclass(frozen=True, kw_only=True)
class Head(RunPart):
    """A registered head.

    Attributes:
        build: ``build(settings, in_features, num_classes)`` creates the module.
        set_vectors: ``set_vectors(head, vectors)`` replaces the weights by one vector per class, ``[C, D]``;
            None if the head has none.
    """

    build: Callable[..., nn.Module]
    set_vectors: Callable[[Any, Tensor], None] | None = None


HEADS: Registry[Head] = Registry("head")


@dataclass(frozen=True, kw_only=True)
class LinearSettings(Settings):
    """Settings of a linear head."""

    head_init: HeadInit = setting(
        "initial weights of a linear head: he (He et al.'s normal) or torch (that of nn.Linear)",
        before="he",
    )


@torch.no_grad()
def _set_linear(head: nn.Linear, vectors: Tensor) -> None:
    head.weight.copy_(vectors)
    head.bias.zero_()


@torch.no_grad()
def _set_cosine(head: CosineHead, vectors: Tensor) -> None:
    head.weight.copy_(functional.normalize(vectors, dim=1).T)


def _linear(settings: LinearSettings, in_features: int, num_classes: int) -> nn.Linear:
    linear = nn.Linear(in_features, num_classes)
    if settings.head_init == "he":
        nn.init.kaiming_normal_(linear.weight)
    return linear


HEADS.add(
    Head(
        name="linear",
        summary="linear with bias",
        build=_linear,
        set_vectors=_set_linear,
        settings=LinearSettings,
    )
)
HEADS.add(
    Head(
        name="cosine",
        summary="cosines between normalized features and class vectors",
        build=lambda settings, in_features, num_classes: CosineHead(in_features, num_classes),
        set_vectors=_set_cosine,
    )
)
