"""Stochastic gradient descent."""

from fastsam.longtail.optimizers.base import OptimizerPart, SGDSettings, register_optimizer

register_optimizer(
    OptimizerPart(
        name="sgd",
        build=SGDSettings.sgd,
        settings=SGDSettings,
        shards=True,
        summary="stochastic gradient descent with momentum",
    )
)
