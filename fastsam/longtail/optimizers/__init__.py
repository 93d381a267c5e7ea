"""Optimizers. Each file defines one optimizer with its settings, and registers it."""

from fastsam.longtail.base_optimizers.base import OptimizerInputs, OptimizerSettings
from fastsam.longtail.optimizers.alone import alone
from fastsam.longtail.optimizers.base import (
    OPTIMIZERS,
    AscentSettings,
    BasedSettings,
    OptimizerPart,
    SAMSettings,
    register_optimizer,
)

__all__ = [
    "OPTIMIZERS",
    "AscentSettings",
    "BasedSettings",
    "OptimizerInputs",
    "OptimizerPart",
    "OptimizerSettings",
    "SAMSettings",
    "alone",
    "register_optimizer",
]
