"""Thick-restart Lanczos: the eigenpairs at one end of a spectrum, in a subspace of fixed size.

The method is that of Wu and Simon (SIAM J. Matrix Anal. Appl. 22, 2000). In exact arithmetic it spans
the same spaces as the implicitly restarted method of ARPACK.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsam.curvature.lanczos.symmetry import refuse_asymmetric, rounding
from fastsam.curvature.operators.base import Operator, checked_product
from fastsam.kernels.backends import sum_dtype, widened
from fastsam.kernels.lanczos import Recurrence, orthogonalize

Which = Literal["largest", "smallest", "magnitude", "ends"]
Vector = NDArray[np.float64]

_TILE = 1 << 16
"""Columns that a restart combines at a time: it needs no second basis."""

_LEAST_SEARCH, _MOST_SEARCH = 8, 20
"""Number of products of a search for missed eigenvalues: at least, and at most in short runs."""


@dataclass(frozen=True, eq=False)
class RitzPairs:
    """Wanted Ritz pairs, the most wanted first.

    Attributes:
        values: Ritz values, ``[count]``.
        coordinates: unit vectors in the basis of the subspace, as columns ``[size, count]``.
        residuals: ``||A v - value v||`` as the recurrence gives it, ``[count]``.
        allowed: the largest residual of a converged pair.
    """

    values: Vector
    coordinates: Vector
    residuals: Vector
    allowed: float

    @property
    def converged(self) -> int:
        """Number of pairs whose residual is small enough."""
        return int(np.sum(self.residuals <= self.allowed))


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What a run looks for, and when it ends.

    Attributes:
        count: number of pairs, at most n.
        which: the end of the spectrum.
        tolerance: largest residual of a converged pair, as a fraction of the operator's norm.
        most_products: number of products after which the pairs are returned as they are.
        report: called with the wanted pairs after every product.
    """

    count: int
    which: Which
    tolerance: float
    most_products: int
    report: Callable[[RitzPairs], None]


class Subspace:
    """An orthonormal basis Q, the operator projected on it, and the one direction that leads out.

    After every method ``A Q[i] = sum_j T[i, j] Q[j] + coupling[i] q`` holds, where ``q`` is the row
    of ``memory`` after the basis. A plain Lanczos run has a coupling in its last entry alone. After
    a restart every kept Ritz vector has one, and T is an arrowhead. After :meth:`leave` the equation
    holds up to the residuals of the Ritz vectors at that time.

    Args:
        operator: symmetric operator of dimension n.
        memory: memory for the basis and ``q``, ``[capacity + 1, n]``.
        seed: seed of random directions.
    """

    def __init__(self, operator: Operator, memory: Tensor, *, seed: int) -> None:
        self._operator = operator
        self._memory = memory
        self._generator = torch.Generator().manual_seed(seed)
        self._eps = torch.finfo(operator.dtype).eps
        self.capacity = len(memory) - 1
        self._projected: Vector = np.zeros((self.capacity, self.capacity))
        self._coupling: Vector = np.zeros(0)
        self.is_exact = True
        """Whether the basis begins with Ritz vectors whose residuals the recurrence gave exactly."""
        self._neglects = False
        self._left = 0
        """Size at which :meth:`leave` was called; the coupling of that direction is not exact."""
        self.size = 0
        self.norm = 0.0
        """Largest absolute Ritz value so far: a lower bound on the operator's norm."""
        self.products = 0
        self._asymmetry = 0.0

    @property
    def resolution(self) -> float:
        """Largest error of an eigenvalue by rounding."""
        return rounding(self._asymmetry, eps=self._eps) * self.norm

    @property
    def basis(self) -> Tensor:
        """The basis ``[size, n]``, a view."""
        return self._memory[: self.size]

    @property
    def projected(self) -> Vector:
        """The operator projected on the basis, T, ``[size, size]``."""
        return self._projected[: self.size, : self.size]

    @property
    def coupling(self) -> Vector:
        """Coupling of each row of the basis to the direction that leads out, ``[size]``."""
        return self._coupling

    @property
    def out(self) -> Tensor:
        """The direction that leads out, ``[n]``, a view; meaningless if the basis spans R^n."""
        return self._memory[self.size]

    @property
    def is_whole(self) -> bool:
        """Whether the basis spans all of R^n."""
        return self.size == self._memory.shape[1]

    @property
    def is_full(self) -> bool:
        """Whether there is room for no other row."""
        return self.size == self.capacity

    def random_direction(self) -> Tensor:
        """Draw a Gaussian vector ``[n]`` on the CPU, independent of all that were drawn before."""
        shape = self._memory.shape[1:]
        return torch.randn(shape, generator=self._generator, dtype=self._memory.dtype, device="cpu")

    def leave(self, direction: Tensor | None = None) -> None:
        """Replace the direction that leads out by ``direction`` ``[n]``, or by a random one.

        Its coupling to the basis is taken as zero: for Ritz vectors it is at most their residual.
        """
        direction = self.random_direction() if direction is None else direction
        direction = direction.to(self._memory).clone()
        out = self._memory[self.size]
        if self.size:
            self._orthogonalize(self.basis, direction[None], out[None], norm=0.0)
        else:
            long = widened(direction)
            out.copy_(long / long.norm())
        self._neglects |= bool(np.any(self._coupling))
        self._coupling = np.zeros(self.size)
        self._left = self.size

    def grow(self) -> None:
        """Take the direction that leads out into the basis, by one product with the operator.

        Raises:
            AsymmetryError: the product shows that the operator is not symmetric.
            FloatingPointError: the product holds NaN or infinity.
        """
        size = self.size
        latest = self._memory[size : size + 1]
        # A copy: the product may be the argument, a view, or memory of the operator.
        image = checked_product(self._operator.matmat(latest.to(self._operator.device)), latest)
        image = image.to(latest.device).clone()
        self.products += 1
        if size > self._left:
            overlap = float(widened(torch.linalg.vecdot(self._memory[size - 1], image[0])))
            scale = max(self.norm, float(widened(image).norm()))
            if scale > 0:
                asymmetry = float(abs(overlap - self._coupling[-1])) / scale
                refuse_asymmetric(asymmetry, eps=self._eps)
                self._asymmetry = max(self._asymmetry, asymmetry)
        # Without a successor where the basis spans everything: what is left of the image is rounding.
        whole = size + 1 == self._memory.shape[1]
        out = None if whole else self._memory[size + 1 : size + 2]
        rows = self._memory[: size + 1]
        diagonal, beta = self._orthogonalize(rows, image, out, norm=self.norm)
        self._projected[:size, size] = self._projected[size, :size] = self._coupling
        self._projected[size, size] = diagonal
        self._coupling = np.zeros(size + 1)
        self.size = size + 1
        if whole:
            return
        self._coupling[size] = beta
        if beta == 0:  # an invariant subspace: other eigenvectors are orthogonal to it
            self.leave()

    def ritz(self) -> tuple[Vector, Vector]:
        """Return the Ritz values ``[size]`` and their coordinates as columns; update ``norm``.

        Call it after every product, because :meth:`grow` judges rounding by the norm.
        """
        values, coordinates = np.linalg.eigh(self.projected)
        self.norm = max(self.norm, float(np.abs(values).max()))
        return values, coordinates

    def wanted(self, goal: Goal) -> RitzPairs:
        """Return the ``goal.count`` best Ritz pairs, or all of a smaller subspace."""
        values, coordinates = self.ritz()
        residuals = np.abs(self._coupling @ coordinates)
        best = ranking(values, goal.which)[: goal.count]
        allowed = max(goal.tolerance, self._eps) * self.norm
        return RitzPairs(values[best], coordinates[:, best], residuals[best], allowed)

    def restart(self, pairs: RitzPairs) -> None:
        """Reduce the basis to Ritz vectors; the direction that leads out stays."""
        self.is_exact = self.is_exact and not self._neglects
        kept = len(pairs.values)
        sums = sum_dtype(self._memory.device, self._memory.dtype)
        mix = torch.from_numpy(np.ascontiguousarray(pairs.coordinates.T))
        mix = mix.to(self._memory.device, sums)
        for begin in range(0, self._memory.shape[1], _TILE):
            tile = self._memory[:, begin : begin + _TILE]
            tile[:kept] = (mix @ tile[: self.size].to(sums)).to(tile.dtype)
        self._memory[kept] = self._memory[self.size]
        self._coupling = self._coupling @ pairs.coordinates
        self._projected[:] = 0
        self._projected[np.arange(kept), np.arange(kept)] = pairs.values
        self.size = kept

    def measured(self, count: int, allowed: float) -> RitzPairs:
        """Return the first ``count`` rows of the basis as pairs, by a product with each."""
        rows = self._memory[:count]
        images = self._operator.matmat(rows.to(self._operator.device)).to(rows.device)
        self.products += count
        values = widened(torch.linalg.vecdot(rows, images))
        gaps = widened(images) - values[:, None] * widened(rows)
        residuals = gaps.norm(dim=1).cpu().double().numpy()
        return RitzPairs(values.cpu().double().numpy(), np.eye(count), residuals, allowed)

    def _orthogonalize(
        self, rows: Tensor, vector: Tensor, out: Tensor | None, *, norm: float
    ) -> tuple[float, float]:
        """Write ``vector``, less its part in ``rows`` and normalized, to ``out``.

        Returns:
            The overlap of ``vector`` with the last row, and the norm of what is left of it; 0 where
            that is within the rounding of an operator of norm ``norm``.
        """
        kind = sum_dtype(rows.device, rows.dtype)
        step = Recurrence.start(1, 1, device=rows.device, dtype=kind)
        step.bound.fill_(norm)
        orthogonalize(rows[None], vector, out, step, step=0, eps=self._eps)
        overlap, length = float(step.alpha[0, 0]), float(step.beta[0, 0])
        if not np.isfinite(overlap) or not np.isfinite(length):
            raise FloatingPointError(
                f"the operator's product held NaN or infinity at product {self.products}; "
                "a larger dtype (dtype=torch.float64) may help if the model overflows"
            )
        return overlap, length


def ranking(values: Vector, which: Which) -> NDArray[np.int64]:
    """Return the indices that sort values, the most wanted first."""
    if which == "ends":
        rising = np.argsort(values, kind="stable")
        return np.column_stack([rising[::-1], rising]).ravel()[: len(values)]
    keys = {"largest": -values, "smallest": values, "magnitude": -np.abs(values)}
    return np.argsort(keys[which], kind="stable")


def find_extremes(space: Subspace, goal: Goal) -> RitzPairs:
    """Find Ritz pairs at an end of the spectrum; the subspace then holds their vectors.

    A Krylov space holds one direction of each eigenspace, so a multiple eigenvalue would appear
    once. Therefore every set of converged pairs is followed by a search for what is missing.

    Args:
        space: a subspace that has a direction that leads out, and room for more rows than pairs.
        goal: the pairs to find.

    Returns:
        The pairs. They have converged unless ``goal.most_products`` was reached.
    """
    while True:
        pairs = _converge(space, goal)
        if space.is_whole or space.products >= goal.most_products:
            space.restart(pairs)
            break
        if not _misses(space, pairs, goal):
            break
    return pairs if space.is_exact else space.measured(len(pairs.values), pairs.allowed)


def _converge(space: Subspace, goal: Goal) -> RitzPairs:
    """Grow and restart until the wanted pairs have converged, or products have run out."""
    while True:
        if not space.is_whole:
            space.grow()
        pairs = space.wanted(goal)
        goal.report(pairs)
        ready = len(pairs.values) == goal.count
        if ready and (pairs.converged == goal.count or space.products >= goal.most_products):
            return pairs
        if space.is_whole:
            return pairs
        if space.is_full:
            _restart(space, goal, converged=pairs.converged)


def _restart(space: Subspace, goal: Goal, *, converged: int) -> None:
    """Reduce a full subspace to wanted vectors and some that are next to them.

    The rest of the subspace is the degree of the polynomial that the next round applies. At a dense
    end of the spectrum a high degree matters more than many kept vectors, so a restart keeps the
    wanted vectors and, as in ARPACK, another one for each converged pair, so that convergence does
    not lower the effort on the others. A third of the subspace is kept in any case: with one vector
    a round would forget the directions between the wanted value and the rest.
    """
    wanted = goal.count + min(converged, (space.capacity - goal.count) // 2)
    kept = min(space.capacity - 1, max(wanted, space.capacity // 3))
    space.restart(space.wanted(replace(goal, count=kept)))


def _misses(space: Subspace, pairs: RitzPairs, goal: Goal) -> bool:
    """Whether a random direction orthogonal to the pairs leads to a value that replaces one.

    A value can be missing for want of a component in the start vector, as the second copy of a multiple
    eigenvalue is. The search is over if the next values, with their residuals, are behind the pairs.
    Where eigenvalues are dense that takes as long as convergence, so it also ends after a tenth of the
    products so far: to be seen at all, a missing value must only pass those behind it.
    """
    space.restart(pairs)
    space.leave()
    for step in range(max(_MOST_SEARCH, space.products // 10)):
        if space.is_full:
            _restart(space, goal, converged=pairs.converged)
        space.grow()
        found = space.wanted(goal)
        goal.report(found)
        if np.abs(found.values - pairs.values).max() > 2 * pairs.allowed:
            return True
        if space.is_whole:
            return False
        if step + 1 >= _LEAST_SEARCH and _rest_is_behind(space, goal):
            return False
    return False


def _rest_is_behind(space: Subspace, goal: Goal) -> bool:
    """Whether the unwanted values at the wanted ends, moved outwards by their residuals, stay unwanted."""
    everything = space.wanted(replace(goal, count=space.size))
    wanted, rest = np.split(everything.values, [goal.count])
    residuals = everything.residuals[goal.count :]
    upper = {
        "largest": wanted.min(),
        "smallest": np.inf,
        "magnitude": np.abs(wanted).min(),
        "ends": wanted[::2].min(),
    }[goal.which]
    lower = {
        "largest": -np.inf,
        "smallest": wanted.max(),
        "magnitude": -np.abs(wanted).min(),
        "ends": wanted[1::2].max(initial=-np.inf),
    }[goal.which]
    top, bottom = rest.argmax(), rest.argmin()
    slack = 2 * everything.allowed  # for values of equal magnitude, and copies in exact arithmetic
    return bool(
        rest[top] + residuals[top] <= upper + slack
        and rest[bottom] - residuals[bottom] >= lower - slack
    )
