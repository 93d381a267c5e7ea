"""Low-pass-filtered SGD (Bisla et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastsam.longtail.errors import UsageError
from fastsam.longtail.optimizers.base import (
    OptimizerInputs,
    OptimizerPart,
    SGDSettings,
    register_optimizer,
)
from fastsam.longtail.settings import setting
from fastsam.optim import LPFSGD

_SOURCE = "code of Bisla et al. 2022 (CIFAR); the values behind Table 4 are not published"


@dataclass(frozen=True, kw_only=True)
class LPFSGDSettings(SGDSettings):
    """Settings of LPF-SGD."""

    lpf_gamma: float = setting(
        "noise relative to the norm of each filter",
        default=0.002,
        source=_SOURCE,
        known=False,
        low=0,
    )
    lpf_parts: int = setting(
        "parts of a batch with their own noise", default=1, source=_SOURCE, known=False, low=1
    )

    def check(self, run: Mapping[str, Any]) -> None:
        """A batch has an image for every part."""
        super().check(run)
        if self.lpf_parts > run["batch_size"]:
            raise UsageError(
                f"lpf_parts must be at least 1 and at most {run['batch_size']}, got {self.lpf_parts}"
            )


def _build(settings: LPFSGDSettings, inputs: OptimizerInputs) -> LPFSGD:
    return LPFSGD(
        settings.sgd(inputs),
        gamma=settings.lpf_gamma,
        parts=settings.lpf_parts,
        seed=inputs.seed,
    )


register_optimizer(
    OptimizerPart(
        name="lpf-sgd",
        build=_build,
        settings=LPFSGDSettings,
        summary="low-pass-filtered SGD: gradients averaged over filter-normalized noise",
    )
)
