"""Symmetric linear operators: the protocol, and operators made of matrices and callables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Operator(Protocol):
    """A symmetric linear map of R^n, known by its products.

    ``matmat`` takes vectors as the rows of a block ``[probes, n]`` and returns their images as the
    rows of a new block of the same shape, dtype and device; it may not change its argument.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, n)``."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the vectors: float32 or float64."""

    @property
    def device(self) -> torch.device:
        """Device of the vectors."""

    def matmat(self, vectors: Tensor) -> Tensor:
        """Images of the rows of ``vectors`` ``[probes, n]``, as rows of the same shape."""


class CallableOperator:
    """An operator given by a function of a block of row vectors.

    Args:
        function: maps ``[probes, n]`` to ``[probes, n]``.
        dimension: n.
        dtype: float32 or float64.
        device: where the vectors live.

    Example:
        >>> double = CallableOperator(lambda rows: 2 * rows, dimension=3)
        >>> double.matmat(torch.ones(1, 3, dtype=torch.float64))
        tensor([[2., 2., 2.]], dtype=torch.float64)
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        *,
        dimension: int,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        if dimension < 1:
            raise ValueError(f"dimension must be at least 1, got {dimension}")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        self._function = function
        self._dimension = dimension
        self._dtype = dtype
        self._device = torch.device(device)

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, n)``."""
        return (self._dimension, self._dimension)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the vectors."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Device of the vectors."""
        return self._device

    def matmat(self, vectors: Tensor) -> Tensor:
        """The function's result, its shape and dtype checked."""
        images = self._function(vectors)
        if images.shape != vectors.shape or images.dtype != vectors.dtype:
            raise ValueError(
                f"the operator's function returned {images.dtype} {tuple(images.shape)} for "
                "vectors "
                f"{vectors.dtype} {tuple(vectors.shape)}; it must return the same shape and dtype"
            )
        return images


class MatrixOperator(CallableOperator):
    """The operator of an explicit symmetric matrix ``[n, n]``, float32 or float64.

    Raises:
        ValueError: the matrix is not square, not symmetric (beyond rounding) or not finite.

    Example:
        >>> MatrixOperator(torch.eye(2, dtype=torch.float64)).shape
        (2, 2)
    """

    def __init__(self, matrix: Tensor) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"expected a square matrix, got shape {tuple(matrix.shape)}")
        if not bool(torch.isfinite(matrix).all()):
            raise ValueError("the matrix holds NaN or infinity")
        largest = matrix.abs().max()
        if float((matrix - matrix.T).abs().max()) > 1e3 * torch.finfo(matrix.dtype).eps * largest:
            raise ValueError("the matrix is not symmetric; Lanczos needs a symmetric operator")
        super().__init__(
            lambda vectors: vectors @ matrix.T,
            dimension=matrix.shape[0],
            dtype=matrix.dtype,
            device=matrix.device,
        )
