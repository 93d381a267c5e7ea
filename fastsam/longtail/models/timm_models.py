"""The networks of timm, named ``timm:NAME``."""

from __future__ import annotations

from functools import partial
from importlib import import_module

from torch import Tensor, nn

from fastsam.extras import requires_extra
from fastsam.longtail.errors import UsageError
from fastsam.longtail.models.base import MODELS, Model

TIMM = "timm:"


class TimmFeatures(nn.Module):
    """A timm network without its classifier, with random initial weights.

    Args:
        name: name in timm.
        channels: channels of the input images.
    """

    def __init__(self, name: str, channels: int) -> None:
        super().__init__()
        with requires_extra("longtail", f"timm:{name}"):
            timm = import_module("timm")
        if not timm.is_model(name):
            raise UsageError(f"timm has no network {name!r}; timm.list_models() lists them")
        self.network = timm.create_model(name, num_classes=0, in_chans=channels)
        # Some networks end with a hidden layer, whose width differs from num_features.
        width = getattr(self.network, "head_hidden_size", None)
        self.out_features: int = width or self.network.num_features

    def forward(self, inputs: Tensor) -> Tensor:
        """Map images ``[B, channels, H, W]`` to features ``[B, out_features]``."""
        features: Tensor = self.network(inputs)
        return features


def _build(name: str, settings: object, channels: int) -> TimmFeatures:
    return TimmFeatures(name, channels)


MODELS.add_family(
    TIMM,
    lambda name: Model(
        name=name,
        build=partial(_build, name.removeprefix(TIMM)),
        summary="timm network",
    ),
)
