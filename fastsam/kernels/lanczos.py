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
    """The tridiagonal matrices T of all probes, on the device of the basis.

    Attributes:
        alpha: diagonal of T, float64 ``[probes, steps]``.
        beta: off-diagonal of T, float64 ``[probes, steps]``; ``beta[:, j]`` couples steps j and j + 1. It is
            the norm *after* re-orthogonalization, and 0 at a breakdown.
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
        """Maximum number of steps."""
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
        """Return an empty recurrence with all probes active.

        Args:
            probes: number of probes.
            steps: maximum number of steps.
            device: device of the basis.
            dtype: dtype of T: float64 (default), or :func:`fastsam.kernels.backends.sum_dtype` of the basis.
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
    the last row; beta = ||w||; successor = w / beta. A probe with beta <= 64 eps ||T|| becomes inactive: its
    beta and its successor are set to 0, and later steps do not change its T.

    Args:
        rows: basis vectors to orthogonalize against, ``[probes, count, n]``, float32 or float64. The last row
            is the current vector. The last dimension is contiguous; the others may have any stride.
        vector: the operator's product with the current basis vectors, ``[probes, n]``, dtype of ``rows``.
            Overwritten by the orthogonalized, unnormalized residual.
        successor: output for the next basis vectors, ``[probes, n]`` (a view into the basis); None at the
            last step.
        recurrence: T; column ``step`` is written.
        step: index j of this step, from 0.
        eps: machine epsilon of the product's dtype, for the breakdown test.

    Raises:
        ValueError: a shape, dtype, stride or device does not match; nothing was changed.

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
    """Return the recurrence's scratch memory, zero-filled when it is allocated, as its counters require.

    It grows to twice the current number of rows, because each step may add one row and reallocating in every
    step would be slow, but not beyond the number of the last step.
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
        raise ValueError("rows must have at least one basis vector, the current one; got none")
    if probes != recurrence.probes or not 0 <= step < recurrence.steps:
        raise ValueError(
            f"recurrence has {recurrence.probes} probes and {recurrence.steps} steps, which does not match "
            f"{probes} probes at step {step}"
        )
    if backend_of(rows.device) == "native" and recurrence.alpha.dtype != torch.float64:
        raise ValueError(
            f"kernels write the recurrence in float64, got {recurrence.alpha.dtype}; omit dtype= of "
            "Recurrence.start()"
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
            raise ValueError(f"{name} must be on {rows.device} like rows, got {tensor.device}")
    for name, tensor in (("rows", rows), ("vector", vector), ("successor", successor)):
        if tensor is not None and size > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"the last dimension of {name} must be contiguous, got strides {tensor.stride()}"
            )
    if not vector.is_contiguous():
        raise ValueError(f"vector must be contiguous, got strides {vector.stride()}")
    if recurrence.alpha.device != rows.device:
        raise ValueError(
            f"recurrence must be on {rows.device} like rows, got {recurrence.alpha.device}"
        )
