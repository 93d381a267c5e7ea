"""Low-pass-filtered SGD (Bisla et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastsam.longtail.errors import UsageError
from fastsam.longtail.optimizers.base import (
    BasedSettings,
    OptimizerPart,
    register_optimizer,
)
from fastsam.longtail.settings import Entry, setting
from fastsam.optim import LPFSGD

_SOURCE = "code of Bisla et al. 2022 (CIFAR); the values behind Table 4 are not published"


@dataclass(frozen=True, kw_only=True)
class LPFSGDSettings(BasedSettings):
    """Settings of LPF-SGD."""

    lpf_gamma: float = setting(
        "noise scale of LPF-SGD, relative to the norm of each filter",
        default=Entry(0.002, _SOURCE, known=False),
        low=0,
        argument="gamma",
    )
    lpf_parts: int = setting(
        "number of parts of a batch in LPF-SGD, each with its own noise",
        default=Entry(1, _SOURCE, known=False),
        low=1,
        argument="parts",
    )

    def check(self, run: Mapping[str, Any]) -> None:
        """Check that a batch has at least one image for every part."""
        super().check(run)
        if self.lpf_parts > run["batch_size"]:
            raise UsageError(
                f"lpf_parts must be at most batch_size ({run['batch_size']}), got {self.lpf_parts}"
            )


register_optimizer(
    OptimizerPart(
        name="lpf-sgd",
        build=lambda settings, inputs: LPFSGD(
            settings.base(inputs), seed=inputs.seed, **settings.arguments()
        ),
        settings=LPFSGDSettings,
        summary="low-pass-filtered SGD: gradients averaged over filter-normalized noise",
    )
)
