"""Sharpness-aware minimization."""

from fastsam.longtail.optimizers.base import OptimizerPart, SAMSettings, register_optimizer
from fastsam.optim import SAM

register_optimizer(
    OptimizerPart(
        name="sam",
        build=lambda settings, inputs: SAM(
            optimizer=settings.base(inputs), rho=settings.rho[0], **settings.ascent(inputs)
        ),
        settings=SAMSettings,
        shards=True,
        summary="sharpness-aware minimization",
    )
)
