"""Perturbed gradient descent (Jin et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastsam.longtail.optimizers.base import (
    BasedSettings,
    OptimizerPart,
    register_optimizer,
)
from fastsam.longtail.settings import Entry, setting
from fastsam.optim import PGD

_UNTUNED = "starting point; the paper names no value"


@dataclass(frozen=True, kw_only=True)
class PGDSettings(BasedSettings):
    """Settings of perturbed gradient descent."""

    noise_sigma: float = setting(
        "standard deviation of the noise of PGD",
        default=Entry(0.0001, _UNTUNED, known=False),
        low=0,
        argument="sigma",
    )
    noise_on: Literal["gradient", "weights"] = setting(
        "where PGD adds noise: gradient or weights",
        default=Entry("gradient", _UNTUNED, known=False),
        argument="noise_on",
    )


register_optimizer(
    OptimizerPart(
        name="pgd",
        build=lambda settings, inputs: PGD(
            settings.base(inputs), seed=inputs.seed, **settings.arguments()
        ),
        settings=PGDSettings,
        summary="perturbed gradient descent: isotropic noise on gradient or weights",
    )
)
