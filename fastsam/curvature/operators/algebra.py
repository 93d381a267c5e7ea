"""Sums, multiples, shifts, projections and blocks of symmetric operators."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsam.curvature.operators.base import Operator, checked_product

DENSE_LIMIT = 20_000
"""Largest dimension of :meth:`SymmetricOperator.to_dense`: 3.2 GB in float64."""

_DENSE_ROWS = 64
"""Number of products that :meth:`SymmetricOperator.to_dense` computes at a time."""


class SymmetricOperator(ABC):
    """A symmetric linear map of R^n with the usual arithmetic.

    Subclasses define ``shape``, ``dtype``, ``device`` and :meth:`matmat`. ``A @ v`` multiplies a vector
    ``[n]`` or the columns of a matrix ``[n, k]``, as in NumPy and SciPy; :meth:`matmat` multiplies
    rows, which is how vectors of parameters lie in memory.

    Example:
        >>> from fastsam.curvature import MatrixOperator
        >>> a = MatrixOperator(torch.diag(torch.tensor([1.0, 2.0])))
        >>> ((2 * a + a).shifted(-1) @ torch.ones(2)).tolist()
        [2.0, 5.0]
    """

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """``(n, n)``."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype of the vectors: float32 or float64."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of the vectors."""

    @abstractmethod
    def matmat(self, vectors: Tensor) -> Tensor:
        """Return the products with the rows of ``vectors``, ``[count, n]``, as rows."""

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """Multiply a vector ``[n]``, or the columns of a matrix ``[n, k]``."""
        if not isinstance(vectors, Tensor):
            return NotImplemented
        if vectors.ndim not in (1, 2) or len(vectors) != self.shape[0]:
            raise ValueError(
                f"an operator of shape {self.shape} multiplies [{self.shape[0]}] or "
                f"[{self.shape[0]}, k], got {list(vectors.shape)}"
            )
        rows = vectors[None] if vectors.ndim == 1 else vectors.T
        images = self.matmat(rows.to(self.device, self.dtype).contiguous())
        result: Tensor = images[0] if vectors.ndim == 1 else images.T
        return result

    def __add__(self, other: Operator) -> CallableOperator:
        """Return the sum with an operator of the same shape, dtype and device."""
        _refuse_unlike(self, other)
        return self._derived(lambda rows: self.matmat(rows) + other.matmat(rows))

    def __sub__(self, other: Operator) -> CallableOperator:
        """Return the difference to an operator of the same shape, dtype and device."""
        _refuse_unlike(self, other)
        return self._derived(lambda rows: self.matmat(rows) - other.matmat(rows))

    def __mul__(self, factor: float) -> CallableOperator:
        """Return a multiple.

        Raises:
            TypeError: ``factor`` is an operator.
        """
        _refuse_operator(factor)
        return self._derived(lambda rows: factor * self.matmat(rows))

    __rmul__ = __mul__

    def __neg__(self) -> CallableOperator:
        """Return ``-A``."""
        return self * -1.0

    def shifted(self, shift: float) -> CallableOperator:
        """Return ``A + shift I``."""
        return self._derived(lambda rows: self.matmat(rows) + shift * rows)

    def deflated(self, vectors: Tensor) -> CallableOperator:
        """Return ``P A P``, where P projects onto the complement of the span of ``vectors``.

        Args:
            vectors: ``[k, n]``, for example :attr:`Eigenpairs.vectors`. They need not be orthonormal,
                nor independent.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.shape[0]:
            raise ValueError(
                f"vectors must have shape [k, {self.shape[0]}], got {list(vectors.shape)}"
            )
        left, sizes, _ = torch.linalg.svd(
            vectors.to(self.device, self.dtype).T, full_matrices=False
        )
        rounding = torch.finfo(self.dtype).eps * max(vectors.shape)
        orthonormal: Tensor = left[:, sizes > rounding * sizes.max()] if len(sizes) else left

        def project(rows: Tensor) -> Tensor:
            rows = rows - (rows @ orthonormal) @ orthonormal.T
            # Twice, because rounding leaves a part of the order of eps times the part removed.
            return rows - (rows @ orthonormal) @ orthonormal.T

        return self._derived(lambda rows: project(self.matmat(project(rows))))

    def block(self, indices: slice | Tensor) -> CallableOperator:
        """Return the principal submatrix of some coordinates.

        Args:
            indices: a slice, or an int64 tensor of distinct coordinates.

        Raises:
            ValueError: a coordinate occurs twice.
        """
        chosen = torch.arange(self.shape[0], device=self.device)[indices]
        if isinstance(indices, Tensor) and len(torch.unique(chosen)) < len(chosen):
            raise ValueError("indices must be distinct; a coordinate occurs twice")

        def product(rows: Tensor) -> Tensor:
            whole = rows.new_zeros(len(rows), self.shape[0])
            whole[:, chosen] = rows
            return self.matmat(whole)[:, chosen]

        return CallableOperator(
            product, dimension=len(chosen), dtype=self.dtype, device=self.device
        )

    def to_dense(self, *, limit: int = DENSE_LIMIT) -> Tensor:
        """Return the matrix ``[n, n]``, at the cost of n products.

        Raises:
            ValueError: n is larger than ``limit``.
        """
        dimension = self.shape[0]
        if dimension > limit:
            raise ValueError(
                f"the matrix of dimension {dimension} exceeds the limit of {limit}; raise limit, or "
                "restrict the operator with params= or block()"
            )
        eye = torch.eye(dimension, dtype=self.dtype, device=self.device)
        blocks = torch.split(eye, _DENSE_ROWS)
        return torch.cat([self.matmat(rows).clone() for rows in blocks])

    def to_scipy(self) -> Any:
        """Return a SciPy ``LinearOperator``; see :func:`fastsam.curvature.to_scipy`."""
        from fastsam.curvature.operators.scipy import to_scipy

        return to_scipy(self)

    def _derived(self, function: Callable[[Tensor], Tensor]) -> CallableOperator:
        return CallableOperator(
            function, dimension=self.shape[0], dtype=self.dtype, device=self.device
        )


def _refuse_operator(factor: object) -> None:
    if isinstance(factor, SymmetricOperator):
        raise TypeError("an operator is multiplied by a number; A.matmat(B.matmat(rows)) is A B")


def _refuse_unlike(first: Operator, second: Operator) -> None:
    if not isinstance(second, Operator):  # type checkers forbid it, notebooks do not
        raise TypeError(
            f"an operator is added to an operator, got {type(second).__name__}; "
            "operator.shifted(c) adds c times the identity"
        )
    for name in ("shape", "dtype", "device"):
        if getattr(first, name) != getattr(second, name):
            raise ValueError(
                f"operators of different {name}: {getattr(first, name)} and {getattr(second, name)}"
            )


class CallableOperator(SymmetricOperator):
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
