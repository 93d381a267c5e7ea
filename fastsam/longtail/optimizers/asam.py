"""Adaptive sharpness-aware minimization (Kwon et al. 2021)."""

from fastsam.longtail.optimizers.base import OptimizerPart, SAMSettings, register_optimizer
from fastsam.longtail.settings import layer
from fastsam.optim import SAM

register_optimizer(
    OptimizerPart(
        name="asam",
        build=lambda settings, inputs: SAM(
            optimizer=settings.base(inputs),
            rho=settings.rho[0],
            adaptive="weights",
            **settings.ascent(inputs),
        ),
        settings=SAMSettings,
        shards=True,
        summary="adaptive sharpness-aware minimization",
        recipe=layer("Kwon et al. 2021 (CIFAR-10)", rho=(0.5,), rho_schedule="constant"),
    )
)
