"""Spectra from Lanczos runs: eigenvalues, traces and densities, with error bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastsam.curvature.density import smoothed_density, smoothing_width
from fastsam.curvature.estimates import Estimate, Histogram, MassBelow, check_confidence
from fastsam.curvature.lanczos.quadrature import (
    Floats,
    bin_shares,
    refuse_indefinite,
    share_limits,
)
from fastsam.curvature.lanczos.ritz import RitzValues
from fastsam.curvature.lanczos.tridiagonal import first_moment, second_moment
from fastsam.curvature.storage import read_spectrum, write_spectrum
from fastsam.curvature.summary_table import summary_table


@dataclass(frozen=True, eq=False)
class Spectrum(RitzValues):
    """Stochastic Lanczos quadrature of a symmetric operator of dimension n.

    Everything is derived from the tridiagonal matrices T, one per probe. A probe is a random unit
    vector, uniform on the sphere. For a function f, ``n * sum(weights * f(nodes))`` of a probe is an
    unbiased estimate of trace f(H), up to the error of the quadrature, which is exact for polynomials
    of degree 2 * steps - 1.

    Attributes:
        alpha: diagonals of T, float64 ``[probes, steps]``.
        beta: off-diagonals of T, float64 ``[probes, steps]``.
        order: order of each T, int64 ``[probes]``.
        dimension: n.
        eps: machine epsilon of the products.
        asymmetry: largest asymmetry of the products relative to the operator's norm; 0 if unknown.
        loss: mean loss; None if the operator is not that of a model.
        gradient_norm: 2-norm of the gradient of the mean loss, or None.
        weight_norm: 2-norm of the parameters, or None.
        weight: sum W of the loss weights, or None; for class spectra ``sum(W_c H_c) / W = H``.
        settings: options and choices of the run, as JSON values; ``"params"`` lists its layers and
            parameters.

    Example:
        >>> import fastsam, torch
        >>> model = torch.nn.Linear(3, 2)
        >>> batch = torch.randn(8, 3), torch.randint(2, (8,))
        >>> spectrum = fastsam.spectral_density(model, torch.nn.CrossEntropyLoss(), batch, steps=8)
        >>> spectrum.lambda_max >= spectrum.lambda_min
        True
    """

    loss: float | None = None
    gradient_norm: float | None = None
    weight_norm: float | None = None
    weight: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def function(
        self,
        function: Callable[[Floats], Floats],
        *,
        lowest: float | None = None,
        alternating: bool = False,
    ) -> Estimate:
        """Estimate the trace of f(H), with the errors of the random probes and of the quadrature.

        The variance of ``n u'Au`` for u uniform on the sphere is ``2 n^2 / (n+2) (m2 - m1^2)``,
        where m1 and m2 are the means of the eigenvalues of A and of their squares. Both are computed
        by the quadrature and pooled over the probes, with the bias of m1^2 removed. The degrees of
        freedom account for the randomness of these means.

        The quadrature error is bounded by the distance of f to a polynomial that the quadrature
        integrates exactly, or by the variation of f times the mass that may be elsewhere than at the
        nodes. It is negligible for a smooth f, and large for a step close to many eigenvalues. For
        these bounds, f is sampled on the interval that contains all eigenvalues with 99 % confidence,
        so they miss a peak between two samples. They are infinite if f is not finite there, or if the
        run is too short for such an interval (:meth:`outer_bounds`).

        Args:
            function: f, applied to an array of eigenvalues.
            lowest: a number that is known to be at most the smallest eigenvalue, such as 0 for a
                Gauss-Newton or Fisher matrix. Default None: the lower end of that interval.
            alternating: whether the derivatives of f alternate in sign, as those of log x, sqrt x,
                1/x and exp(-x) do. The value is then the middle of rigorous bounds, those of the rules
                of Gauss and Gauss-Radau, and the error half of their distance. With ``lowest`` they
                always hold.

        Returns:
            The estimate; ``stderr`` is the standard error over the probes plus ``quadrature_error``.

        Raises:
            ValueError: f is not finite at a node or at ``lowest``, or an eigenvalue is below
                ``lowest``.
        """
        interval = self.outer_bounds(0.99)
        if lowest is not None:
            interval = lowest, interval[1]
        rules = self._quadrature
        if alternating and (lowest is not None or _is_finite_at(function, interval[0])):
            pairs = [rule.bracket(function, interval[0]) for rule in rules]
        else:
            pairs = [rule.integral(function, interval) for rule in rules]
        means, errors = np.transpose(pairs)
        mean = float(np.mean(means))

        def moment(power: int) -> float:
            def deviation(points: Floats) -> Floats:
                return np.asarray((function(points) - mean) ** power)

            # The error bound is added, so that the spread is not underestimated.
            return float(np.mean([sum(rule.integral(deviation, interval)) for rule in rules]))

        spread, fourth = moment(2), moment(4)
        quadrature_error = self.dimension * float(np.mean(errors))
        return Estimate(
            value=self.dimension * mean,
            stderr=self._stderr(spread) + quadrature_error,
            quadrature_error=quadrature_error,
            degrees=self._degrees(spread, fourth),
        )

    def _degrees(self, spread: float, fourth: float) -> float:
        """Return the degrees of freedom of a variance that is computed from ``spread``.

        Those of Satterthwaite (Biometrics Bulletin 2, 1946), ``2 E[V]^2 / Var(V)``: few if a few
        eigenvalues dominate the spread, because their weights are random.

        Args:
            spread: mean squared deviation of the values of f at the eigenvalues.
            fourth: mean fourth power of the deviation.
        """
        rest = fourth - spread**2
        if not 0 < rest < math.inf:
            return math.inf
        return max(1.0, float(math.floor(self.probes * (self.dimension + 2) * spread**2 / rest)))

    def _stderr(self, spread: float) -> float:
        """Return the standard error of a trace, given the mean squared deviation of eigenvalues."""
        n = self.dimension
        unbiased = spread / (1 - 2 / ((n + 2) * self.probes))
        return math.sqrt(2 * n**2 / (n + 2) * unbiased / self.probes)

    @property
    def trace(self) -> float:
        """Estimated trace of H."""
        return self.trace_estimate.value

    @property
    def trace_stderr(self) -> float:
        """Standard error of :attr:`trace` over the probes; its quadrature is exact."""
        return self.trace_estimate.stderr

    @property
    def frobenius_norm_squared(self) -> float:
        """Estimated squared Frobenius norm of H, the trace of H^2."""
        return self.frobenius_norm_squared_estimate.value

    @property
    def frobenius_norm_squared_stderr(self) -> float:
        """Standard error of :attr:`frobenius_norm_squared`; infinite after a single step.

        It requires the fourth moment of the eigenvalues, which takes two steps.
        """
        return self.frobenius_norm_squared_estimate.stderr

    @cached_property
    def trace_estimate(self) -> Estimate:
        """:attr:`trace` with its error and the degrees of freedom of the error."""
        mean, spread = first_moment(self.alpha, self.beta)
        return self._estimate(mean, spread, power=1)

    @cached_property
    def frobenius_norm_squared_estimate(self) -> Estimate:
        """:attr:`frobenius_norm_squared` with its error and the degrees of freedom of the error."""
        mean, spread = second_moment(self.alpha, self.beta, self.order)
        return self._estimate(mean, spread, power=2)

    def _estimate(self, mean: float, spread: float, *, power: int) -> Estimate:
        """Return the trace of H^power, given mean and mean squared deviation of the eigenvalues' powers."""
        pairs = zip(self.nodes, self.weights, strict=True)
        fourth = float(np.mean([w @ (nodes**power - mean) ** 4 for nodes, w in pairs]))
        return Estimate(
            self.dimension * mean, self._stderr(spread), degrees=self._degrees(spread, fourth)
        )

    def log_determinant(self, shift: float = 0.0, *, lowest: float | None = None) -> Estimate:
        """Estimate the log-determinant of ``H + shift I``; see :meth:`function` for its error.

        Without ``lowest``, the error is infinite unless the interval of :meth:`outer_bounds` is above
        ``-shift``.

        Raises:
            ValueError: H + shift I is not positive definite beyond rounding, or an eigenvalue is below
                ``lowest``.
        """
        least = self.lambda_min if lowest is None else min(lowest, self.lambda_min)
        refuse_indefinite(least, shift, resolution=self.resolution)
        return self.function(lambda nodes: np.log(nodes + shift), lowest=lowest, alternating=True)

    @property
    def default_threshold(self) -> float:
        """Default threshold of :meth:`mass_below`, ``-2 resolution``.

        Zero eigenvalues are above it in spite of rounding.
        """
        return -2 * self.resolution

    def mass_below(self, threshold: float | None = None, confidence: float = 0.95) -> MassBelow:
        """Return the fraction of the eigenvalues below ``threshold``, with rigorous limits.

        A cluster of eigenvalues, such as that at zero of a trained network, is one node of the
        quadrature. If the threshold is within the cluster, the side on which the node lies is
        meaningless. The limits account for all distributions of eigenvalues that are consistent with
        the run, and for the random probes. They are wide if the threshold is close to a cluster.
        Away from clusters, the quadrature contributes about ``pi / steps`` times the density times
        half the range of the eigenvalues, and the probes at most ``2.8 / sqrt(dimension * probes)``.

        Args:
            threshold: an eigenvalue, known up to :attr:`resolution`. Default None:
                :attr:`default_threshold`.
            confidence: probability, over the random probes, that the limits contain the true
                fraction. Default 0.95.

        Raises:
            ValueError: ``threshold`` is not finite, or ``confidence`` is not between 0 and 1.
        """
        check_confidence(confidence)
        point = self.default_threshold if threshold is None else float(threshold)
        if not math.isfinite(point):
            raise ValueError(f"threshold must be finite, got {threshold}")
        low, high = np.mean([rule.mass_below(point) for rule in self._quadrature], axis=0)
        lower, upper = self._share_limits(low, high, confidence)
        value = min(max(float(low + high) / 2, lower), upper)
        return MassBelow(threshold=point, value=value, lower=lower, upper=upper)

    def _share_limits(self, low: float, high: float, confidence: float) -> tuple[float, float]:
        return share_limits(
            float(low),
            float(high),
            dimension=self.dimension,
            probes=self.probes,
            confidence=confidence,
        )

    def width(self, rule: str = "scale-free") -> float:
        """Return the standard deviation of the Gaussian that smooths the density, an eigenvalue.

        Args:
            rule: ``"scale-free"`` (default): 1/200 of the range of the nodes, so that scaling H
                scales the curve; ``"pyhessian"``: variance 1e-5 max(1, range) (PyHessian's default);
                ``"papyan"``: ``range / (steps - 1) / sqrt(8 ln 1.25)`` (Papyan, arXiv 1811.07062;
                Lin, Saad, Yang, SIAM Review 58, 2016).

        Raises:
            ValueError: ``rule`` is unknown.
        """
        steps = max(2, int(self.order.max()))
        return smoothing_width(rule, self.lambda_min, self.lambda_max, steps=steps)

    def grid(self, points: int = 1001, *, sigma: float | str = "scale-free") -> Floats:
        """Return ``points`` equidistant eigenvalues that cover all nodes and 5 sigma on both sides."""
        width = self._sigma(sigma)
        return np.linspace(self.lambda_min - 5 * width, self.lambda_max + 5 * width, points)

    def density(self, grid: ArrayLike, sigma: float | str = "scale-free") -> Floats:
        """Return the density of the eigenvalues at ``grid``, smoothed by a Gaussian; it integrates to 1.

        Args:
            grid: eigenvalues of any shape, for example :meth:`grid`.
            sigma: standard deviation, or the name of a rule of :meth:`width`.
        """
        points = np.asarray(grid, dtype=np.float64)
        return smoothed_density(points, self.nodes, self.weights, self._sigma(sigma))

    def histogram(self, edges: ArrayLike, confidence: float = 0.95) -> Histogram:
        """Return the fraction of the eigenvalues in each bin, with rigorous limits.

        The two outer bins are open-ended, so the fractions sum to 1. See :meth:`mass_below` for the
        limits.

        Args:
            edges: eigenvalues between the bins in ascending order, ``[bins - 1]``.
            confidence: probability, for each bin separately, that its limits contain the true
                fraction. Default 0.95.

        Raises:
            ValueError: ``edges`` are not finite and ascending, or ``confidence`` is not between 0
                and 1.
        """
        check_confidence(confidence)
        cuts = np.asarray(edges, dtype=np.float64)
        if cuts.ndim != 1 or not np.all(np.isfinite(cuts)) or np.any(np.diff(cuts) < 0):
            raise ValueError(f"edges must be finite numbers in ascending order, got {edges!r}")
        shares, least, most = bin_shares(self._quadrature, cuts)
        limits = np.array(
            [self._share_limits(*bounds, confidence) for bounds in zip(least, most, strict=True)]
        )
        return Histogram(edges=cuts, shares=shares, lower=limits[:, 0], upper=limits[:, 1])

    def _sigma(self, sigma: float | str) -> float:
        width = self.width(sigma) if isinstance(sigma, str) else float(sigma)
        if not width > 0 or not math.isfinite(width):
            raise ValueError(f"sigma must be positive and finite, got {sigma}")
        return width

    def plot(
        self,
        axes: Any = None,
        *,
        sigma: float | str = "scale-free",
        label: str | None = None,
        stems: bool = False,
    ) -> Any:
        """Draw the density with matplotlib; see :func:`fastsam.curvature.plots.plot_density`."""
        from fastsam.curvature.plots import plot_density

        return plot_density([self], axes=axes, sigma=sigma, labels=[label], stems=stems)

    def summary(self) -> dict[str, float | int | None]:
        """Return the main results by name, for tables and JSON."""
        below = self.mass_below()
        return {
            "lambda_min": self.lambda_min,
            "lambda_min_residual": self.lambda_min_residual,
            "lambda_max": self.lambda_max,
            "lambda_max_residual": self.lambda_max_residual,
            "ratio": self.ratio,
            "trace": self.trace,
            "trace_stderr": self.trace_stderr,
            "frobenius_norm_squared": self.frobenius_norm_squared,
            "frobenius_norm_squared_stderr": self.frobenius_norm_squared_stderr,
            "threshold": below.threshold,
            "mass_below": below.value,
            "mass_below_lower": below.lower,
            "mass_below_upper": below.upper,
            "dimension": self.dimension,
            "probes": self.probes,
            "loss": self.loss,
            "gradient_norm": self.gradient_norm,
            "weight_norm": self.weight_norm,
            "weight": self.weight,
        }

    def save(self, path: str | Path) -> None:
        """Save to a ``.json`` file, which includes the summary, or to an ``.npz`` file.

        The file is written atomically. A symbolic link at ``path`` is replaced, not followed.

        Raises:
            ValueError: ``path`` has another suffix.
            OSError: the file cannot be written; an existing file is unchanged.
        """
        content = {item.name: getattr(self, item.name) for item in fields(self)}
        write_spectrum(Path(path), content, self.summary())

    @classmethod
    def load(cls, path: str | Path) -> Spectrum:
        """Load a file written by :meth:`save`.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is not a spectrum, or it is damaged.
        """
        try:
            return cls(**read_spectrum(Path(path)))
        except TypeError as error:  # a field that is missing or unknown
            raise ValueError(f"{path} is not a spectrum written by fastsam: {error}") from error

    def __repr__(self) -> str:
        return (
            f"Spectrum(lambda_min={self.lambda_min:.6g}, lambda_max={self.lambda_max:.6g}, "
            f"trace={self.trace:.6g} +- {self.trace_stderr:.2g}, dimension={self.dimension}, "
            f"probes={self.probes}, steps={int(self.order.max())})"
        )

    def _repr_html_(self) -> str:
        return summary_table(self.summary(), steps=int(self.order.max()))


def _is_finite_at(function: Callable[[Floats], Floats], point: float) -> bool:
    with np.errstate(all="ignore"):
        return math.isfinite(point) and bool(np.isfinite(function(np.array([point]))).all())
