"""Eigenvalues and eigenvectors at one end of a spectrum."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from fastsam.curvature.checks import check_count, check_number
from fastsam.curvature.lanczos.basis import allocated_basis
from fastsam.curvature.lanczos.thick_restart import Goal, RitzPairs, Subspace, Which, find_extremes
from fastsam.curvature.operators.base import Operator
from fastsam.progress import ProgressBar

MAX_PRODUCTS = 10_000
"""Default limit on the products of :func:`eigenpairs`."""


class ConvergenceWarning(UserWarning):
    """Eigenpairs are returned whose residuals are larger than the tolerance."""


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """Approximate eigenpairs, the most wanted first.

    Attributes:
        values: Ritz values, float64 ``[k]`` on the CPU.
        vectors: orthonormal vectors ``[k, n]`` on the operator's device.
        residuals: ``||A v - value v||``, float64 ``[k]`` on the CPU, up to the rounding of the
            products. There is an eigenvalue within this distance plus ``resolution`` of each value.
        resolution: largest error of an eigenvalue by rounding.
        norm: the largest absolute Ritz value of the run, a lower bound on the norm of A.
        tolerance: largest residual of a converged pair, as a fraction of ``norm``.
        products: number of products with the operator.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    resolution: float
    norm: float
    tolerance: float
    products: int

    @property
    def converged(self) -> bool:
        """Whether every residual is within the tolerance."""
        return bool((self.residuals <= self.tolerance * self.norm).all())


def eigenpairs(
    operator: Operator,
    k: int = 1,
    *,
    which: Which = "largest",
    tol: float = 1e-5,
    subspace: int | None = None,
    max_products: int = MAX_PRODUCTS,
    start: Tensor | None = None,
    seed: int = 0,
    basis: str | Path = "device",
    memory_limit: int | None = None,
    progress: bool = True,
) -> Eigenpairs:
    """Compute ``k`` eigenvalues of an end of the spectrum with their eigenvectors.

    Thick-restart Lanczos (Wu and Simon, SIAM J. Matrix Anal. Appl. 22, 2000) in a subspace of fixed
    size. After the pairs have converged, the run looks for eigenvalues that it missed from a new
    random direction, so that a multiple eigenvalue is returned as often as it occurs.

    Args:
        operator: a symmetric operator of dimension n, such as that of
            :func:`fastsam.curvature_operator`.
        k: number of pairs, from 1 to n. Default 1.
        which: ``"largest"`` (default), ``"smallest"``, ``"magnitude"`` for the largest absolute
            values, or ``"ends"`` for the largest, the smallest, the second largest, and so on.
        tol: largest residual, as a fraction of the operator's norm; at least the machine epsilon of
            its dtype. The error of an eigenvalue that is separated from others is of the order of
            the square of its residual. Default 1e-5.
        subspace: number of vectors in memory, more than ``k``. A larger subspace takes fewer
            products. Default None: ``max(2 k + 1, 20)``, at most n.
        max_products: number of products after which the pairs are returned with a
            :class:`ConvergenceWarning`. Default 10,000. Up to ``k`` more measure the residuals, if
            they were found in several searches.
        start: vectors to start from, ``[n]`` or ``[count, n]``, for example the eigenvectors of a
            similar operator. Default None: a random vector.
        seed: seed of random vectors.
        basis: location of the subspace: ``"device"`` (default), ``"host"``, or the path of a folder
            for a memory-mapped file.
        memory_limit: bytes that the subspace may use. Default None: 80 % of free memory.
        progress: whether to show progress: a bar on a terminal, one line per minute elsewhere.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: an argument is invalid, the subspace does not fit in memory, or the operator is
            not symmetric.
        FloatingPointError: a product contains NaN or infinity.

    Example:
        >>> from fastsam.curvature import MatrixOperator
        >>> operator = MatrixOperator(torch.diag(torch.tensor([-1.0, 2.0, 5.0, 5.0])))
        >>> [round(value, 4) for value in eigenpairs(operator, 3).values.tolist()]
        [5.0, 5.0, 2.0]
    """
    dimension = operator.shape[0]
    check_count("k", k)
    if k > dimension:
        raise ValueError(f"k must be at most the operator's dimension, {dimension}, got {k}")
    if which not in get_args(Which):
        raise ValueError(f"which must be one of {', '.join(get_args(Which))}, got {which!r}")
    check_number("tol", tol, below=1)
    check_count("max_products", max_products)
    size = subspace_size(k, subspace)
    if size <= k < dimension:
        raise ValueError(f"subspace must be larger than k = {k}, got {subspace}")
    if start is not None and not isinstance(start, Tensor):
        raise TypeError(f"start must be a tensor, got {type(start).__name__}")
    if start is not None and (start.ndim not in (1, 2) or start.shape[-1] != dimension):
        raise ValueError(
            f"start must have shape [{dimension}] or [count, {dimension}], got {list(start.shape)}"
        )
    if start is not None:
        start = start.reshape(-1, dimension).sum(dim=0)
        if not bool(torch.isfinite(start).all()) or not bool(start.any()):
            raise ValueError("start must be finite, and the sum of its vectors must not be zero")
    capacity = min(dimension, size)
    bar = ProgressBar(total=None, description="eigenpairs", unit="product", enabled=progress)
    memory = allocated_basis(
        1,
        capacity + 1,
        dimension,
        dtype=operator.dtype,
        device=operator.device,
        place=basis,
        memory_limit=memory_limit,
    )

    def report(pairs: RitzPairs) -> None:
        bar.update(note=f"{pairs.converged}/{k} converged")

    with bar, memory as rows:
        space = Subspace(operator, rows[0], seed=seed)
        space.leave(start)
        goal = Goal(count=k, which=which, tolerance=tol, most_products=max_products, report=report)
        pairs = find_extremes(space, goal)
        vectors = space.basis[:k].to(operator.device, copy=True)
    found = Eigenpairs(
        values=torch.from_numpy(pairs.values.copy()),
        vectors=vectors,
        residuals=torch.from_numpy(pairs.residuals.copy()),
        resolution=space.resolution,
        norm=space.norm,
        tolerance=max(tol, torch.finfo(operator.dtype).eps),
        products=space.products,
    )
    if not found.converged:
        warnings.warn(
            f"{pairs.converged} of {k} eigenpairs converged within {space.products} products; the "
            f"largest residual is {float(found.residuals.max()):.1e} at norm {space.norm:.1e}. Raise "
            "max_products or subspace, or accept a larger tol",
            ConvergenceWarning,
            stacklevel=2,
        )
    return found


def subspace_size(k: int, subspace: int | None) -> int:
    """Return the number of vectors in memory for ``k`` pairs: ``subspace``, or the default.

    Raises:
        TypeError: ``subspace`` is not an integer.
        ValueError: ``subspace`` is less than 1.
    """
    if subspace is None:
        return max(2 * k + 1, 20)
    check_count("subspace", subspace)
    return subspace
