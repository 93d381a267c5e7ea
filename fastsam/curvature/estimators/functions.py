"""Traces of functions of a matrix, by stochastic Lanczos quadrature."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastsam.curvature.api import operator_spectrum
from fastsam.curvature.estimates import Estimate
from fastsam.curvature.estimators.products import checked_products, matrix_rows
from fastsam.curvature.lanczos.options import LanczosKeywords, LanczosOptions
from fastsam.curvature.lanczos.quadrature import (
    Floats,
    finite_values,
    refuse_below,
    refuse_indefinite,
)
from fastsam.curvature.lanczos.symmetry import refuse_asymmetric
from fastsam.curvature.operators.base import Operator
from fastsam.curvature.spectrum import Spectrum

if TYPE_CHECKING:
    from typing_extensions import Unpack

STEPS, PROBES = 40, 4
"""Default Lanczos steps and probes: 160 products."""


def trace_of(
    operator: Operator,
    function: Callable[[Floats], Floats],
    *,
    lowest: float | None = None,
    alternating: bool = False,
    **options: Unpack[LanczosKeywords],
) -> Estimate:
    """Estimate the trace of f(H) by stochastic Lanczos quadrature (Ubaru, Chen, Saad, SIMAX 38, 2017).

    The error is that of :meth:`fastsam.curvature.Spectrum.function`. Use that method for several
    functions of one matrix.

    Args:
        operator: a symmetric operator H of dimension n.
        function: f, applied to an array of eigenvalues.
        lowest: a number that is known to be at most the smallest eigenvalue, such as 0 for a
            Gauss-Newton or Fisher matrix.
        alternating: whether the derivatives of f alternate in sign above ``lowest``, as those of
            log x, sqrt x, 1/x and exp(-x) do. The quadrature then has rigorous bounds.
        **options: fields of :class:`fastsam.curvature.LanczosOptions`; by default 4 probes of 40
            steps. If steps times probes is at least n, n products give the exact value. They are
            not a Lanczos run: ``checkpoint`` and ``stop`` then have no effect.

    Raises:
        TypeError: ``operator`` is not an operator, or an option has the wrong type.
        ValueError: f is not finite at a Ritz value or at ``lowest``, an eigenvalue is below
            ``lowest``, or an option is invalid.
        FloatingPointError: a product contains NaN or infinity.

    Example:
        >>> from fastsam.curvature import MatrixOperator
        >>> operator = MatrixOperator(torch.diag(torch.tensor([1.0, 4.0])))
        >>> round(trace_of(operator, np.sqrt).value, 4)
        3.0
    """
    found = _eigenvalues(operator, options)
    if isinstance(found, Spectrum):
        refuse_below(lowest, found.lambda_min, resolution=found.resolution)
        return found.function(function, lowest=lowest, alternating=alternating)
    refuse_below(lowest, float(found.min()), resolution=_resolution(operator, found))
    return Estimate(float(finite_values(function, found).sum()), 0.0)


def log_determinant(
    operator: Operator,
    *,
    shift: float = 0.0,
    lowest: float | None = None,
    **options: Unpack[LanczosKeywords],
) -> Estimate:
    """Estimate the log-determinant of ``H + shift I`` by stochastic Lanczos quadrature.

    Args:
        operator: a symmetric operator H of dimension n.
        shift: added to all eigenvalues. Default 0.
        lowest: a number that is known to be at most the smallest eigenvalue of H, such as 0 for a
            Gauss-Newton or Fisher matrix. The bounds on the error of the quadrature are then rigorous.
            Without it they hold with 99 % probability, and they are infinite where H + shift I may
            be indefinite with more than 1 %.
        **options: fields of :class:`fastsam.curvature.LanczosOptions`; by default 4 probes of 40
            steps. If steps times probes is at least n, n products give the exact value. They are
            not a Lanczos run: ``checkpoint`` and ``stop`` then have no effect.

    Raises:
        TypeError: ``operator`` is not an operator, or an option has the wrong type.
        ValueError: H + shift I is not positive definite beyond rounding, an eigenvalue is below
            ``lowest``, or an option is invalid.
        FloatingPointError: a product contains NaN or infinity.

    Example:
        >>> from fastsam.curvature import MatrixOperator
        >>> operator = MatrixOperator(torch.diag(torch.tensor([0.0, 3.0])))
        >>> round(log_determinant(operator, shift=1.0).value, 4)
        1.3863
    """
    found = _eigenvalues(operator, options)
    if isinstance(found, Spectrum):
        return found.log_determinant(shift, lowest=lowest)
    resolution = _resolution(operator, found)
    refuse_below(lowest, float(found.min()), resolution=resolution)
    refuse_indefinite(float(found.min()), shift, resolution=resolution)
    return Estimate(float(np.log(found + shift).sum()), 0.0)


def _eigenvalues(operator: Operator, options: LanczosKeywords) -> Spectrum | Floats:
    """Return a spectrum of the operator, or all its eigenvalues if they cost no more products."""
    filled: LanczosKeywords = {"steps": STEPS, "probes": PROBES, **options}
    chosen = LanczosOptions(**filled)
    products = chosen.steps * len(chosen.indices)
    with checked_products(
        operator,
        name="matrix",
        products=max(products, 2),
        seed=chosen.seed,
        progress=chosen.progress,
    ) as checked:
        if products >= checked.shape[0]:
            return _exact(torch.cat([part.double() for _, part in matrix_rows(checked)]), operator)
    return operator_spectrum(operator, **filled)


def _resolution(operator: Operator, eigenvalues: Floats) -> float:
    """Return the largest error of an eigenvalue by rounding."""
    return 64 * torch.finfo(operator.dtype).eps * float(np.abs(eigenvalues).max())


def _exact(matrix: Tensor, operator: Operator) -> Floats:
    """Return the eigenvalues of a matrix that products gave."""
    norm = float(torch.linalg.matrix_norm(matrix))
    if norm > 0:
        gap = float((matrix - matrix.T).abs().max())
        refuse_asymmetric(gap / norm, eps=torch.finfo(operator.dtype).eps)
    values: Floats = torch.linalg.eigvalsh((matrix + matrix.T) / 2).cpu().numpy()
    return values
