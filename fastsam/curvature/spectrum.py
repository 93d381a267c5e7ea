"""What one Lanczos run says about an operator, and how far each number can be trusted."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastsam.curvature.lanczos import tridiagonal
from fastsam.files import from_json, to_json, write_atomically, write_text

Floats = NDArray[np.float64]

WIDTH_RULES = ("scale-free", "pyhessian", "papyan")


class Estimate(NamedTuple):
    """A number with its standard error."""

    value: float
    stderr: float


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Stochastic Lanczos quadrature of a symmetric operator of dimension n.

    Everything is derived from the tridiagonal matrices T, one per probe; a probe is a random unit
    vector, uniform on the sphere. For a function f, ``n * sum(weights * f(nodes))`` of a probe
    estimates trace f(H) without bias (up to the quadrature, exact for polynomials of degree 2 *
    steps - 1).

    Attributes:
        alpha: diagonals of T, float64 ``[probes, steps]``.
        beta: off-diagonals of T, float64 ``[probes, steps]``.
        order: order of each T, int64 ``[probes]``.
        dimension: n.
        eps: machine epsilon of the products.
        loss: mean loss, or None for an operator that is not a model's.
        gradient_norm: 2-norm of the mean loss's gradient, or None.
        weight_norm: 2-norm of the parameters, or None.
        weight: sum of the loss weights W; with class spectra ``sum(W_c H_c) / W = H``. None as
            above.
        settings: what the run was asked for and what it chose (JSON values); ``"params"`` are the
            layers and parameters it is of.

    Example:
        >>> import fastsam, torch
        >>> model = torch.nn.Linear(3, 2)
        >>> batch = torch.randn(8, 3), torch.randint(2, (8,))
        >>> spectrum = fastsam.spectral_density(model, torch.nn.CrossEntropyLoss(), batch, steps=8)
        >>> spectrum.lambda_max >= spectrum.lambda_min
        True
    """

    alpha: Floats
    beta: Floats
    order: NDArray[np.int64]
    dimension: int
    eps: float
    loss: float | None = None
    gradient_norm: float | None = None
    weight_norm: float | None = None
    weight: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def probes(self) -> int:
        """Number of probes."""
        return len(self.order)

    @cached_property
    def _quadrature(self) -> list[tuple[Floats, Floats, Floats]]:
        """Nodes, weights and residual bounds of each probe, nodes ascending."""
        return [self._diagonalize(probe) for probe in range(self.probes)]

    def _diagonalize(self, probe: int) -> tuple[Floats, Floats, Floats]:
        order = int(self.order[probe])
        alpha, beta = self.alpha[probe, :order], self.beta[probe, :order]
        nodes, vectors = np.linalg.eigh(tridiagonal(alpha, beta))
        residuals = np.abs(beta[-1] * vectors[-1]) + self._rounding(alpha, beta)
        return nodes, vectors[0] ** 2, residuals

    def _rounding(self, alpha: Floats, beta: Floats) -> float:
        """What rounding may add to a residual: a run ends where beta falls below 64 eps ||T||."""
        previous = np.concatenate([[0.0], beta[:-1]])
        return float(64 * self.eps * np.max(np.abs(alpha) + previous + beta))

    @property
    def nodes(self) -> list[Floats]:
        """Ritz values of each probe, ascending, ``[order]``."""
        return [nodes for nodes, _, _ in self._quadrature]

    @property
    def weights(self) -> list[Floats]:
        """Quadrature weight of each Ritz value, ``[order]``; they sum to 1 per probe."""
        return [weights for _, weights, _ in self._quadrature]

    @property
    def residuals(self) -> list[Floats]:
        """Ritz residual bounds, ``[order]``: an eigenvalue lies within each distance."""
        return [residuals for _, _, residuals in self._quadrature]

    @cached_property
    def _lowest(self) -> tuple[float, float]:
        return min(
            (float(nodes[0]), float(residuals[0])) for nodes, _, residuals in self._quadrature
        )

    @cached_property
    def _highest(self) -> tuple[float, float]:
        return max(
            (float(nodes[-1]), float(residuals[-1])) for nodes, _, residuals in self._quadrature
        )

    @property
    def lambda_min(self) -> float:
        """Smallest Ritz value of all probes: not below the smallest eigenvalue, up to rounding."""
        return self._lowest[0]

    @property
    def lambda_max(self) -> float:
        """Largest Ritz value of all probes: at or below the largest eigenvalue, up to rounding."""
        return self._highest[0]

    @property
    def lambda_min_residual(self) -> float:
        """*An* eigenvalue lies within this distance of ``lambda_min``."""
        return self._lowest[1]

    @property
    def lambda_max_residual(self) -> float:
        """*An* eigenvalue lies within this distance of ``lambda_max``."""
        return self._highest[1]

    @property
    def ratio(self) -> float:
        """``|lambda_min / lambda_max|``, the paper's saddle measure; NaN where lambda_max is 0."""
        return abs(self.lambda_min / self.lambda_max) if self.lambda_max != 0 else math.nan

    def outer_bounds(self, confidence: float = 0.95) -> tuple[float, float]:
        """An interval that holds the whole spectrum with probability at least ``confidence``.

        From the probabilistic bound of Kuczynski and Wozniakowski (SIAM J. Matrix Anal. Appl. 13,
        1992, theorem 4.2) for a random start on the sphere, applied to both ends; infinite while
        the run is too short to say anything.
        """
        _check_confidence(confidence)
        order = int(self.order.min())
        last = self.beta[np.arange(self.probes), self.order - 1]
        # An exhausted Krylov space of a random start holds every eigenvalue.
        if order >= self.dimension or bool(np.any(last == 0)):
            return (
                self.lambda_min - self.lambda_min_residual,
                self.lambda_max + self.lambda_max_residual,
            )
        # Both ends must hold, and a failure needs every probe to fail.
        failure = ((1 - confidence) / 2) ** (1 / self.probes)
        relative = (
            max(0.0, math.log(1.648 * math.sqrt(self.dimension) / failure)) / (2 * order - 1)
        ) ** 2
        if relative >= 0.5:
            return -math.inf, math.inf
        slack = relative * (self.lambda_max - self.lambda_min) / (1 - 2 * relative)
        return (
            self.lambda_min - slack - self.lambda_min_residual,
            self.lambda_max + slack + self.lambda_max_residual,
        )

    def function(self, function: Callable[[Floats], Floats]) -> Estimate:
        """Trace of f(H) with its standard error.

        The variance of ``n u'Au`` for u uniform on the sphere is ``2 n^2 / (n+2) (m2 - m1^2)``,
        where m1 and m2 are the means of the eigenvalues of A and of their squares; both are taken
        from the quadrature, pooled over the probes, with the bias of m1^2 removed.

        Args:
            function: f, applied to an array of nodes.

        Raises:
            ValueError: f is not finite at a node.
        """
        first = np.empty(self.probes)
        second = np.empty(self.probes)
        for probe, (nodes, weights, _) in enumerate(self._quadrature):
            values = np.asarray(function(nodes), dtype=np.float64)
            if not np.all(np.isfinite(values)):
                worst = float(nodes[~np.isfinite(values)][0])
                raise ValueError(f"the function is not finite at the Ritz value {worst}")
            first[probe] = weights @ values
            second[probe] = weights @ values**2
        n = self.dimension
        spread = max(0.0, float(second.mean() - first.mean() ** 2))
        unbiased = spread / (1 - 2 / ((n + 2) * self.probes))
        stderr = math.sqrt(2 * n**2 / (n + 2) * unbiased / self.probes)
        return Estimate(n * float(first.mean()), stderr)

    @property
    def trace(self) -> float:
        """Trace of H, estimated."""
        return self._trace.value

    @property
    def trace_stderr(self) -> float:
        """Standard error of :attr:`trace`."""
        return self._trace.stderr

    @property
    def frobenius_norm_squared(self) -> float:
        """Squared Frobenius norm of H (trace of H^2), estimated."""
        return self._frobenius.value

    @property
    def frobenius_norm_squared_stderr(self) -> float:
        """Standard error of :attr:`frobenius_norm_squared`."""
        return self._frobenius.stderr

    @cached_property
    def _trace(self) -> Estimate:
        return self.function(lambda nodes: nodes)

    @cached_property
    def _frobenius(self) -> Estimate:
        return self.function(np.square)

    def log_determinant(self, shift: float = 0.0) -> Estimate:
        """Log-determinant of ``H + shift I`` with its standard error.

        Raises:
            ValueError: H + shift I is not positive definite.
        """
        if not self.lambda_min + shift > 0:
            raise ValueError(
                f"H + shift I is not positive definite: lambda_min is {self.lambda_min}, shift is "
                f"{shift}"
            )
        return self.function(lambda nodes: np.log(nodes + shift))

    @property
    def negative_mass(self) -> float:
        """Share of the eigenvalues below zero (beyond rounding), from raw nodes."""
        return self._negative.value

    @property
    def negative_mass_stderr(self) -> float:
        """Standard error of :attr:`negative_mass`."""
        return self._negative.stderr

    @cached_property
    def _negative(self) -> Estimate:
        rounding = max(
            self._rounding(self.alpha[probe, :order], self.beta[probe, :order])
            for probe, order in enumerate(self.order)
        )
        count = self.function(lambda nodes: (nodes < -rounding).astype(np.float64))
        return Estimate(count.value / self.dimension, count.stderr / self.dimension)

    def width(self, rule: str = "scale-free") -> float:
        """Standard deviation of the Gaussian that smooths the density, in units of the eigenvalues.

        Args:
            rule: ``"scale-free"``: 1/200 of the range of the nodes, so that scaling H scales the
                curve; ``"pyhessian"``: variance 1e-5 max(1, range) (PyHessian's default);
                ``"papyan"``: ``range / (steps - 1) / sqrt(8 ln 1.25)`` (Papyan, arXiv 1811.07062;
                Lin, Saad, Yang, SIAM Review 58, 2016).
        """
        extent = self.lambda_max - self.lambda_min
        if rule == "scale-free":
            return extent / 200 or max(abs(self.lambda_max) / 200, float(np.finfo(float).tiny))
        if rule == "pyhessian":
            return math.sqrt(1e-5 * max(1.0, extent))
        if rule == "papyan":
            steps = max(2, int(self.order.max()))
            return extent / (steps - 1) / math.sqrt(8 * math.log(1.25)) or self.width("scale-free")
        raise ValueError(f"width rule must be one of {WIDTH_RULES}, got {rule!r}")

    def grid(self, points: int = 1001, *, sigma: float | str = "scale-free") -> Floats:
        """``points`` equidistant eigenvalues that cover all nodes and 5 sigma on both sides."""
        width = self._sigma(sigma)
        return np.linspace(self.lambda_min - 5 * width, self.lambda_max + 5 * width, points)

    def density(self, grid: ArrayLike, sigma: float | str = "scale-free") -> Floats:
        """Density of the eigenvalues at ``grid``, smoothed by a Gaussian; integrates to 1.

        Args:
            grid: eigenvalues, any shape; :meth:`grid` gives a good one.
            sigma: standard deviation, or the name of a rule (:meth:`width`).
        """
        width = self._sigma(sigma)
        points = np.asarray(grid, dtype=np.float64)
        total = np.zeros(points.shape)
        for nodes, weights, _ in self._quadrature:
            scaled = (points[..., None] - nodes) / width
            total += np.exp(-0.5 * scaled**2) @ weights
        return total / (self.probes * width * math.sqrt(2 * math.pi))

    def histogram(self, edges: ArrayLike) -> Floats:
        """Share of the eigenvalues in each bin, from raw nodes: ``[len(edges) + 1]``.

        The outer two bins are open-ended, so that nothing is lost: the shares sum to 1.
        """
        cuts = np.asarray(edges, dtype=np.float64)
        total = np.zeros(len(cuts) + 1)
        for nodes, weights, _ in self._quadrature:
            np.add.at(total, np.searchsorted(cuts, nodes, side="right"), weights)
        return total / self.probes

    def _sigma(self, sigma: float | str) -> float:
        width = self.width(sigma) if isinstance(sigma, str) else float(sigma)
        if not width > 0 or not math.isfinite(width):
            raise ValueError(f"sigma must be positive and finite, got {sigma}")
        return width

    def plot(
        self, axes: Any = None, *, sigma: float | str = "scale-free", label: str | None = None
    ) -> Any:
        """Draw the density (symlog eigenvalues, log density) with matplotlib; returns the axes."""
        from fastsam.curvature.plots import plot_density

        return plot_density([self], axes=axes, sigma=sigma, labels=[label])

    def summary(self) -> dict[str, float | int | None]:
        """The headline numbers by name, for tables and JSON."""
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
            "negative_mass": self.negative_mass,
            "negative_mass_stderr": self.negative_mass_stderr,
            "dimension": self.dimension,
            "probes": self.probes,
            "loss": self.loss,
            "gradient_norm": self.gradient_norm,
            "weight_norm": self.weight_norm,
            "weight": self.weight,
        }

    def save(self, path: str | Path) -> None:
        """Write to ``path``, as JSON (with the summary beside the data) or ``.npz`` by its suffix.

        Raises:
            ValueError: another suffix.
        """
        path = Path(path)
        content = {item.name: getattr(self, item.name) for item in fields(self)}
        arrays = {name: value for name, value in content.items() if isinstance(value, np.ndarray)}
        scalars = {name: value for name, value in content.items() if name not in arrays}
        if path.suffix == ".json":
            lists = {name: value.tolist() for name, value in arrays.items()}
            document = {"fastsam_spectrum": 1, **scalars, **lists, "summary": self.summary()}
            write_text(path, to_json(document))
        elif path.suffix == ".npz":
            named: dict[str, Any] = {**arrays, "fastsam_spectrum": json.dumps(scalars)}
            write_atomically(path, lambda file: np.savez(file, allow_pickle=False, **named))
        else:
            raise ValueError(f"a spectrum is saved as .json or .npz, got {path.name!r}")

    @classmethod
    def load(cls, path: str | Path) -> Spectrum:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is not a spectrum.
        """
        path = Path(path)
        try:
            if path.suffix == ".json":
                content = from_json(path.read_text("utf-8"))
                if content.pop("fastsam_spectrum", None) != 1:
                    raise ValueError("no spectrum in it")
                content.pop("summary", None)
            else:
                with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                    content = json.loads(str(archive["fastsam_spectrum"]))
                    content |= {name: archive[name] for name in ("alpha", "beta", "order")}
            for name, dtype in (("alpha", np.float64), ("beta", np.float64), ("order", np.int64)):
                content[name] = np.asarray(content[name], dtype=dtype)
            return cls(**content)
        except (KeyError, TypeError, ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise ValueError(f"{path} is not a spectrum written by fastsam: {error}") from error

    def __repr__(self) -> str:
        return (
            f"Spectrum(lambda_min={self.lambda_min:.6g}, lambda_max={self.lambda_max:.6g}, "
            f"trace={self.trace:.6g} +- {self.trace_stderr:.2g}, dimension={self.dimension}, "
            f"probes={self.probes}, steps={int(self.order.max())})"
        )


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")


def normal_interval(estimate: Estimate, confidence: float = 0.95) -> tuple[float, float]:
    """The interval around an estimate that covers the truth with about the given probability."""
    _check_confidence(confidence)
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * estimate.stderr
    return estimate.value - half, estimate.value + half


def table(spectra: Mapping[Any, Spectrum]) -> list[dict[str, Any]]:
    """One row per spectrum, its name under ``name`` and its :meth:`Spectrum.summary`.

    Example:
        >>> from fastsam.curvature import MatrixOperator, operator_spectrum
        >>> import torch
        >>> rows = table({"one": operator_spectrum(MatrixOperator(torch.eye(4)), steps=4)})
        >>> rows[0]["name"], round(rows[0]["lambda_max"], 4)
        ('one', 1.0)
    """
    return [{"name": name, **spectrum.summary()} for name, spectrum in spectra.items()]


def merge(spectra: Sequence[Spectrum]) -> Spectrum:
    """Join runs of one operator that used different probes.

    Raises:
        ValueError: nothing to merge, different dimensions, or a probe that occurs twice.
    """
    if not spectra:
        raise ValueError("merge needs at least one spectrum")
    first = spectra[0]
    if len({spectrum.dimension for spectrum in spectra}) > 1:
        raise ValueError(
            f"the spectra have different dimensions: {[spectrum.dimension for spectrum in spectra]}"
        )
    used = [
        (run.get("seed"), index)
        for spectrum in spectra
        for run in spectrum.settings.get("merged", [spectrum.settings])
        for index in run.get("probe_indices", [])
    ]
    if len(set(used)) < len(used):
        raise ValueError("a probe occurs twice; run with another seed or other probe indices")
    steps = max(spectrum.alpha.shape[1] for spectrum in spectra)

    def padded(array: Floats) -> Floats:
        return np.pad(array, ((0, 0), (0, steps - array.shape[1])))

    return Spectrum(
        alpha=np.concatenate([padded(spectrum.alpha) for spectrum in spectra]),
        beta=np.concatenate([padded(spectrum.beta) for spectrum in spectra]),
        order=np.concatenate([spectrum.order for spectrum in spectra]),
        dimension=first.dimension,
        eps=max(spectrum.eps for spectrum in spectra),
        loss=first.loss,
        gradient_norm=first.gradient_norm,
        weight_norm=first.weight_norm,
        weight=first.weight,
        settings={
            "merged": [
                run
                for spectrum in spectra
                for run in spectrum.settings.get("merged", [spectrum.settings])
            ]
        },
    )


@dataclass(frozen=True)
class Comparison:
    """The second spectrum minus the first.

    Attributes:
        lambda_min: difference of the smallest Ritz values.
        lambda_max: difference of the largest Ritz values.
        trace: difference of the traces with its standard error, for independent probes.
        frobenius_norm_squared: likewise.
        negative_mass: likewise.
        wasserstein: Wasserstein-1 distance of the two eigenvalue distributions, in units of
            eigenvalues.
    """

    lambda_min: float
    lambda_max: float
    trace: Estimate
    frobenius_norm_squared: Estimate
    negative_mass: Estimate
    wasserstein: float

    @property
    def trace_z(self) -> float:
        """The trace's difference in standard errors."""
        return self.trace.value / self.trace.stderr if self.trace.stderr else math.inf


def compare(first: Spectrum, second: Spectrum) -> Comparison:
    """How the second spectrum differs from the first.

    The standard errors hold for independent probes; with a common seed they are upper bounds where
    the operators are similar.

    Example:
        >>> from fastsam.curvature import MatrixOperator, operator_spectrum
        >>> import torch
        >>> one = operator_spectrum(MatrixOperator(torch.eye(4)), steps=4)
        >>> two = operator_spectrum(MatrixOperator(2 * torch.eye(4)), steps=4, seed=1)
        >>> round(compare(one, two).wasserstein, 4)
        1.0
    """

    def difference(name: str) -> Estimate:
        errors = getattr(first, f"{name}_stderr"), getattr(second, f"{name}_stderr")
        return Estimate(getattr(second, name) - getattr(first, name), math.hypot(*errors))

    return Comparison(
        lambda_min=second.lambda_min - first.lambda_min,
        lambda_max=second.lambda_max - first.lambda_max,
        trace=difference("trace"),
        frobenius_norm_squared=difference("frobenius_norm_squared"),
        negative_mass=difference("negative_mass"),
        wasserstein=_wasserstein(first, second),
    )


def _wasserstein(first: Spectrum, second: Spectrum) -> float:
    """Area between the two cumulative distributions of the raw nodes."""
    places = np.unique(np.concatenate([*first.nodes, *second.nodes]))
    one, two = (np.cumsum(spectrum.histogram(places)) for spectrum in (first, second))
    gaps = np.abs(one - two)[1:-1]
    return float(gaps @ np.diff(places))
