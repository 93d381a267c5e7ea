"""The Lanczos step in PyTorch operations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastsam.kernels.lanczos import Recurrence

_BREAKDOWN_FACTOR = 64.0
"""A Krylov space is exhausted at ``beta <= 64 eps ||T||``: the residual is then rounding noise."""


@torch.no_grad()
def orthogonalize(
    rows: Tensor,
    vector: Tensor,
    successor: Tensor | None,
    recurrence: Recurrence,
    *,
    step: int,
    eps: float,
) -> None:
    """Run :func:`fastsam.kernels.lanczos.orthogonalize`, with dot products in the dtype of ``rows``."""
    column = vector[:, :, None]
    first = rows @ column
    vector -= (rows.mT @ first)[:, :, 0]
    second = rows @ column
    vector -= (rows.mT @ second)[:, :, 0]
    # Squares of very small or large elements underflow or overflow; divide by the largest element first.
    largest = vector.abs().amax(dim=1, keepdim=True)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    share = vector / largest
    length = torch.linalg.vector_norm(share, dim=1, keepdim=True)
    kind = recurrence.alpha.dtype
    alpha = (first + second)[:, -1, 0].to(kind)
    beta = (largest * length)[:, 0].to(kind)
    continues = _advance(recurrence, alpha, beta, step=step, eps=eps)
    if successor is not None:
        # Select instead of multiplying by 0: a probe after a breakdown may have inf or NaN.
        unit = share / torch.where(length > 0, length, torch.ones_like(length))
        successor.copy_(torch.where(continues[:, None], unit, torch.zeros_like(unit)))


def _advance(
    recurrence: Recurrence, alpha: Tensor, beta: Tensor, *, step: int, eps: float
) -> Tensor:
    """Write column ``step`` of the recurrence and return which probes continue, bool ``[probes]``."""
    active = recurrence.active.bool()
    zero = torch.zeros_like(beta)
    previous = recurrence.beta[:, step - 1] if step > 0 else zero
    # The largest absolute row sum of T. ``maximum`` propagates NaN, so that the run can report it.
    bound = torch.maximum(recurrence.bound, alpha.abs() + previous + beta)
    recurrence.bound.copy_(torch.where(active, bound, recurrence.bound))
    continues = active & ~(beta <= _BREAKDOWN_FACTOR * eps * recurrence.bound)
    recurrence.alpha[:, step] = torch.where(active, alpha, zero)
    recurrence.beta[:, step] = torch.where(continues, beta, zero)
    recurrence.steps_taken += active
    recurrence.active.copy_(continues)
    return continues
