"""Both ends of a spectrum at once, from vectors that are nearly right."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fastsam.curvature.lanczos.thick_restart import Goal, RitzPairs, Subspace
from fastsam.curvature.operators.base import Operator
from fastsam.kernels.backends import widened

SUBSPACE = 32
"""Vectors in memory. Most runs end before they fill it."""

LEAST_PRODUCTS = 10
"""Least number of products of a run.

A given vector may have become an eigenvector of an inner eigenvalue. Its residual is then small at once,
whereas the random component of the start takes some products to show what is further out.
"""

RANDOM_PART = 0.5
"""Norm of the random component of a start, as a fraction of that of the given vectors."""


@dataclass(frozen=True, eq=False)
class Ends:
    """The largest and the smallest eigenvalue of an operator.

    Attributes:
        largest: Ritz value at the upper end.
        smallest: Ritz value at the lower end.
        residuals: ``||A v - value v||`` of both, in this order, and the largest error by rounding: an
            eigenvalue is within this distance.
        vectors: Ritz vectors of both, from which a run on a similar operator can start, ``[2, n]``.
        products: number of products with the operator.
        converged: whether both residuals are within the tolerance.
    """

    largest: float
    smallest: float
    residuals: tuple[float, float]
    vectors: Tensor
    products: int
    converged: bool


def find_ends(
    operator: Operator,
    *,
    start: Tensor | None,
    tol: float,
    most_products: int,
    seed: int,
) -> Ends:
    """Find the largest and the smallest eigenvalue in one Lanczos run.

    Two runs of :func:`fastsam.curvature.eigenpairs` would need twice the products: the Krylov space
    of one vector approaches both ends. Only the eigenvalues count here, so multiple ones are not
    searched for.

    Args:
        operator: a symmetric operator of dimension n.
        start: vectors of an earlier run on a similar operator, ``[count, n]``; None for a random start.
        tol: largest residual of an end as a fraction of its absolute value, but not below ``tol**2``
            of the operator's norm.
        most_products: number of products after which the ends are returned as they are.
        seed: seed of random vectors.

    Raises:
        AsymmetryError: the products show that the operator is not symmetric.
        FloatingPointError: a product contains NaN or infinity.
    """
    dimension = operator.shape[0]
    capacity = min(dimension, SUBSPACE)
    memory = torch.empty(capacity + 1, dimension, dtype=operator.dtype, device=operator.device)
    space = Subspace(operator, memory, seed=seed)
    space.leave(_start(start, space.random_direction()))
    goal = Goal(
        count=min(2, dimension),
        which="ends",
        tolerance=tol,
        most_products=most_products,
        report=lambda pairs: None,
    )
    while True:
        space.grow()
        pairs = space.wanted(goal)
        converged = len(pairs.values) == goal.count and _is_converged(pairs, tol, space)
        enough = converged and space.products >= LEAST_PRODUCTS
        if enough or space.is_whole or space.products >= most_products:
            break
        if space.is_full:
            space.restart(space.wanted(replace(goal, count=capacity // 2)))
    space.restart(pairs)
    return Ends(
        largest=float(pairs.values[0]),
        smallest=float(pairs.values[-1]),
        residuals=(
            float(pairs.residuals[0]) + space.resolution,
            float(pairs.residuals[-1]) + space.resolution,
        ),
        vectors=space.basis.clone(),
        products=space.products,
        converged=converged or space.is_whole,
    )


def _start(vectors: Tensor | None, direction: Tensor) -> Tensor:
    """Return the sum of the vectors and a random direction, or the direction alone."""
    start: Tensor = direction.double() / direction.double().norm()
    if vectors is not None:
        given = widened(vectors).sum(dim=0).cpu().double()
        start = given + RANDOM_PART * float(given.norm()) * start
    return start


def _is_converged(pairs: RitzPairs, tol: float, space: Subspace) -> bool:
    allowed = np.maximum(tol * np.abs(pairs.values), tol**2 * space.norm)
    return bool((pairs.residuals <= allowed).all())
