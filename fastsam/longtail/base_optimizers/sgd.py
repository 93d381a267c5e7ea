"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim import SGD

from fastsam.longtail.base_optimizers.base import (
    BaseOptimizer,
    OptimizerInputs,
    OptimizerSettings,
    register_base_optimizer,
)
from fastsam.longtail.errors import UsageError
from fastsam.longtail.settings import Entry, setting


@dataclass(frozen=True, kw_only=True)
class SGDSettings(OptimizerSettings):
    """Settings of SGD, the base optimizer of every optimizer of the paper."""

    momentum: float = setting("momentum of SGD", default=Entry(0.9, "[code]"), low=0, high=1)
    nesterov: bool = setting("Nesterov momentum", default=Entry(False, "[code]"), before=False)

    def check(self, run: Mapping[str, Any]) -> None:
        """Check that Nesterov momentum has a momentum above 0."""
        super().check(run)
        if self.nesterov and self.momentum == 0:
            raise UsageError(
                "nesterov requires a momentum above 0, got 0; raise momentum or set nesterov=False"
            )

    def state_copies(self) -> int:
        """Return 1 for the momentum buffer, or 0 without momentum."""
        return int(self.momentum > 0)


def _build(settings: SGDSettings, inputs: OptimizerInputs) -> SGD:
    return SGD(
        inputs.parameters,
        lr=inputs.lr,
        momentum=settings.momentum,
        weight_decay=inputs.weight_decay,
        nesterov=settings.nesterov,
    )


register_base_optimizer(
    BaseOptimizer(
        name="sgd",
        build=_build,
        settings=SGDSettings,
        shards=True,
        summary="stochastic gradient descent with momentum",
    )
)
