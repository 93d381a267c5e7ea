"""Base optimizers alone, without an ascent or noise: sgd, adam, adamw and ``torch:NAME``."""

from __future__ import annotations

from fastsam.longtail.base_optimizers.base import BASE_OPTIMIZERS, BaseOptimizer
from fastsam.longtail.base_optimizers.torch_optim import PREFIX, torch_optimizer
from fastsam.longtail.optimizers.base import OPTIMIZERS, OptimizerPart, register_optimizer


def alone(base: BaseOptimizer) -> OptimizerPart:
    """Return the optimizer that consists of a base optimizer only, with its name and settings."""
    return OptimizerPart(
        name=base.name,
        build=base.build,
        settings=base.settings,
        base=base.name,
        shards=base.shards,
        summary=base.summary,
    )


for _part in BASE_OPTIMIZERS.values():
    if _part.package == "fastsam":
        register_optimizer(alone(_part))
OPTIMIZERS.add_family(PREFIX, lambda name: alone(torch_optimizer(name)))
