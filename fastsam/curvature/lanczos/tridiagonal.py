"""The tridiagonal matrix T of a Lanczos run."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def ritz_pairs(alpha: Floats, beta: Floats) -> tuple[Floats, Floats]:
    """Diagonalize T, on the CPU in float64.

    Args:
        alpha: diagonal of T, ``[order]``.
        beta: off-diagonal, at least ``[order - 1]``; further elements are ignored.

    Returns:
        The eigenvalues in ascending order, ``[order]``, and the eigenvectors as columns,
        ``[order, order]``.
    """
    diagonal, off = torch.from_numpy(alpha), torch.from_numpy(beta[: len(alpha) - 1])
    # eigh reads only the lower triangle.
    nodes, vectors = torch.linalg.eigh(torch.diag(diagonal) + torch.diag(off, -1))
    return nodes.numpy(), vectors.numpy()


def first_moment(alpha: Floats, beta: Floats) -> tuple[float, float]:
    """Return the mean eigenvalue and the mean squared deviation from it, from the first step.

    The first step gives the moments up to the second: ``||T e_1||^2 = alpha_1^2 + beta_1^2``.

    Args:
        alpha: diagonals of the probes, ``[probes, steps]``.
        beta: off-diagonals, ``[probes, steps]``.
    """
    first, residual = alpha[:, 0], beta[:, 0]
    mean = float(np.mean(first))
    return mean, float(np.mean((first - mean) ** 2 + residual**2))


def second_moment(alpha: Floats, beta: Floats, order: NDArray[np.int64]) -> tuple[float, float]:
    """Return the mean squared eigenvalue and the mean squared deviation of the squares from it.

    The fourth moment is ``||T^2 e_1||^2``, which takes two steps unless the first exhausts the space.
    The deviation is infinite after a single step.

    Args:
        alpha: diagonals of the probes, ``[probes, steps]``.
        beta: off-diagonals, ``[probes, steps]``.
        order: steps of each probe, ``[probes]``.
    """
    a, b = (np.pad(array, ((0, 0), (0, 1)))[:, :2].T for array in (alpha, beta))
    square = a[0] ** 2 + b[0] ** 2
    mean = float(np.mean(square))
    if np.any((order < 2) & (b[0] > 0)):
        return mean, math.inf
    rest = (b[0] * (a[0] + a[1])) ** 2 + (b[0] * b[1]) ** 2
    return mean, float(np.mean((square - mean) ** 2 + rest))
