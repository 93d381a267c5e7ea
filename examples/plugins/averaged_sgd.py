"""An optimizer as a plug-in: SGD that averages gradients at two nearby points.

An optimizer that needs several gradients a step has a method ``passes()``, a generator that yields a
``Need`` for each of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import SGD

from fastsam.longtail.optimizers import (
    OptimizerInputs,
    OptimizerPart,
    OptimizerSettings,
    register_optimizer,
)
from fastsam.longtail.settings import Entry, setting
from fastsam.optim.passes import Need, Passes


class AveragedSGD(SGD):
    """SGD on the mean of two gradients: at the weights, and after a trial step along the gradient."""

    def __init__(self, params: Any, *, lr: float, weight_decay: float, trial: float) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        self.trial = trial

    @torch.no_grad()
    def passes(self) -> Passes:
        """Take one step: two passes and an update."""
        yield Need()
        trained = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        weights = [p.clone() for p in trained]
        first = [p.grad.clone() for p in trained]
        try:
            for parameter, gradient in zip(trained, first, strict=True):
                parameter.sub_(gradient, alpha=self.trial)
            yield Need()
        finally:
            for parameter, weight in zip(trained, weights, strict=True):
                parameter.copy_(weight)
        for parameter, gradient in zip(trained, first, strict=True):
            parameter.grad.add_(gradient).div_(2)
        self.step()


@dataclass(frozen=True, kw_only=True)
class AveragedSGDSettings(OptimizerSettings):
    """Settings of the optimizer."""

    averaged_sgd_trial: float = setting(
        "length of the trial step, as a factor on the gradient",
        default=Entry(0.01, "an example"),
        low=0,
    )


def _build(settings: AveragedSGDSettings, inputs: OptimizerInputs) -> AveragedSGD:
    return AveragedSGD(
        inputs.parameters,
        lr=inputs.lr,
        weight_decay=inputs.weight_decay,
        trial=settings.averaged_sgd_trial,
    )


register_optimizer(
    OptimizerPart(
        name="averaged-sgd",
        build=_build,
        settings=AveragedSGDSettings,
        summary="SGD on the mean gradient of two nearby points",
    )
)
