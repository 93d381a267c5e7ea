"""What every native kernel computes, written in plain PyTorch and meant to be read.

Each function has the name and the meaning of the native call of the same name. They are the oracles of
the kernel tests; nothing in the library calls them at run time. They favour clarity over speed, run on
any device and dtype, and accumulate every sum in float64, as the native kernels do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastsam.kernels.lanczos import Recurrence

BREAKDOWN_FACTOR = 64.0
"""A Lanczos run ends where ``beta <= BREAKDOWN_FACTOR * eps * ||T||``: the rest is rounding noise."""


def orthogonalize(
    rows: Tensor,
    vector: Tensor,
    successor: Tensor | None,
    recurrence: Recurrence,
    *,
    step: int,
    eps: float,
) -> None:
    """Two Gram-Schmidt passes of ``vector`` against ``rows``, then one step of the Lanczos recurrence.

    See :func:`fastsam.kernels.lanczos.orthogonalize` for the arguments.
    """
    basis = rows.double()  # [probes, count, n]
    active = recurrence.active.bool()
    first = torch.einsum("pkn,pn->pk", basis, vector.double())
    vector -= torch.einsum("pkn,pk->pn", basis, first).to(vector.dtype)
    second = torch.einsum("pkn,pn->pk", basis, vector.double())
    vector -= torch.einsum("pkn,pk->pn", basis, second).to(vector.dtype)
    alpha = first[:, -1] + second[:, -1]
    beta = vector.double().square().sum(dim=1).sqrt()
    previous = recurrence.beta[:, step - 1] if step > 0 else torch.zeros_like(beta)

    # The largest absolute row sum of T bounds its spectral norm from above.
    bound = torch.maximum(recurrence.bound, alpha.abs() + previous + beta)
    recurrence.bound.copy_(torch.where(active, bound, recurrence.bound))
    continues = active & ~(beta <= BREAKDOWN_FACTOR * eps * recurrence.bound)
    zero = torch.zeros_like(beta)
    recurrence.alpha[:, step] = torch.where(active, alpha, zero)
    recurrence.beta[:, step] = torch.where(continues, beta, zero)
    recurrence.steps_taken += active.to(recurrence.steps_taken.dtype)
    recurrence.active.copy_(continues)
    if successor is not None:
        # Selection, not a product with 0: a probe that broke down may hold inf or NaN.
        quotient = vector.double() / torch.where(continues, beta, torch.ones_like(beta))[:, None]
        successor.copy_(torch.where(continues[:, None], quotient, torch.zeros_like(quotient)))
