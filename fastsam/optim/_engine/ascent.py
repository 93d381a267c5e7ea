"""The first half of a SAM step as a separate optimizer, for gradient scalers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from fastsam.optim._engine.outer import OuterOptimizer
from fastsam.optim._engine.untraced import untraced


class AscentStep(OuterOptimizer):
    """The optimizer behind :attr:`fastsam.SAM.ascent`, whose ``step()`` makes the ascent.

    A gradient scaler checks each optimizer only once between two of its updates, so each half of a SAM step
    needs a separate optimizer object.

    Args:
        optimizer: the optimizer whose parameter groups and state this one shares.
        climb: makes the ascent, given a scaler's ``grad_scale`` and ``found_inf``.
    """

    _step_supports_amp_scaling = True

    def __init__(self, optimizer: Optimizer, climb: Callable[..., None]) -> None:
        super().__init__(optimizer, {})
        self.climb = climb  # a public name: copies and pickles omit private attributes

    @untraced
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make ``first_step()``, with gradients that a scaler may not have unscaled yet."""
        if closure is not None:
            raise TypeError(
                "optimizer.ascent.step() takes no closure: run the first backward pass before it"
            )
        found_inf = getattr(self, "found_inf", None)
        if not all(group["perturb"] for group in self.param_groups):
            # The scaler's flag covers gradients that the ascent does not use. The norm of those that it does
            # use is inf or NaN if one of them is, so nothing is missed without the flag.
            found_inf = None
        try:
            self.climb(grad_scale=getattr(self, "grad_scale", None), found_inf=found_inf)
        except BaseException:
            drop_loss_scale(self)
            raise


def drop_loss_scale(optimizer: Optimizer) -> None:
    """Delete a scaler's ``grad_scale`` and ``found_inf`` after an error in ``optimizer.step()``.

    ``torch.amp.GradScaler`` deletes them only if ``step()`` returns, and multiplies the scale of its next
    call by one that it finds.
    """
    for name in ("grad_scale", "found_inf"):
        vars(optimizer).pop(name, None)
