"""Entropy-SGD (Chaudhari et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass

from fastsam.longtail.optimizers.base import (
    BasedSettings,
    OptimizerPart,
    register_optimizer,
)
from fastsam.longtail.settings import Entry, layer, setting
from fastsam.optim import EntropySGD

_PAPER = "Chaudhari et al. 2017, section 4.2"
_UNTUNED = "starting point; the paper names no value"


@dataclass(frozen=True, kw_only=True)
class EntropySGDSettings(BasedSettings):
    """Settings of Entropy-SGD."""

    entropy_steps: int = setting(
        "Langevin steps per step of Entropy-SGD, each on the next batch",
        default=Entry(5, _UNTUNED, known=False),
        low=1,
        high=10**6,
        argument="steps",
    )
    entropy_lr: float = setting(
        "step size of the Langevin dynamics",
        default=Entry(0.1, _PAPER),
        above=0,
        argument="inner_lr",
    )
    entropy_gamma: float = setting(
        "strength of the pull of the Langevin dynamics towards the current weights",
        default=Entry(0.03, _UNTUNED, known=False),
        above=0,
        argument="gamma",
    )
    entropy_noise: float = setting(
        "scale of the noise of the Langevin dynamics",
        default=Entry(0.0001, _PAPER),
        low=0,
        argument="noise",
    )
    entropy_alpha: float = setting(
        "decay of the running mean of the Langevin iterates",
        default=Entry(0.75, _PAPER),
        low=0,
        high=1,
        argument="alpha",
    )


register_optimizer(
    OptimizerPart(
        name="entropy-sgd",
        build=lambda settings, inputs: EntropySGD(
            settings.base(inputs), seed=inputs.seed, **settings.arguments()
        ),
        settings=EntropySGDSettings,
        summary="descent on the local entropy by Langevin dynamics",
        recipe=layer("moves all the way to the running mean", known=False, lr=1.0, momentum=0.0),
    )
)
