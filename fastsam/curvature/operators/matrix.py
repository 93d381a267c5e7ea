"""The operator of an explicit matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsam.curvature.operators.algebra import CallableOperator


class MatrixOperator(CallableOperator):
    """The operator of an explicit symmetric matrix.

    Args:
        matrix: a dense tensor or NumPy array ``[n, n]``, float32 or float64.

    Raises:
        TypeError: the matrix is neither a tensor nor an array.
        ValueError: the matrix is sparse, of another dtype, empty, not square, not symmetric (beyond
            rounding) or not finite.

    Example:
        >>> MatrixOperator(torch.eye(2, dtype=torch.float64)).shape
        (2, 2)
    """

    def __init__(self, matrix: Tensor | NDArray[Any]) -> None:
        if isinstance(matrix, np.ndarray):
            if matrix.dtype not in (np.float32, np.float64):
                raise ValueError(
                    f"expected a matrix of float32 or float64, got {matrix.dtype}; convert it with "
                    "matrix.astype('float64')"
                )
            matrix = torch.from_numpy(np.ascontiguousarray(matrix))
        if not isinstance(matrix, Tensor):
            raise TypeError(
                f"expected a torch tensor or a NumPy array, got {type(matrix).__name__}; pass a "
                "SciPy matrix as from_scipy(aslinearoperator(matrix), symmetric=True)"
            )
        if matrix.layout is not torch.strided:
            raise ValueError(
                f"expected a dense matrix, got layout {matrix.layout}; use matrix.to_dense(), or "
                "CallableOperator(lambda rows: (matrix @ rows.T).T, dimension=n, dtype=...)"
            )
        if matrix.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"expected a matrix of float32 or float64, got {matrix.dtype}; convert it with "
                "matrix.double()"
            )
        if matrix.numel() == 0:
            raise ValueError(f"expected a matrix of at least 1x1, got shape {tuple(matrix.shape)}")
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"expected a square matrix, got shape {tuple(matrix.shape)}")
        if not bool(torch.isfinite(matrix).all()):
            raise ValueError("the matrix contains NaN or infinity; expected finite elements")
        largest = matrix.abs().max()
        if float((matrix - matrix.T).abs().max()) > 1e3 * torch.finfo(matrix.dtype).eps * largest:
            raise ValueError(
                "the matrix is not symmetric; Lanczos requires a symmetric operator, for example "
                "(matrix + matrix.T) / 2"
            )
        super().__init__(
            lambda vectors: vectors @ matrix.T,
            dimension=matrix.shape[0],
            dtype=matrix.dtype,
            device=matrix.device,
        )
