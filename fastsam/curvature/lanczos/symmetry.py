"""Check during a run that the operator is symmetric."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsam.curvature.operators.base import AsymmetryError
from fastsam.kernels.backends import widened
from fastsam.kernels.lanczos import Recurrence


class Symmetry:
    """Checks that ``q_{j-1} . A q_j`` equals beta_{j-1}, as for a symmetric A, without host waits.

    Attributes:
        asymmetry: the largest difference so far relative to the operator's norm, float64
            ``[probes]``.
        tolerated: the largest difference that rounding may explain. It is far above eps, because a
            product accumulates the errors of many operations.
    """

    def __init__(self, recurrence: Recurrence, *, eps: float) -> None:
        self._recurrence = recurrence
        self.tolerated = eps**0.4
        self.asymmetry = torch.zeros_like(recurrence.bound)

    def look(self, step: int, previous: Tensor, image: Tensor) -> None:
        """Check one step, given q_{j-1} and A q_j, ``[probes, n]`` each."""
        overlap = widened(torch.linalg.vecdot(previous, image))
        gap = (overlap - self._recurrence.beta[:, step - 1]).abs()
        norm = widened(torch.linalg.vector_norm(image, dim=1))
        share = gap / torch.maximum(norm, self._recurrence.bound)
        share = torch.where(self._recurrence.active.bool(), share, 0)
        torch.maximum(self.asymmetry, share, out=self.asymmetry)


def refuse_asymmetric(asymmetry: float, *, eps: float) -> None:
    """Refuse an operator whose products differ from those of its transpose by more than rounding."""
    if asymmetry > eps**0.4:
        raise AsymmetryError(asymmetry)
