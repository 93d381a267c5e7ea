"""The Lanczos step in PyTorch operations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastsam.kernels.lanczos import Recurrence

_BREAKDOWN_FACTOR = 64.0
"""A Krylov space is exhausted where ``beta <= 64 eps ||T||``: what remains is rounding noise."""


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
    """See :func:`fastsam.kernels.lanczos.orthogonalize`; dots add in the dtype of ``rows``."""
    column = vector[:, :, None]
    first = rows @ column
    vector -= (rows.mT @ first)[:, :, 0]
    second = rows @ column
    vector -= (rows.mT @ second)[:, :, 0]
    # Squares of very small or large elements leave the dtype; those of shares of the largest do not.
    largest = vector.abs().amax(dim=1, keepdim=True)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    share = vector / largest
    length = torch.linalg.vector_norm(share, dim=1, keepdim=True)
    kind = recurrence.alpha.dtype
    alpha = (first + second)[:, -1, 0].to(kind)
    beta = (largest * length)[:, 0].to(kind)
    continues = _advance(recurrence, alpha, beta, step=step, eps=eps)
    if successor is not None:
        # Selection, not a product with 0: a probe that broke down may hold inf or NaN.
        unit = share / torch.where(length > 0, length, torch.ones_like(length))
        successor.copy_(torch.where(continues[:, None], unit, torch.zeros_like(unit)))


def _advance(
    recurrence: Recurrence, alpha: Tensor, beta: Tensor, *, step: int, eps: float
) -> Tensor:
    """Write column ``step`` of the recurrence and return which probes go on."""
    active = recurrence.active.bool()
    zero = torch.zeros_like(beta)
    previous = recurrence.beta[:, step - 1] if step > 0 else zero
    # The largest absolute row sum of T. A NaN propagates, so that the reader of the recurrence reports it.
    bound = torch.maximum(recurrence.bound, alpha.abs() + previous + beta)
    recurrence.bound.copy_(torch.where(active, bound, recurrence.bound))
    continues = active & ~(beta <= _BREAKDOWN_FACTOR * eps * recurrence.bound)
    recurrence.alpha[:, step] = torch.where(active, alpha, zero)
    recurrence.beta[:, step] = torch.where(continues, beta, zero)
    recurrence.steps_taken += active
    recurrence.active.copy_(continues)
    return continues
