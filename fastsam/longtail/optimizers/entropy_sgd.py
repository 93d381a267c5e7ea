"""Entropy-SGD (Chaudhari et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass

from fastsam.longtail.optimizers.base import (
    OptimizerInputs,
    OptimizerPart,
    SGDSettings,
    register_optimizer,
)
from fastsam.longtail.settings import layer, setting
from fastsam.optim import EntropySGD

_PAPER = "Chaudhari et al. 2017, section 4.2"
_UNTUNED = "starting point; the paper names no value"


@dataclass(frozen=True, kw_only=True)
class EntropySGDSettings(SGDSettings):
    """Settings of Entropy-SGD."""

    entropy_steps: int = setting(
        "Langevin steps, a batch each",
        default=5,
        source=_UNTUNED,
        known=False,
        low=1,
        high=10**6,
    )
    entropy_lr: float = setting("step size of the dynamics", default=0.1, source=_PAPER, above=0)
    entropy_gamma: float = setting(
        "pull towards the weights of the step",
        default=0.03,
        source=_UNTUNED,
        known=False,
        above=0,
    )
    entropy_noise: float = setting("thermal noise", default=1e-4, source=_PAPER, low=0)
    entropy_alpha: float = setting(
        "memory of the running mean", default=0.75, source=_PAPER, low=0, high=1
    )


def _build(settings: EntropySGDSettings, inputs: OptimizerInputs) -> EntropySGD:
    return EntropySGD(
        settings.sgd(inputs),
        steps=settings.entropy_steps,
        inner_lr=settings.entropy_lr,
        gamma=settings.entropy_gamma,
        noise=settings.entropy_noise,
        alpha=settings.entropy_alpha,
        seed=inputs.seed,
    )


register_optimizer(
    OptimizerPart(
        name="entropy-sgd",
        build=_build,
        settings=EntropySGDSettings,
        summary="descent on the local entropy by Langevin dynamics",
        recipe=layer("moves all the way to the running mean", known=False, lr=1.0, momentum=0.0),
    )
)
