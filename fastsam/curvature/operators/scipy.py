"""Conversion from and to SciPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsam.curvature.operators.algebra import CallableOperator
from fastsam.curvature.operators.base import Operator
from fastsam.extras import requires_extra


def from_scipy(linear_operator: Any, *, symmetric: bool) -> CallableOperator:
    """Convert a SciPy ``LinearOperator``, or an object with its ``shape``, ``dtype`` and ``matmat``.

    Args:
        linear_operator: real and square; its products run on the CPU.
        symmetric: pass ``True`` to confirm that the operator is symmetric, which Lanczos requires
            and SciPy does not record.

    Raises:
        ValueError: the operator is not square, not real, or not confirmed to be symmetric.

    Example:
        >>> from scipy.sparse.linalg import aslinearoperator
        >>> from_scipy(aslinearoperator(np.eye(3)), symmetric=True).shape
        (3, 3)
    """
    if not symmetric:
        raise ValueError(
            "Lanczos requires a symmetric operator; pass symmetric=True to confirm that it is"
        )
    rows, columns = linear_operator.shape
    if rows != columns:
        raise ValueError(f"expected a square operator, got shape {linear_operator.shape}")
    kind = np.dtype(linear_operator.dtype)
    if kind.kind not in "fiub":
        raise ValueError(f"expected a real operator, got dtype {kind}")
    dtype = torch.float32 if kind == np.float32 else torch.float64

    def product(vectors: Tensor) -> Tensor:
        images = linear_operator.matmat(vectors.T.numpy())
        return torch.from_numpy(np.ascontiguousarray(np.asarray(images).T)).to(dtype)

    return CallableOperator(product, dimension=rows, dtype=dtype)


def to_scipy(operator: Operator) -> Any:
    """Convert an operator to a SciPy ``LinearOperator``, for example for ``scipy.sparse.linalg.eigsh``.

    Vectors are copied to the operator's device and back.

    Raises:
        ImportError: SciPy is not installed.

    Example:
        >>> from fastsam.curvature import MatrixOperator
        >>> to_scipy(MatrixOperator(torch.eye(3))).shape
        (3, 3)
    """
    with requires_extra("longtail", "a SciPy LinearOperator"):
        from scipy.sparse.linalg import LinearOperator

    def matmat(columns: Any) -> Any:
        rows = torch.from_numpy(np.ascontiguousarray(np.asarray(columns).T))
        rows = rows.to(dtype=operator.dtype, device=operator.device)
        return operator.matmat(rows).detach().cpu().numpy().T

    def matvec(vector: Any) -> Any:
        return matmat(np.asarray(vector).reshape(-1, 1)).reshape(-1)

    kind = np.float32 if operator.dtype == torch.float32 else np.float64
    return LinearOperator(
        operator.shape, matvec=matvec, rmatvec=matvec, matmat=matmat, rmatmat=matmat, dtype=kind
    )
