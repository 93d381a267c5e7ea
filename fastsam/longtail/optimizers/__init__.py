"""Optimizers: one file for each, with its settings and its registration."""

from fastsam.longtail.optimizers.base import (
    OPTIMIZERS,
    AscentSettings,
    OptimizerInputs,
    OptimizerPart,
    OptimizerSettings,
    SAMSettings,
    SGDSettings,
    register_optimizer,
)

__all__ = [
    "OPTIMIZERS",
    "AscentSettings",
    "OptimizerInputs",
    "OptimizerPart",
    "OptimizerSettings",
    "SAMSettings",
    "SGDSettings",
    "register_optimizer",
]
