"""What the tridiagonal matrices of a Lanczos run say about the eigenvalues."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fastsam.curvature.estimates import check_confidence
from fastsam.curvature.lanczos.quadrature import Floats, Quadrature, extreme_slack
from fastsam.curvature.lanczos.symmetry import rounding


@dataclass(frozen=True, eq=False)
class RitzValues:
    """Ritz values of one Lanczos run with bounds on their distance from eigenvalues.

    Attributes:
        alpha: diagonals of T, float64 ``[probes, steps]``.
        beta: off-diagonals of T, float64 ``[probes, steps]``.
        order: order of each T, int64 ``[probes]``.
        dimension: n.
        eps: machine epsilon of the products.
        asymmetry: largest asymmetry of the products, relative to the operator's norm, where the run has
            looked for it.
    """

    alpha: Floats
    beta: Floats
    order: NDArray[np.int64]
    dimension: int
    eps: float
    asymmetry: float = 0.0

    @property
    def probes(self) -> int:
        """Number of probes."""
        return len(self.order)

    @cached_property
    def _quadrature(self) -> list[Quadrature]:
        return [
            Quadrature(self.alpha[probe, :order], self.beta[probe, :order], self.resolution)
            for probe, order in enumerate(self.order.tolist())
        ]

    @cached_property
    def resolution(self) -> float:
        """Largest error of an eigenvalue by rounding, ``max(64 eps, 16 asymmetry) ||T||``.

        See :func:`fastsam.curvature.lanczos.symmetry.rounding` for the factors.
        """
        previous = np.pad(self.beta, ((0, 0), (1, 0)))[:, :-1]
        rows = np.abs(self.alpha) + previous + self.beta
        used = np.arange(self.alpha.shape[1]) < self.order[:, None]
        norm = float(np.max(rows, where=used, initial=0.0))
        return rounding(self.asymmetry, eps=self.eps) * norm

    @property
    def nodes(self) -> list[Floats]:
        """Ritz values of each probe in ascending order, ``[order]``."""
        return [rule.nodes for rule in self._quadrature]

    @property
    def weights(self) -> list[Floats]:
        """Quadrature weights of the Ritz values, ``[order]``; they sum to 1 for each probe."""
        return [rule.weights for rule in self._quadrature]

    @property
    def residuals(self) -> list[Floats]:
        """Distance from each Ritz value within which there is an eigenvalue, ``[order]``."""
        return [rule.residuals for rule in self._quadrature]

    @cached_property
    def _lowest(self) -> tuple[float, float]:
        return min((float(rule.nodes[0]), float(rule.residuals[0])) for rule in self._quadrature)

    @cached_property
    def _highest(self) -> tuple[float, float]:
        return max((float(rule.nodes[-1]), float(rule.residuals[-1])) for rule in self._quadrature)

    @property
    def lambda_min(self) -> float:
        """Smallest Ritz value of all probes; at or above the smallest eigenvalue, up to rounding."""
        return self._lowest[0]

    @property
    def lambda_max(self) -> float:
        """Largest Ritz value of all probes; at or below the largest eigenvalue, up to rounding."""
        return self._highest[0]

    @property
    def lambda_min_residual(self) -> float:
        """Distance from ``lambda_min`` within which there is *an* eigenvalue."""
        return self._lowest[1]

    @property
    def lambda_max_residual(self) -> float:
        """Distance from ``lambda_max`` within which there is *an* eigenvalue."""
        return self._highest[1]

    @property
    def ratio(self) -> float:
        """The paper's saddle measure ``|lambda_min / lambda_max|``; NaN if lambda_max is 0."""
        return abs(self.lambda_min / self.lambda_max) if self.lambda_max != 0 else math.nan

    def outer_bounds(self, confidence: float = 0.95) -> tuple[float, float]:
        """Return an interval that contains the spectrum with probability at least ``confidence``.

        It follows from the probabilistic bound of Kuczynski and Wozniakowski (SIAM J. Matrix Anal.
        Appl. 13, 1992, theorem 4.2) for a random start on the sphere, applied to both ends. If the
        run is too short for the bound, the interval is infinite.
        """
        check_confidence(confidence)
        order = int(self.order.min())
        last = self.beta[np.arange(self.probes), self.order - 1]
        # An exhausted Krylov space of a random start contains every eigenvalue.
        if order >= self.dimension or bool(np.any(last == 0)):
            return (
                self.lambda_min - self.lambda_min_residual,
                self.lambda_max + self.lambda_max_residual,
            )
        # Half of the failure probability for each end; an end fails only if every probe fails.
        failure = ((1 - confidence) / 2) ** (1 / self.probes)
        share = extreme_slack(self.dimension, order, failure)
        if share == math.inf:
            return -math.inf, math.inf
        slack = share * (self.lambda_max - self.lambda_min)
        return (
            self.lambda_min - slack - self.lambda_min_residual,
            self.lambda_max + slack + self.lambda_max_residual,
        )
