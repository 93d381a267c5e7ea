"""Optimizers. Each file defines one optimizer with its settings, and registers it."""

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
