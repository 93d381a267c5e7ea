"""Base optimizers, which make the updates. Each file defines and registers one."""

from fastsam.longtail.base_optimizers.adam import AdamSettings
from fastsam.longtail.base_optimizers.base import (
    BASE_OPTIMIZERS,
    BaseOptimizer,
    OptimizerInputs,
    OptimizerSettings,
    register_base_optimizer,
)
from fastsam.longtail.base_optimizers.sgd import SGDSettings
from fastsam.longtail.base_optimizers.torch_optim import TorchSettings

__all__ = [
    "BASE_OPTIMIZERS",
    "AdamSettings",
    "BaseOptimizer",
    "OptimizerInputs",
    "OptimizerSettings",
    "SGDSettings",
    "TorchSettings",
    "register_base_optimizer",
]
