"""Gauss quadrature from T of one probe, with bounds on its error.

The spectral measure of a probe v has the mass ``(q_i . v)^2`` at eigenvalue i. The nodes and weights of
T integrate polynomials of degree ``2 * order - 1`` against it exactly. Other measures have the same
moments, so the mass left of a point is known only up to the bounds of Chebyshev, Markov and
Stieltjes: for a rule with nodes t_1 < t_2 < ... that is exact up to degree ``2 * nodes - 2``, the mass
left of t_k is between the sum of the weights left of t_k and that sum plus the weight of t_k
(Szego, Orthogonal Polynomials, section 3.41).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.polynomial.chebyshev import Chebyshev
from numpy.typing import NDArray

from fastsam.curvature.lanczos.tridiagonal import ritz_pairs

Floats = NDArray[np.float64]

_SAMPLES = 16
"""Number of points per node at which a function is sampled to bound its quadrature error."""

_CELLS = 512
"""Number of cells of the discretized distribution of a probe's mass."""

_SUM_ROUNDING = 1e-12
"""Largest rounding error of a sum of weights."""


@dataclass(frozen=True, eq=False)
class Quadrature:
    """The Gauss rule of one probe.

    Attributes:
        alpha: diagonal of T, ``[order]``.
        beta: off-diagonal, ``[order]``. The last element is the norm of the residual; it is 0 if the
            Krylov space is exhausted, and the measure then has mass only at the nodes.
        resolution: largest error of an eigenvalue by rounding.
    """

    alpha: Floats
    beta: Floats
    resolution: float

    @cached_property
    def _eigen(self) -> tuple[Floats, Floats]:
        return ritz_pairs(self.alpha, self.beta)

    @property
    def nodes(self) -> Floats:
        """Ritz values in ascending order, ``[order]``."""
        return self._eigen[0]

    @cached_property
    def weights(self) -> Floats:
        """Weights of the nodes, ``[order]``; they sum to 1."""
        return np.asarray(self._eigen[1][0] ** 2)

    @cached_property
    def residuals(self) -> Floats:
        """Distance from each node within which there is an eigenvalue, ``[order]``."""
        return np.asarray(np.abs(self.beta[-1] * self._eigen[1][-1]) + self.resolution)

    @property
    def exhausted(self) -> bool:
        """Whether the nodes are all eigenvalues in whose eigenspaces the probe has a component."""
        return bool(self.beta[-1] == 0)

    def mass_below(self, point: float) -> tuple[float, float]:
        """Return a lower and an upper bound on the mass left of ``point``.

        The bounds are sharp: among all rules with the same moments, the one with a node at the point
        attains them. For rounding, the point is moved by the resolution in both directions.
        """
        # All nodes are within the scale; farther than four times that, the bounds do not change.
        point = min(max(point, -4 * self._scale), 4 * self._scale)
        left, right = point - self.resolution, point + self.resolution
        if self.exhausted:
            weights = self.weights
            return float(weights[self.nodes < left].sum()), float(weights[self.nodes < right].sum())
        slack = 16 * np.finfo(np.float64).eps * self._scale
        nodes, weights = self._rule_with_node(left)
        low = weights[nodes < left - slack].sum()
        nodes, weights = self._rule_with_node(right)
        high = weights[nodes < right + slack].sum()
        return float(low), float(min(high, 1.0))

    @property
    def _scale(self) -> float:
        return float(np.abs(self.nodes).max() + self.beta[-1])

    def _rule_with_node(self, point: float) -> tuple[Floats, Floats]:
        """Return nodes and weights of a rule with a node at ``point``, up to rounding.

        T gets another row, whose diagonal entry determines the position of the node (Golub, SIAM
        Review 15, 1973). Close to a node of T that entry is so large that rounding would spoil the
        other nodes. There, the last diagonal entry of T is changed instead, which also places the
        node and lowers the degree of exactness only slightly.
        """
        coupling = (self.beta[-1] * self._eigen[1][-1]) ** 2
        joined = coupling > 0  # uncoupled nodes are unaffected by the new row
        with np.errstate(divide="ignore"):
            pull = float(np.sum(coupling[joined] / (self.nodes[joined] - point)))
        if abs(pull) <= 4 * self._scale:
            alpha = np.append(self.alpha, point + pull)
        else:
            alpha = self.alpha.copy()
            alpha[-1] -= self.beta[-1] ** 2 / pull
        nodes, vectors = ritz_pairs(alpha, self.beta)
        return nodes, vectors[0] ** 2

    def integral(
        self, function: Callable[[Floats], Floats], interval: tuple[float, float]
    ) -> tuple[float, float]:
        """Return the integral of f by the quadrature, and a bound on its error.

        The bound is the smaller of two. For f of bounded variation: the integral of ``|df|`` times
        the largest error of the mass left of each point. For smooth f: the distance of f to a
        polynomial that the quadrature integrates exactly. f is sampled and assumed to be linear
        between two samples.

        Args:
            function: f, applied to an array.
            interval: an interval that contains all eigenvalues.

        Returns:
            The integral and the bound, which is infinite if the interval is infinite or f is not
            finite on it.

        Raises:
            ValueError: f is not finite at a node.
        """
        at_nodes = finite_values(function, self.nodes)
        with np.errstate(all="ignore"):
            return float(self.weights @ at_nodes), self._error(sampler(function), interval)

    def bracket(self, function: Callable[[Floats], Floats], lowest: float) -> tuple[float, float]:
        """Return the middle of two bounds on the integral of f, and half of their distance.

        For an f whose derivatives alternate in sign, the Gauss rule and the Gauss-Radau rule with a
        node at ``lowest`` err in opposite directions (Golub and Meurant, Matrices, Moments and
        Quadrature with Applications, section 6). For rounding, the nodes are moved by twice the
        resolution in both directions.

        Args:
            function: f, applied to an array; the sign of each derivative is constant above ``lowest``
                and opposite to that of the next.
            lowest: a number that is at most the smallest eigenvalue.

        Raises:
            ValueError: f is not finite at a node or at ``lowest``, or a node is below ``lowest``.
        """
        refuse_below(lowest, float(self.nodes[0]), resolution=self.resolution)
        slack = 2 * self.resolution
        rules = [(self.nodes, self.weights)]
        if not self.exhausted:
            rules.append(self._rule_with_node(min(lowest, float(self.nodes[0]))))
        sums = []
        for nodes, weights in rules:
            moved = [np.maximum(nodes + step, lowest) for step in (-slack, slack)]
            ends = np.array([finite_values(function, points) for points in moved])
            sums += [ends.min(axis=0) @ weights, ends.max(axis=0) @ weights]
        return float(min(sums) + max(sums)) / 2, float(max(sums) - min(sums)) / 2

    def _error(self, function: Callable[[Floats], Floats], interval: tuple[float, float]) -> float:
        low, high = interval
        if not self.exhausted and not math.isfinite(high - low):
            return math.inf
        points = (self.nodes[:, None] + 2 * self.resolution * np.array([-1, 0, 1])).ravel()
        if not self.exhausted:
            steps = np.linspace(0, np.pi, _SAMPLES * len(self.nodes) + 1)
            points = np.append(points, low + (high - low) * (0.5 - 0.5 * np.cos(steps)))
        points = np.unique(points)
        values = function(points)
        if not np.all(np.isfinite(values)):
            return math.inf
        by_variation = self._variation_error(points, values)
        if self.exhausted:
            return by_variation
        polynomial = Chebyshev.interpolate(
            function, 2 * len(self.nodes) - 1, domain=[points[0], points[-1]]
        )
        rest = np.abs(values - polynomial(points))
        at_nodes = rest[np.searchsorted(points, self.nodes)]
        return min(by_variation, float(rest.max() + self.weights @ at_nodes))

    def _variation_error(self, points: Floats, values: Floats) -> float:
        total = np.concatenate([[0.0], np.cumsum(self.weights)])
        last = len(total) - 1
        left, right = points[:-1], points[1:]
        # Bounds on the mass left of any point in a cell, from the nodes next to the cell.
        before = np.searchsorted(self.nodes, left - self.resolution, side="right")
        after = np.searchsorted(self.nodes, right + self.resolution, side="left")
        reach = 0 if self.exhausted else 1
        low = total[np.maximum(before - reach, 0)]
        high = total[np.minimum(after + reach, last)]
        first = total[np.searchsorted(self.nodes, left, side="right")]
        second = total[np.searchsorted(self.nodes, right, side="right")]
        gap = np.maximum(high - first, second - low)
        return float(gap @ np.abs(np.diff(values)))


def sampler(function: Callable[[Floats], Floats]) -> Callable[[Floats], Floats]:
    """Return ``function`` with float64 results of the shape of its argument."""
    return lambda points: np.broadcast_to(
        np.asarray(function(points), dtype=np.float64), points.shape
    )


def finite_values(function: Callable[[Floats], Floats], points: Floats) -> Floats:
    """Return a function at eigenvalues or estimates of them.

    Raises:
        ValueError: a value is not finite.
    """
    with np.errstate(all="ignore"):
        values = sampler(function)(points)
    if not np.all(np.isfinite(values)):
        worst = float(points[~np.isfinite(values)][0])
        raise ValueError(
            f"the function is not finite at the eigenvalue {worst:.6g} or its estimate; pass a "
            "function that is finite at all eigenvalues, for example one of H + shift I"
        )
    return values


def refuse_below(lowest: float | None, least: float, *, resolution: float) -> None:
    """Raise ValueError if the smallest known eigenvalue, or estimate of it, is below ``lowest``.

    Args:
        lowest: a number that should be at most the smallest eigenvalue; None is not checked.
        least: the smallest eigenvalue that is known.
        resolution: largest error of an eigenvalue by rounding.
    """
    if lowest is not None and least < lowest - 2 * resolution:
        raise ValueError(
            f"lowest must be at most the smallest eigenvalue, got {lowest} for an eigenvalue of {least}"
        )


def share_limits(
    lower: float, upper: float, *, dimension: int, probes: int, confidence: float
) -> tuple[float, float]:
    """Return confidence limits of a fraction of n eigenvalues, given their mean mass over the probes.

    For a probe that is uniform on the sphere, the mass of k of n eigenvalues has the distribution
    Beta(k/2, (n-k)/2). The limits contain every k for which the mean over the probes is as large, or
    as small, as the observed one with a probability of at least ``(1 - confidence) / 2``, as in the
    interval of Clopper and Pearson.

    Args:
        lower: lower bound on the mean mass.
        upper: upper bound on the mean mass.
        dimension: n.
        probes: number of probes.
        confidence: probability, over the random probes, that the limits contain the true fraction.

    Returns:
        The lower and the upper limit, multiples of 1/n.
    """
    tail = (1 - confidence) / 2
    fewest = _fewest(lower - _SUM_ROUNDING, dimension, probes, tail)
    fewest_above = _fewest(1 - upper - _SUM_ROUNDING, dimension, probes, tail)
    return fewest / dimension, (dimension - fewest_above) / dimension


def _fewest(mass: float, dimension: int, probes: int, tail: float) -> int:
    """Return the smallest number of eigenvalues for which a mean mass of ``mass`` is not unlikely."""
    few, many = 0, dimension
    if mass <= 0:
        return 0
    while many - few > 1:
        middle = (few + many) // 2
        if _probability_above(mass, middle, dimension, probes) < tail:
            few = middle
        else:
            many = middle
    return many


def _probability_above(mass: float, rank: int, dimension: int, probes: int) -> float:
    """Bound P(mean of ``probes`` Beta(rank / 2, (dimension - rank) / 2) variables > ``mass``) from above.

    A Beta variable is sin^2 of an angle with the density ``sin^(rank - 1) cos^(dimension - rank - 1)``,
    which is smooth and at least as concentrated as a normal density of variance ``1 / (dimension -
    2)``. The distribution of the sum is a convolution on cells. Values are rounded up to the ends of
    cells, so the probability is never too small.
    """
    mode = np.arctan2(np.sqrt(rank - 1), np.sqrt(dimension - rank - 1))
    reach = 6.5 / np.sqrt(dimension)
    low, high = max(0.0, mode - reach), min(np.pi / 2, mode + reach)
    angles = low + (high - low) * (np.arange(4 * _CELLS) + 0.5) / (4 * _CELLS)
    sine, cosine = np.sin(angles), np.cos(angles)
    logarithm = (rank - 1) * np.log(sine) + (dimension - rank - 1) * np.log(cosine)
    density = np.exp(logarithm - logarithm.max())
    start, width = np.sin(low) ** 2, (np.sin(high) ** 2 - np.sin(low) ** 2) / _CELLS
    cells = np.minimum((sine**2 - start) / width, _CELLS - 1).astype(np.int64)
    one = np.bincount(cells, density / density.sum(), minlength=_CELLS)
    count = probes * (_CELLS - 1) + 1
    length = 1 << (count - 1).bit_length()
    total = np.fft.irfft(np.fft.rfft(one, length) ** probes, length)
    first = math.ceil(probes * ((mass - start) / width - 1))
    return float(total[max(first, 0) :].sum())


def extreme_slack(dimension: int, order: int, failure: float) -> float:
    """Return how far an extreme eigenvalue may be outside the nodes, as a fraction of their range.

    The bound of Kuczynski and Wozniakowski (SIAM J. Matrix Anal. Appl. 13, 1992, theorem 4.2) for a
    random start on the sphere; infinite if the run is too short for it.

    Args:
        dimension: n.
        order: Lanczos steps.
        failure: probability that the bound fails for one probe.
    """
    logarithm = max(0.0, math.log(1.648 * math.sqrt(dimension) / failure))
    relative = (logarithm / (2 * order - 1)) ** 2
    return math.inf if relative >= 0.5 else relative / (1 - 2 * relative)


def bin_shares(rules: Sequence[Quadrature], cuts: Floats) -> tuple[Floats, Floats, Floats]:
    """Return the shares of the mass in bins: estimates, lower and upper bounds, ``[bins]`` each.

    Args:
        rules: the rule of each probe.
        cuts: eigenvalues between the bins in ascending order, ``[bins - 1]``.
    """
    below = np.array([[(0.0, 0.0), *map(rule.mass_below, cuts), (1.0, 1.0)] for rule in rules])
    low, high = below[..., 0], below[..., 1]
    least = np.maximum(low[:, 1:] - high[:, :-1], 0).mean(axis=0)
    most = (high[:, 1:] - low[:, :-1]).mean(axis=0)
    return np.diff((low + high).mean(axis=0) / 2), least, most


def refuse_indefinite(least: float, shift: float, *, resolution: float) -> None:
    """Raise ValueError unless ``H + shift I`` is positive definite beyond rounding.

    Args:
        least: smallest eigenvalue, or its estimate.
        shift: the shift.
        resolution: largest error of an eigenvalue by rounding.
    """
    if not least + shift > resolution:
        raise ValueError(
            f"H + shift I is not positive definite beyond rounding ({resolution:.1e}): lambda_min is "
            f"{least:.6g}, shift is {shift:.6g}; pass a shift above {resolution - least:.3g}"
        )
