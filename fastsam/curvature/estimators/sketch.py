"""A part of a matrix that is known exactly, and the rest of it.

Hutch++ (Meyer, Musco, Musco, Woodruff, arXiv 2010.09649) spends some products on a subspace that
holds the large eigenvalues, and random probes on the rest alone, whose variance is small. Its
subspace is the range of ``A X`` for a random X, and another product with each of its vectors is
needed to know A there. Here the subspace is a Krylov space (Chen and Hallman, arXiv 2205.01736):
Lanczos knows A on it from the products that made it, so that it is twice as large, and it holds the
large eigenvalues more accurately.

With the orthonormal rows Q, ``T = Q A Q'``, and P the projection on the complement of Q,

    A = Q' T Q + Q' c q' + q c' Q + P A P,

where q is the direction in which Lanczos would continue and c its coupling to Q. All but ``P A P`` is
known. The probes are independent of Q, so every estimate of ``P A P`` from them is unbiased, and so
are its samples' mean and variance, whatever Q is. Q may therefore be chosen by what Lanczos has
found so far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastsam.curvature.estimates import Estimate
from fastsam.curvature.estimators.products import CheckedOperator, blocks
from fastsam.curvature.lanczos.basis import allocated_basis, basis_bytes
from fastsam.curvature.lanczos.probes import sphere_probes
from fastsam.curvature.lanczos.quadrature import Floats
from fastsam.curvature.lanczos.thick_restart import Subspace
from fastsam.curvature.memory import plan_bytes, readable
from fastsam.kernels.backends import widened

_SINGLE = 6.0
"""Number of eigenvalues that the weight of a single one may suggest: exceeded with probability 1.4 %.

n times the weight of an eigenvector in a random unit vector has a chi-squared distribution.
"""


@dataclass(frozen=True, eq=False)
class Sketch:
    """A subspace on which the matrix is known.

    Attributes:
        basis: Q, ``[k, n]`` on the operator's device; k may be 0.
        projected: T, float64 ``[k, k]``.
        coupling: c, float64 ``[k]``.
        out: q, ``[n]``.
    """

    basis: Tensor
    projected: Floats
    coupling: Floats
    out: Tensor

    @property
    def rest(self) -> int:
        """Dimension of the complement of Q."""
        return self.basis.shape[1] - len(self.basis)

    def complement(self, rows: Tensor) -> Tensor:
        """Project the rows of ``[count, n]`` on the complement of Q."""
        basis = self.basis.to(rows.dtype)
        for _ in range(2):  # rounding leaves a part of the order of eps times the part removed
            rows = rows - (rows @ basis.T) @ basis
        return rows


@contextmanager
def krylov_sketch(
    operator: CheckedOperator, *, products: int, seed: int, remedy: str = "pass fewer products"
) -> Iterator[Sketch]:
    """Grow a Krylov space, at most by half of the products, for as long as it pays.

    The variance after k of m products is the squared Frobenius norm of ``P A P`` divided by the m - k
    probes that remain. Lanczos estimates that norm (:func:`_remaining`). The space stops growing when
    m/6 further products have not lowered the variance, for example because all eigenvalues have
    similar sizes. Then the probes are most of the products, as in Hutchinson's method.

    Args:
        operator: symmetric operator of dimension n, larger than ``products``.
        products: number of products m, including those of the probes.
        seed: seed of the start vector.
        remedy: advice if the space does not fit in memory.

    Raises:
        ValueError: the space does not fit in memory, or the operator is not symmetric.
    """
    dimension, most = operator.shape[0], min(products // 2, products - 2)
    size = basis_bytes(1, most + 1, dimension, dtype=operator.dtype)
    limit = plan_bytes(operator.device, None)
    if limit is not None and size > limit:
        raise ValueError(
            f"the sketch needs {readable(size)} on {operator.device}, but {readable(limit)} may be "
            f"used; {remedy}"
        )
    with allocated_basis(
        1,
        most + 1,
        dimension,
        dtype=operator.dtype,
        device=operator.device,
        place="device",
        memory_limit=limit,
    ) as memory:
        space = Subspace(operator, memory[0], seed=seed)
        space.leave()
        least, at = math.inf, 2  # the first product alone does not tell the norm
        while space.size < most and space.size - at <= products / 6:
            space.grow()
            variance = _remaining(space, dimension) / (products - space.size)
            if space.size >= 2 and variance < least:
                least, at = variance, space.size
        yield Sketch(space.basis, space.projected, space.coupling, space.out)


def no_sketch(operator: CheckedOperator) -> Sketch:
    """Return the sketch of dimension 0, with which the probes estimate the whole matrix."""
    basis = torch.zeros(0, operator.shape[0], dtype=operator.dtype, device=operator.device)
    return Sketch(basis, np.zeros((0, 0)), np.zeros(0), basis.new_zeros(basis.shape[1]))


def _remaining(space: Subspace, dimension: int) -> float:
    """Estimate the squared Frobenius norm of ``P A P`` from the quadrature of the start vector.

    A node of weight w represents about n w eigenvalues, of which the space holds one. The weight of
    one that has converged and may be single is not an estimate of its number.
    """
    nodes, vectors = space.ritz()
    counts = dimension * vectors[0] ** 2
    converged = np.abs(space.coupling @ vectors) <= 0.1 * np.abs(nodes)
    single = converged & (counts < _SINGLE)
    return float(np.sum(nodes**2 * np.where(single, 0, np.maximum(counts - 1, 0))))


def probed(
    operator: CheckedOperator,
    sketch: Sketch,
    count: int,
    *,
    draw: Callable[..., Tensor],
    seed: int,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Draw probes u and yield blocks of u, ``P u`` and ``A P u``, ``[block, n]`` each.

    Args:
        operator: operator of dimension n.
        sketch: the part of the matrix that is known.
        count: number of probes.
        draw: :func:`sphere_probes` or :func:`sign_probes`.
        seed: seed of the probes.
    """
    for indices in blocks(count):
        probes = draw(
            operator.shape[0], indices, seed=seed, dtype=operator.dtype, device=operator.device
        )
        rest = sketch.complement(probes)
        yield probes, rest, operator.matmat(rest)


def sphere_samples(
    operator: CheckedOperator,
    sketch: Sketch,
    count: int,
    *,
    form: Callable[[Tensor, Tensor], Tensor],
    seed: int,
) -> Floats:
    """Sample a quadratic form of ``P A P`` at probes that are uniform on a sphere in the complement.

    The sphere has the radius sqrt(n - k), so that a probe has ``E w w' = P``. On it, a multiple of the
    identity has no variance.

    Args:
        operator: operator of dimension n.
        sketch: the part of the matrix that is known.
        count: number of probes.
        form: maps unit probes w and ``A w``, ``[block, n]``, to the form at each probe, ``[block]``.
        seed: seed of the probes.

    Returns:
        The samples, float64 ``[count]``.
    """
    samples = []
    for _, rows, images in probed(operator, sketch, count, draw=sphere_probes, seed=seed):
        rest, images = widened(rows), widened(images)
        norms = torch.linalg.vector_norm(rest, dim=1, keepdim=True)
        samples.append(sketch.rest * form(rest / norms, images / norms).cpu().double())
    return torch.cat(samples).numpy()


def sampled(known: Floats, samples: Floats, *, eps: float) -> Estimate:
    """Return the estimate of the sum of known numbers plus the mean of independent samples.

    Args:
        known: numbers without a random error.
        samples: independent samples, at least two.
        eps: machine epsilon of the products. The standard error is at least the rounding of the sum.
    """
    rounding = eps * float(np.abs(known).sum() + np.abs(samples).mean())
    stderr = math.hypot(float(np.std(samples, ddof=1)) / math.sqrt(len(samples)), rounding)
    return Estimate(float(np.sum(known) + np.mean(samples)), stderr, degrees=len(samples) - 1)
