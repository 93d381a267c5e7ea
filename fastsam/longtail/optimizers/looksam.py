"""LookSAM (Liu et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass

from fastsam.longtail.optimizers.base import (
    AscentSettings,
    OptimizerPart,
    register_optimizer,
)
from fastsam.longtail.settings import Entry, layer, setting
from fastsam.optim import LookSAM


@dataclass(frozen=True, kw_only=True)
class LookSAMSettings(AscentSettings):
    """Settings of LookSAM."""

    look_every: int = setting(
        "take a full SAM step in every N-th step of LookSAM",
        default=Entry(5, "Liu et al. 2022"),
        low=1,
        high=10**9,
        argument="every",
    )
    look_alpha: float = setting(
        "weight of the direction that LookSAM reuses between SAM steps",
        default=Entry(
            0.3,
            "ours: 0.7, tuned for ViTs by Liu et al. 2022, took the tail of digits-lt from 77 to 54",
        ),
        low=0,
        argument="alpha",
    )

    def state_copies(self) -> int:
        """Return 1 for the direction."""
        return 1


register_optimizer(
    OptimizerPart(
        name="looksam",
        build=lambda settings, inputs: LookSAM(
            settings.base(inputs),
            rho=settings.rho[0],
            **settings.arguments(),
            **settings.ascent(inputs),
        ),
        settings=LookSAMSettings,
        state=("flat_direction",),
        shards=True,
        summary="SAM at every k-th step, reusing its direction in between",
        recipe=layer(
            "starting point; the paper names no value", known=False, rho_schedule="constant"
        ),
    )
)
