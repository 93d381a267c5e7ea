"""The Frobenius norm, from products only."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fastsam.curvature.estimates import Estimate
from fastsam.curvature.estimators.products import checked_products, matrix_rows
from fastsam.curvature.estimators.sketch import krylov_sketch, sampled, sphere_samples
from fastsam.curvature.operators.base import Operator
from fastsam.kernels.backends import widened


def frobenius_norm(
    operator: Operator, *, products: int = 60, seed: int = 0, progress: bool = True
) -> Estimate:
    """Estimate the Frobenius norm of a symmetric operator from a given number of products.

    As in :func:`trace`, a Krylov space holds the part of the large eigenvalues, whose norm is known,
    and random probes estimate the norm of the rest. The square of the norm is estimated without bias;
    the standard error of the norm is that of the square divided by twice the norm. Where a few eigenvalues
    dominate the rest, the square is skewed, and a 95 % interval covers about 89 %.

    Args:
        operator: a symmetric operator of dimension n.
        products: number of products with the operator, at least 2. With n or more, n products give
            the exact norm. ``products / 2`` vectors are held in memory. Default 60.
        seed: seed of the random vectors.
        progress: whether to show progress: a bar on a terminal, one line per minute elsewhere.

    Raises:
        TypeError: ``operator`` is not an operator, or ``products`` is not an integer.
        ValueError: another argument is invalid, the sketch does not fit in memory, or the operator is
            not symmetric.
        FloatingPointError: a product contains NaN or infinity.

    Example:
        >>> from fastsam.curvature import MatrixOperator
        >>> operator = MatrixOperator(torch.diag(torch.tensor([3.0, 4.0])))
        >>> round(frobenius_norm(operator).value, 4)
        5.0
    """
    with checked_products(
        operator, name="Frobenius norm", products=products, seed=seed, progress=progress
    ) as checked:
        if products >= checked.shape[0]:
            squares = (float(widened(part).square().sum()) for _, part in matrix_rows(checked))
            return Estimate(math.sqrt(sum(squares)), 0.0)
        with krylov_sketch(checked, products=products, seed=seed) as known:

            def form(_: Tensor, images: Tensor) -> Tensor:
                return widened(known.complement(images)).square().sum(dim=1)

            samples = sphere_samples(
                checked, known, products - len(known.basis), form=form, seed=seed
            )
            exact = np.append(known.projected.ravel(), math.sqrt(2) * known.coupling) ** 2
        square = sampled(exact, samples, eps=torch.finfo(checked.dtype).eps)
    norm = math.sqrt(square.value)
    return Estimate(norm, square.stderr / (2 * norm) if norm else 0.0, degrees=square.degrees)
