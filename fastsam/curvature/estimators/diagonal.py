"""The diagonal, from products only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsam.curvature.estimates import check_confidence
from fastsam.curvature.estimators.products import CheckedOperator, checked_products, matrix_rows
from fastsam.curvature.estimators.sketch import Sketch, krylov_sketch, probed
from fastsam.curvature.lanczos.probes import sign_probes
from fastsam.curvature.operators.base import Operator
from fastsam.curvature.student import student_quantile
from fastsam.kernels.backends import widened


@dataclass(frozen=True, eq=False)
class DiagonalEstimate:
    """Estimated diagonal of a matrix, with a standard error for each entry.

    Attributes:
        values: the estimates, ``[n]`` on the operator's device; float64 where the device has it.
        stderr: standard error of each, ``[n]``.
        degrees: degrees of freedom of the standard errors; infinity for an exact diagonal.
        split: splits a vector ``[n]`` into tensors by parameter name; None if the operator is not
            that of a model.
    """

    values: Tensor
    stderr: Tensor
    degrees: float
    split: Callable[[Tensor], dict[str, Tensor]] | None = None

    @property
    def by_name(self) -> dict[str, Tensor]:
        """The estimates as tensors of the parameters' shapes, by parameter name.

        Raises:
            TypeError: the operator is not that of a model.
        """
        return self._named(self.values)

    @property
    def stderr_by_name(self) -> dict[str, Tensor]:
        """The standard errors as tensors of the parameters' shapes, by parameter name.

        Raises:
            TypeError: the operator is not that of a model.
        """
        return self._named(self.stderr)

    def interval(self, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
        """Return the t interval of every entry, each for itself: lower and upper limits, ``[n]``.

        Raises:
            ValueError: ``confidence`` is not between 0 and 1.
        """
        check_confidence(confidence)
        half = student_quantile(confidence, self.degrees) * self.stderr
        return self.values - half, self.values + half

    def _named(self, vector: Tensor) -> dict[str, Tensor]:
        if self.split is None:
            raise TypeError(
                "the operator has no parameter names; pass one of fastsam.curvature_operator, or use "
                "values and stderr"
            )
        return self.split(vector)


def diagonal(
    operator: Operator, *, products: int = 60, seed: int = 0, progress: bool = True
) -> DiagonalEstimate:
    """Estimate the diagonal of a symmetric operator from a given number of products.

    As in :func:`trace`, a Krylov space holds the part of the large eigenvalues, whose diagonal is
    known. Probes z of random signs estimate the rest B by the mean of ``z * B z`` (Bekas, Kokiopoulou,
    Saad, Applied Numerical Mathematics 57, 2007). The variance of an entry is the sum of the squares
    of the others in its row of B.

    Args:
        operator: a symmetric operator of dimension n.
        products: number of products with the operator, at least 2. With n or more, n products give
            the exact diagonal. ``products / 2`` vectors are held in memory. Default 60. With fewer than
            about 20, intervals are too narrow where a row has few entries beside the diagonal: random
            signs then give few different samples, which may be all equal.
        seed: seed of the random vectors.
        progress: whether to show progress: a bar on a terminal, one line per minute elsewhere.

    Raises:
        TypeError: ``operator`` is not an operator, or ``products`` is not an integer.
        ValueError: another argument is invalid, the sketch does not fit in memory, or the operator is
            not symmetric.
        FloatingPointError: a product contains NaN or infinity.

    Example:
        >>> from torch import nn
        >>> from fastsam import curvature_operator
        >>> model = nn.Linear(3, 2)
        >>> batch = torch.randn(8, 3), torch.randint(2, (8,))
        >>> hessian = curvature_operator(model, nn.CrossEntropyLoss(), batch)
        >>> {name: list(part.shape) for name, part in diagonal(hessian).by_name.items()}
        {'weight': [2, 3], 'bias': [2]}
    """
    split = getattr(operator, "split", None)
    with checked_products(
        operator, name="diagonal", products=products, seed=seed, progress=progress
    ) as checked:
        if products >= checked.shape[0]:
            parts = [widened(part[:, rows].diagonal()) for rows, part in matrix_rows(checked)]
            values = torch.cat(parts)
            return DiagonalEstimate(values, torch.zeros_like(values), math.inf, split)
        with krylov_sketch(checked, products=products, seed=seed) as known:
            exact = known_diagonal(known)
            mean, stderr, count = _sampled_diagonal(checked, known, products, seed)
    values = exact + mean
    rounding = torch.finfo(checked.dtype).eps * values.abs().max()
    return DiagonalEstimate(values, torch.hypot(stderr, rounding), count - 1, split)


def known_diagonal(known: Sketch) -> Tensor:
    """Return the diagonal of ``Q' T Q + Q' c q' + q c' Q``, ``[n]``."""
    basis, out = widened(known.basis), widened(known.out)
    projected, coupling = (
        torch.from_numpy(part.copy()).to(basis) for part in (known.projected, known.coupling)
    )
    return (basis * (projected @ basis)).sum(dim=0) + 2 * (coupling @ basis) * out


def _sampled_diagonal(
    operator: CheckedOperator, known: Sketch, products: int, seed: int
) -> tuple[Tensor, Tensor, int]:
    """Return the mean of the samples of the rest's diagonal, its standard error, and their number."""
    count = products - len(known.basis)
    zero = widened(torch.zeros(operator.shape[0], dtype=operator.dtype, device=operator.device))
    mean, squares, seen = zero, zero, 0
    for signs, _, images in probed(operator, known, count, draw=sign_probes, seed=seed):
        samples = widened(signs * known.complement(images))
        # The update of Chan, Golub and LeVeque (The American Statistician 37, 1983) loses no digits.
        new, seen = len(samples), seen + len(samples)
        center = samples.mean(dim=0)
        squares = squares + (samples - center).square().sum(dim=0)
        squares = squares + (center - mean).square() * (new * (seen - new) / seen)
        mean = mean + (center - mean) * (new / seen)
    return mean, (squares / (count - 1) / count).sqrt(), count
