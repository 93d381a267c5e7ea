"""The trace, from products only."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Literal, get_args

import numpy as np
import torch

from fastsam.curvature.estimates import Estimate
from fastsam.curvature.estimators.products import checked_products, matrix_rows
from fastsam.curvature.estimators.sketch import krylov_sketch, no_sketch, sampled, sphere_samples
from fastsam.curvature.operators.base import Operator
from fastsam.kernels.backends import widened

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
    estimate is unbiased, and its error follows from independent samples. Where a few eigenvalues
    dominate, the samples of Hutchinson's method are skewed, so its interval covers the trace less often
    than its confidence says, most of all with few products.

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
    if method not in get_args(TraceMethod):
        raise ValueError(
            f"method must be one of {', '.join(get_args(TraceMethod))}, got {method!r}"
        )
    with (
        checked_products(
            operator, name="trace", products=products, seed=seed, progress=progress
        ) as checked,
        ExitStack() as stack,
    ):
        if products >= checked.shape[0]:
            return Estimate(
                sum(float(widened(part[:, rows]).trace()) for rows, part in matrix_rows(checked)),
                0.0,
            )
        known = no_sketch(checked)
        if method == "hutch++":
            remedy = "pass fewer products, or method='hutchinson', which needs no sketch"
            known = stack.enter_context(
                krylov_sketch(checked, products=products, seed=seed, remedy=remedy)
            )
        count = products - len(known.basis)
        samples = sphere_samples(checked, known, count, form=torch.linalg.vecdot, seed=seed)
        return sampled(np.diagonal(known.projected), samples, eps=torch.finfo(checked.dtype).eps)
