"""Check during a run that the operator is symmetric."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsam.curvature.operators.base import AsymmetryError
from fastsam.kernels.backends import widened
from fastsam.kernels.lanczos import Recurrence


class Symmetry:
    """Checks that ``q_{j-1} . A q_j`` equals beta_{j-1}, as for a symmetric A, without host waits.

    Args:
        recurrence: recurrence of the run.
        eps: machine epsilon of the products.
        earlier: asymmetry of the steps before a resumed run, by probe; empty for a new run.

    Attributes:
        asymmetry: the largest difference so far relative to the operator's norm, float64
            ``[probes]``.
        tolerated: the largest difference that rounding may explain. It is far above eps, because a
            product accumulates the errors of many operations.
    """

    def __init__(
        self, recurrence: Recurrence, *, eps: float, earlier: Sequence[float] = ()
    ) -> None:
        self._recurrence = recurrence
        self.tolerated = eps**0.4
        self.asymmetry = torch.zeros_like(recurrence.bound)
        if earlier:
            self.asymmetry.copy_(torch.tensor(earlier, dtype=torch.float64))

    def look(self, step: int, previous: Tensor, image: Tensor) -> None:
        """Check one step, given q_{j-1} and A q_j, ``[probes, n]`` each."""
        overlap = widened(torch.linalg.vecdot(previous, image))
        gap = (overlap - self._recurrence.beta[:, step - 1]).abs()
        norm = widened(torch.linalg.vector_norm(image, dim=1))
        share = gap / torch.maximum(norm, self._recurrence.bound)
        share = torch.where(self._recurrence.active.bool(), share, 0)
        torch.maximum(self.asymmetry, share, out=self.asymmetry)


def rounding(asymmetry: float, *, eps: float) -> float:
    """Return the largest error of an eigenvalue by rounding, relative to the operator's norm.

    In networks with a small loss, terms of the Hessian cancel, and rounding changes the products by far more
    than eps. It changes the antisymmetric part of the operator, which is 0 without rounding, as much as the
    symmetric part, and a run sees a few entries of the former. In float32, for networks with losses from 1e-2
    to 4e-6, the error of the largest eigenvalue was 0.4 to 7 times the largest entry in the median of six
    runs, and 21 times at most.

    Args:
        asymmetry: the largest entry that was seen, relative to the operator's norm.
        eps: machine epsilon of the products.
    """
    return max(64 * eps, 16 * asymmetry)


def refuse_asymmetric(asymmetry: float, *, eps: float) -> None:
    """Refuse an operator whose products differ from those of its transpose by more than rounding."""
    if asymmetry > eps**0.4:
        raise AsymmetryError(asymmetry)
