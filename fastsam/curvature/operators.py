"""Symmetric linear operators: the protocol, and operators from matrices and callables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsam.extras import requires_extra


@runtime_checkable
class Operator(Protocol):
    """A symmetric linear map of R^n, defined by its products.

    ``matmat`` maps the rows of a block ``[probes, n]`` to the rows of a new block of the same shape,
    dtype and device. It must not change its argument.
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
        """Return the products with the rows of ``vectors``, ``[probes, n]``, as rows."""


class CallableOperator:
    """An operator defined by a function of a block of row vectors.

    Args:
        function: maps ``[probes, n]`` to ``[probes, n]``.
        dimension: n, at least 1.
        dtype: dtype of the vectors: float32 or float64 (default).
        device: device of the vectors. Default: CPU.

    Raises:
        ValueError: ``dimension`` or ``dtype`` is invalid.

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
        """Return the function's result after checking its shape and dtype."""
        return checked_product(self._function(vectors), vectors)


class AsymmetryError(ValueError):
    """Raised if the products of an operator show that it is not symmetric.

    Attributes:
        asymmetry: the largest difference of ``u'(Av)`` and ``v'(Au)`` relative to the norm.
    """

    def __init__(self, asymmetry: float) -> None:
        super().__init__(
            f"the operator is not symmetric: u'(Av) and v'(Au) differ by {asymmetry:.1e} of its "
            "norm, so its Ritz values would be meaningless. Check whether its products change from "
            "call to call; for a model, check for an operation whose second derivative is wrong, "
            "such as torch's weight_norm"
        )
        self.asymmetry = asymmetry


class ResolutionError(ValueError):
    """Raised if the curvature is so small that rounding dominates the products."""


def checked_product(images: Tensor, vectors: Tensor) -> Tensor:
    """Return ``images``, detached, after checking their shape and dtype.

    Raises:
        ValueError: the shape or dtype differs from that of ``vectors``.
    """
    if images.shape != vectors.shape or images.dtype != vectors.dtype:
        raise ValueError(
            f"the operator's product is {images.dtype} {tuple(images.shape)} for vectors "
            f"{vectors.dtype} {tuple(vectors.shape)}; it must have the same shape and dtype"
        )
    return images.detach()


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
