"""Products of an estimator: checked, counted, and in blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastsam.curvature.checks import check_count
from fastsam.curvature.operators.base import Operator, checked_product
from fastsam.progress import ProgressBar

BLOCK = 16
"""Number of rows that are multiplied at a time."""


class CheckedOperator:
    """An operator whose products are checked and shown on a progress bar.

    Raises:
        TypeError: ``operator`` is not an operator.
    """

    def __init__(self, operator: Operator, bar: ProgressBar) -> None:
        if not isinstance(operator, Operator):
            raise TypeError(
                "expected an operator with shape, dtype, device and matmat, got "
                f"{type(operator).__name__}; wrap a matrix as MatrixOperator(matrix)"
            )
        self._operator = operator
        self._bar = bar
        self.shape = operator.shape
        self.dtype = operator.dtype
        self.device = operator.device

    def matmat(self, vectors: Tensor) -> Tensor:
        """Return the products with the rows of ``vectors``, ``[count, n]``, as rows.

        Raises:
            ValueError: the products have another shape or dtype.
            FloatingPointError: a product contains NaN or infinity.
        """
        images = checked_product(self._operator.matmat(vectors), vectors)
        if not bool(torch.isfinite(images).all()):
            raise FloatingPointError(
                "the operator's product contains NaN or infinity; a larger dtype "
                "(dtype=torch.float64) may help if the model overflows"
            )
        self._bar.update(len(vectors))
        return images


@contextmanager
def checked_products(
    operator: Operator, *, name: str, products: int, seed: int, progress: bool
) -> Iterator[CheckedOperator]:
    """Check the options that estimators share, and show a progress bar over their products.

    Raises:
        TypeError: ``operator`` is not an operator, or an option is not an integer.
        ValueError: ``products`` is less than 2 or ``seed`` negative.
    """
    check_count("products", products, least=2)
    check_count("seed", seed, least=0)
    with ProgressBar(total=products, description=name, unit="product", enabled=progress) as bar:
        yield CheckedOperator(operator, bar)


def blocks(count: int) -> Iterator[range]:
    """Split ``range(count)`` into ranges of at most :data:`BLOCK`."""
    for begin in range(0, count, BLOCK):
        yield range(begin, min(begin + BLOCK, count))


def matrix_rows(operator: CheckedOperator) -> Iterator[tuple[range, Tensor]]:
    """Compute the whole matrix by n products, and yield blocks of its rows with their numbers."""
    for rows in blocks(operator.shape[0]):
        units = torch.zeros(
            len(rows), operator.shape[0], dtype=operator.dtype, device=operator.device
        )
        units[torch.arange(len(rows), device="cpu"), torch.tensor(rows, device="cpu")] = 1
        yield rows, operator.matmat(units)
