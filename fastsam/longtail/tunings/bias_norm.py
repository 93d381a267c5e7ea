"""Biases and the weights of layer normalization are trained."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from fastsam.longtail.errors import UsageError
from fastsam.longtail.tunings.base import NetworkTuning, register_tuning


def _trained(features: nn.Module) -> Collection[str]:
    norms = {
        id(value)
        for module in features.modules()
        if isinstance(module, nn.LayerNorm)
        for value in module.parameters()
    }
    if not norms:
        raise UsageError(
            "tune 'bias-norm' requires layer normalization, which the network does not have; choose a vision "
            "transformer, such as --model timm:vit_base_patch16_224, or omit tune"
        )
    return [
        name
        for name, value in features.named_parameters()
        if id(value) in norms or name.endswith("bias")
    ]


register_tuning(
    NetworkTuning(
        name="bias-norm",
        summary="train the head, all biases and the weights of layer normalization",
        trained=_trained,
    )
)
