"""The first half of a SAM step as an optimizer of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from fastsam.optim._engine.outer import OuterOptimizer
from fastsam.optim._engine.untraced import untraced


class AscentStep(OuterOptimizer):
    """The optimizer that :attr:`fastsam.SAM.ascent` returns, whose ``step()`` makes the ascent.

    A gradient scaler checks an optimizer once between two updates, so each half of a step needs its own.

    Args:
        optimizer: whose parameter groups and state this one has.
        climb: makes the ascent, given a scaler's ``grad_scale`` and ``found_inf``.
    """

    _step_supports_amp_scaling = True

    def __init__(self, optimizer: Optimizer, climb: Callable[..., None]) -> None:
        super().__init__(optimizer, {})
        self._climb = climb

    @untraced
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make ``first_step()`` with gradients that may still carry a scaler's loss scale."""
        if closure is not None:
            raise TypeError(
                "the ascent step takes no closure: run the first backward pass before it"
            )
        found_inf = getattr(self, "found_inf", None)
        if not all(group["perturb"] for group in self.param_groups):
            # The scaler looked at gradients that this half does not use, too. The norm shows the others.
            found_inf = None
        self._climb(grad_scale=getattr(self, "grad_scale", None), found_inf=found_inf)
