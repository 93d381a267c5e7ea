"""Registry of heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from fastsam.longtail.registry import Registry, RunPart

Logits = Literal["linear", "cosine"]
"""Kind of logits: any numbers, or cosines in [-1, 1] that the loss must scale."""


@dataclass(frozen=True, kw_only=True)
class Head(RunPart):
    """A head. Once it is registered, ``--head NAME`` trains it.

    Attributes:
        build: ``build(settings, in_features, num_classes)`` creates the module. Parameters that do not
            require a gradient are not trained.
        logits: kind of its logits. A loss states which kind it requires.
        from_linear: ``from_linear(weights)`` takes over a trained linear head: it maps the state dict of a
            linear head (``weight`` ``[C, D]``, ``bias`` ``[C]``) to the entries of this head's state dict
            that the linear head determines. The other entries keep their initial values. None if the head
            cannot start from a linear head.
    """

    build: Callable[..., nn.Module]
    logits: Logits = "linear"
    from_linear: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None


HEADS: Registry[Head] = Registry("head", "fastsam.longtail.models.heads")
register_head = HEADS.add
