"""Perturbed gradient descent (Jin et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastsam.longtail.optimizers.base import (
    OptimizerInputs,
    OptimizerPart,
    SGDSettings,
    register_optimizer,
)
from fastsam.longtail.settings import setting
from fastsam.optim import PGD

_UNTUNED = "starting point; the paper names no value"


@dataclass(frozen=True, kw_only=True)
class PGDSettings(SGDSettings):
    """Settings of perturbed gradient descent."""

    noise_sigma: float = setting(
        "standard deviation of the noise", default=1e-4, source=_UNTUNED, known=False, low=0
    )
    noise_on: Literal["gradient", "weights"] = setting(
        "noise on gradient or weights", default="gradient", source=_UNTUNED, known=False
    )


def _build(settings: PGDSettings, inputs: OptimizerInputs) -> PGD:
    return PGD(
        settings.sgd(inputs),
        sigma=settings.noise_sigma,
        noise_on=settings.noise_on,
        seed=inputs.seed,
    )


register_optimizer(
    OptimizerPart(
        name="pgd",
        build=_build,
        settings=PGDSettings,
        summary="perturbed gradient descent: isotropic noise on gradient or weights",
    )
)
