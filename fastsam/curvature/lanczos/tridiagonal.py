"""The tridiagonal matrix T of a Lanczos run."""

from __future__ import annotations

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
