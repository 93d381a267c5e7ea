"""The fused Lanczos step: two Gram-Schmidt passes in three reads of the basis, then the recurrence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastsam.kernels import reference


@dataclass(eq=False)
class Recurrence:
    """The tridiagonal matrices T of all probes, kept on the device of the basis.

    Attributes:
        alpha: diagonal of T, float64 ``[probes, steps]``.
        beta: off-diagonal of T, float64 ``[probes, steps]``; ``beta[:, j]`` joins steps j and j + 1 and is
            the norm *after* re-orthogonalisation, 0 where the run broke down.
        bound: running upper bound on the norm of T (largest absolute row sum), float64 ``[probes]``.
        active: uint8 ``[probes]``; 0 once a probe's Krylov space is exhausted.
        steps_taken: int64 ``[probes]``; the order of each probe's T.
    """

    alpha: Tensor
    beta: Tensor
    bound: Tensor
    active: Tensor
    steps_taken: Tensor

    @classmethod
    def start(cls, probes: int, steps: int, *, device: torch.device | str = "cpu") -> Recurrence:
        """An empty recurrence of at most ``steps`` steps for ``probes`` probes, all active."""
        return cls(
            alpha=torch.zeros(probes, steps, dtype=torch.float64, device=device),
            beta=torch.zeros(probes, steps, dtype=torch.float64, device=device),
            bound=torch.zeros(probes, dtype=torch.float64, device=device),
            active=torch.ones(probes, dtype=torch.uint8, device=device),
            steps_taken=torch.zeros(probes, dtype=torch.int64, device=device),
        )


def orthogonalize(
    rows: Tensor,
    vector: Tensor,
    successor: Tensor | None,
    recurrence: Recurrence,
    *,
    step: int,
    eps: float,
) -> None:
    """Orthogonalise the product of a Lanczos step and advance the recurrence, without host synchronisation.

    With Q = ``rows`` and w = ``vector``: c1 = Q w; w -= Q^T c1 and c2 = Q w; w -= Q^T c2; alpha = c1 + c2 at
    the last row; beta = ||w||; successor = w / beta. A probe whose beta falls to 64 eps ||T|| becomes
    inactive: its beta is recorded as 0, its successor as 0, and later steps leave its T alone.

    Args:
        rows: basis vectors to orthogonalise against, ``[probes, count, n]``, the last of them the current
            one; float32 or float64; the last dimension contiguous, the others of any stride.
        vector: the operator's product with the current basis vectors, ``[probes, n]``, dtype of ``rows``;
            overwritten by the orthogonalised, unnormalised residual.
        successor: where the next basis vectors go, ``[probes, n]`` (a view into the basis); None at the
            last step.
        recurrence: T so far; column ``step`` is written.
        step: index j of this step, from 0.
        eps: machine epsilon of the product's dtype, for the breakdown test.
    """
    reference.orthogonalize(rows, vector, successor, recurrence, step=step, eps=eps)
