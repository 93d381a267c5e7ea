"""The fused Lanczos step: two Gram-Schmidt passes in three reads of the basis, then the recurrence."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastsam.kernels import extension
from fastsam.kernels.backends import backend_of
from fastsam.kernels.torch_ops import lanczos as torch_lanczos


@dataclass(eq=False)
class Recurrence:
    """The tridiagonal matrices T of all probes, kept on the device of the basis.

    Attributes:
        alpha: diagonal of T, float64 ``[probes, steps]``.
        beta: off-diagonal of T, float64 ``[probes, steps]``; ``beta[:, j]`` joins steps j and j + 1 and is
            the norm *after* re-orthogonalization, 0 where the run broke down.
        bound: running upper bound on the norm of T (largest absolute row sum), float64 ``[probes]``.
        active: uint8 ``[probes]``; 0 once a probe's Krylov space is exhausted.
        steps_taken: int64 ``[probes]``; the order of each probe's T.
    """

    alpha: Tensor
    beta: Tensor
    bound: Tensor
    active: Tensor
    steps_taken: Tensor
    _scratch: Tensor | None = field(default=None, repr=False)

    @property
    def probes(self) -> int:
        """Number of probes."""
        return self.alpha.shape[0]

    @property
    def steps(self) -> int:
        """Most steps that the recurrence can hold."""
        return self.alpha.shape[1]

    @classmethod
    def start(
        cls,
        probes: int,
        steps: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
    ) -> Recurrence:
        """An empty recurrence of at most ``steps`` steps for ``probes`` probes, all active.

        ``dtype`` is that of T: float64, or :func:`fastsam.kernels.backends.sum_dtype` of the basis.
        """
        return cls(
            alpha=torch.zeros(probes, steps, dtype=dtype, device=device),
            beta=torch.zeros(probes, steps, dtype=dtype, device=device),
            bound=torch.zeros(probes, dtype=dtype, device=device),
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
    """Orthogonalize the product of a Lanczos step and advance the recurrence, without host synchronization.

    With Q = ``rows`` and w = ``vector``: c1 = Q w; w -= Q^T c1 and c2 = Q w; w -= Q^T c2; alpha = c1 + c2 at
    the last row; beta = ||w||; successor = w / beta. A probe whose beta falls to 64 eps ||T|| becomes
    inactive: its beta is recorded as 0, its successor as 0, and later steps leave its T alone.

    Args:
        rows: basis vectors to orthogonalize against, ``[probes, count, n]``, the last of them the current
            one; float32 or float64; the last dimension contiguous, the others of any stride.
        vector: the operator's product with the current basis vectors, ``[probes, n]``, dtype of ``rows``;
            overwritten by the orthogonalized, unnormalized residual.
        successor: where the next basis vectors go, ``[probes, n]`` (a view into the basis); None at the
            last step.
        recurrence: T so far; column ``step`` is written.
        step: index j of this step, from 0.
        eps: machine epsilon of the product's dtype, for the breakdown test.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit; nothing was changed.

    Example:
        >>> import torch
        >>> from fastsam.kernels.lanczos import Recurrence, orthogonalize
        >>> basis = torch.zeros(1, 2, 3, dtype=torch.float64)
        >>> basis[0, 0, 0] = 1
        >>> product = torch.tensor([[3.0, 4.0, 0.0]], dtype=torch.float64)
        >>> recurrence = Recurrence.start(probes=1, steps=2)
        >>> orthogonalize(basis[:, :1], product, basis[:, 1], recurrence, step=0, eps=2.2e-16)
        >>> recurrence.alpha[0, 0].item(), recurrence.beta[0, 0].item(), basis[0, 1].tolist()
        (3.0, 4.0, [0.0, 1.0, 0.0])
    """
    _check(rows, vector, successor, recurrence, step)
    if backend_of(rows.device) == "torch":
        torch_lanczos.orthogonalize(rows, vector, successor, recurrence, step=step, eps=eps)
        return
    probes, count, size = rows.shape
    backend = extension.backend(rows.device)
    backend.orthogonalize(
        extension.execution(rows.device),
        extension.DTYPE_CODES[rows.dtype],
        extension.module().LanczosStep(
            rows=rows.data_ptr(),
            probe_stride=rows.stride(0),
            row_stride=rows.stride(1),
            vector=vector.data_ptr(),
            successor=0 if successor is None else successor.data_ptr(),
            successor_stride=0 if successor is None else successor.stride(0),
            probes=probes,
            count=count,
            size=size,
            step=step,
            eps=eps,
        ),
        extension.module().Recurrence(
            alpha=recurrence.alpha.data_ptr(),
            beta=recurrence.beta.data_ptr(),
            bound=recurrence.bound.data_ptr(),
            active=recurrence.active.data_ptr(),
            steps_taken=recurrence.steps_taken.data_ptr(),
            steps=recurrence.steps,
        ),
        _scratch(recurrence, backend, rows, step).data_ptr(),
    )
    written = [vector, recurrence.alpha, recurrence.beta, recurrence.bound]
    written += [recurrence.active, recurrence.steps_taken]
    torch.autograd.graph.increment_version(written if successor is None else [*written, successor])


def _scratch(recurrence: Recurrence, backend: Any, rows: Tensor, step: int) -> Tensor:
    """The recurrence's scratch memory. Its counters must start as zeros.

    Grows to twice the rows at hand, at most to those of the last step, since each step may add one row.
    """
    probes, count, size = rows.shape
    needed = backend.orthogonalize_scratch_bytes(probes, count, size)
    if recurrence._scratch is None or recurrence._scratch.numel() < needed:
        last = count + recurrence.steps - 1 - step
        room = backend.orthogonalize_scratch_bytes(probes, min(2 * count, last), size)
        recurrence._scratch = torch.zeros(room, dtype=torch.uint8, device=rows.device)
    return recurrence._scratch


def _check(
    rows: Tensor, vector: Tensor, successor: Tensor | None, recurrence: Recurrence, step: int
) -> None:
    if rows.dim() != 3 or rows.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"rows must be [probes, count, n] in float32 or float64, got {tuple(rows.shape)} {rows.dtype}"
        )
    probes, count, size = rows.shape
    if count < 1:
        raise ValueError("rows must hold at least one basis vector, the current one")
    if probes != recurrence.probes or not 0 <= step < recurrence.steps:
        raise ValueError(
            f"recurrence holds {recurrence.probes} probes and {recurrence.steps} steps, "
            f"which does not fit {probes} probes at step {step}"
        )
    for name, tensor in (("vector", vector), ("successor", successor)):
        if tensor is None:
            continue
        if tensor.shape != (probes, size) or tensor.dtype != rows.dtype:
            raise ValueError(
                f"{name} must be {(probes, size)} {rows.dtype} like rows, "
                f"got {tuple(tensor.shape)} {tensor.dtype}"
            )
        if tensor.device != rows.device:
            raise ValueError(f"{name} is on {tensor.device}, rows on {rows.device}")
    for name, tensor in (("rows", rows), ("vector", vector), ("successor", successor)):
        if tensor is not None and size > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"the last dimension of {name} must be contiguous")
    if not vector.is_contiguous():
        raise ValueError("vector must be contiguous")
    if recurrence.alpha.device != rows.device:
        raise ValueError(f"recurrence is on {recurrence.alpha.device}, rows on {rows.device}")
