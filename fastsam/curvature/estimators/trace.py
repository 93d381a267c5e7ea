"""The trace, from products only."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch

from fastsam.curvature.checks import check_count
from fastsam.curvature.estimates import Estimate
from fastsam.curvature.estimators.products import CheckedOperator, matrix_rows
from fastsam.curvature.estimators.sketch import krylov_sketch, no_sketch, sampled, sphere_samples
from fastsam.curvature.operators.base import Operator
from fastsam.kernels.backends import widened
from fastsam.progress import ProgressBar

TraceMethod = Literal["hutch++", "hutchinson"]


def trace(
    operator: Operator,
    *,
    products: int = 60,
    method: TraceMethod = "hutch++",
    seed: int = 0,
    progress: bool = True,
) -> Estimate:
    """Estimate the trace of a symmetric operator from a given number of products.

    Hutch++ (Meyer, Musco, Musco, Woodruff, arXiv 2010.09649) computes the trace on a subspace that
    holds the large eigenvalues, and estimates the rest by random probes. The subspace is a Krylov
    space (Chen and Hallman, arXiv 2205.01736), of at most half of the products. It stays small where
    it would hold little of the matrix, so the error is then close to that of Hutchinson's method. The
    estimate is unbiased, and its error follows from independent samples.

    Args:
        operator: a symmetric operator of dimension n, such as that of
            :func:`fastsam.curvature_operator`.
        products: number of products with the operator, at least 2. With n or more, n products give
            the exact trace. Default 60.
        method: ``"hutch++"`` (default), which holds ``products / 2`` vectors in memory, or
            ``"hutchinson"``: probes that are uniform on a sphere, for the whole matrix.
        seed: seed of the random vectors.
        progress: whether to show progress: a bar on a terminal, one line per minute elsewhere.

    Raises:
        TypeError: ``operator`` is not an operator, or ``products`` is not an integer.
        ValueError: another argument is invalid, the sketch does not fit in memory, or the operator is
            not symmetric.
        FloatingPointError: a product contains NaN or infinity.

    Example:
        >>> from fastsam.curvature import MatrixOperator
        >>> operator = MatrixOperator(torch.diag(torch.linspace(0, 1, 200).double() ** 8))
        >>> found = trace(operator)
        >>> low, high = found.interval(0.95)
        >>> low < 22.7 < high
        True
    """
    check_count("products", products, least=2)
    check_count("seed", seed, least=0)
    if method not in get_args(TraceMethod):
        raise ValueError(
            f"method must be one of {', '.join(get_args(TraceMethod))}, got {method!r}"
        )
    with ProgressBar(
        total=products, description="trace", unit="product", enabled=progress
    ) as bar:
        checked = CheckedOperator(operator, bar)
        if products >= operator.shape[0]:
            diagonals = (widened(images[:, rows].diagonal()) for rows, images in matrix_rows(checked))
            return Estimate(sum(float(part.sum()) for part in diagonals), 0.0)
        if method == "hutch++":
            sketch = krylov_sketch(checked, products=products, seed=seed)
        else:
            sketch = no_sketch(checked)
        with sketch as known:
            samples = sphere_samples(
                checked,
                known,
                products - len(known.basis),
                form=torch.linalg.vecdot,
                seed=seed,
            )
            return sampled(float(np.trace(known.projected)), samples)
