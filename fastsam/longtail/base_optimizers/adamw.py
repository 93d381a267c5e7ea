"""AdamW (Loshchilov and Hutter 2019)."""

from __future__ import annotations

from torch.optim import AdamW

from fastsam.longtail.base_optimizers.adam import TORCH, AdamSettings
from fastsam.longtail.base_optimizers.base import BaseOptimizer, register_base_optimizer
from fastsam.longtail.settings import layer

register_base_optimizer(
    BaseOptimizer(
        name="adamw",
        build=lambda settings, inputs: settings.optimizer(AdamW, inputs),
        settings=AdamSettings,
        shards=True,
        summary="Adam whose weight decay shrinks the weights by lr * weight_decay",
        recipe=layer(f"{TORCH}; not tuned", known=False, lr=1e-3, weight_decay=0.01),
    )
)
