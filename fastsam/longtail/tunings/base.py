"""Registry of tunings."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fastsam.longtail.registry import Registry, RunPart


def _no_change(settings: Any, features: nn.Module, num_classes: int) -> None:
    """Leave the network as it is."""


@dataclass(frozen=True, kw_only=True)
class NetworkTuning(RunPart):
    """A tuning. Once it is registered, ``--tune NAME`` trains with it.

    Attributes:
        build: ``build(settings, features, num_classes)`` adds modules to a feature extractor, in place. It
            must keep the names of the existing weights, and the outputs must not change. Stored networks are
            rebuilt by it too. By default nothing is added.
        trained: ``trained(features)`` returns the names of the parameters of the feature extractor that are
            trained; None to train all.
    """

    build: Callable[[Any, nn.Module, int], None] = field(default=_no_change)
    trained: Callable[[nn.Module], Collection[str]] | None = None


TUNINGS: Registry[NetworkTuning] = Registry("tuning", "fastsam.longtail.tunings")
register_tuning = TUNINGS.add
