"""LookSAM (Liu et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass

from fastsam.longtail.optimizers.base import (
    AscentSettings,
    OptimizerInputs,
    OptimizerPart,
    register_optimizer,
)
from fastsam.longtail.settings import layer, setting
from fastsam.optim import LookSAM


@dataclass(frozen=True, kw_only=True)
class LookSAMSettings(AscentSettings):
    """Settings of LookSAM."""

    look_every: int = setting(
        "steps from one SAM step to the next",
        default=5,
        source="Liu et al. 2022",
        low=1,
        high=10**9,
    )
    look_alpha: float = setting(
        "weight of the reused direction",
        default=0.3,
        source="ours: 0.7, tuned for ViTs by Liu et al. 2022, took the tail of digits-lt from 77 to 54",
        low=0,
    )

    def state_copies(self) -> int:
        """The momentum buffer and the direction."""
        return super().state_copies() + 1


def _build(settings: LookSAMSettings, inputs: OptimizerInputs) -> LookSAM:
    return LookSAM(
        settings.sgd(inputs),
        rho=settings.rho[0],
        every=settings.look_every,
        alpha=settings.look_alpha,
        **settings.ascent_steps(inputs),
    )


register_optimizer(
    OptimizerPart(
        name="looksam",
        build=_build,
        settings=LookSAMSettings,
        summary="SAM at every k-th step, its direction reused in between",
        recipe=layer(
            "starting point; the paper names no value", known=False, rho_schedule="constant"
        ),
    )
)
