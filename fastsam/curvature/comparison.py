"""Tables, merges and differences of spectra."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from fastsam.curvature.estimates import Estimate, MassBelow
from fastsam.curvature.lanczos.quadrature import Floats
from fastsam.curvature.spectrum import Spectrum
from fastsam.extras import requires_extra


def table(spectra: Mapping[Any, Spectrum]) -> list[dict[str, Any]]:
    """Return a row per spectrum: its key as ``name`` and the entries of :meth:`Spectrum.summary`.

    Example:
        >>> from fastsam.curvature import MatrixOperator, operator_spectrum
        >>> import torch
        >>> rows = table({"one": operator_spectrum(MatrixOperator(torch.eye(4)), steps=4)})
        >>> rows[0]["name"], round(rows[0]["lambda_max"], 4)
        ('one', 1.0)
    """
    return [{"name": name, **spectrum.summary()} for name, spectrum in spectra.items()]


def merge(spectra: Sequence[Spectrum]) -> Spectrum:
    """Merge runs of one operator with different probes into one spectrum.

    Raises:
        ValueError: ``spectra`` is empty, dimensions differ, or a probe occurs twice.

    Example:
        >>> from fastsam.curvature import MatrixOperator, operator_spectrum
        >>> import torch
        >>> operator = MatrixOperator(torch.diag(torch.arange(1.0, 5.0)))
        >>> runs = [operator_spectrum(operator, steps=4, seed=seed) for seed in (0, 1)]
        >>> merge(runs).alpha.shape
        (2, 4)
    """
    if not spectra:
        raise ValueError("merge requires at least one spectrum, got none")
    first = spectra[0]
    if len({spectrum.dimension for spectrum in spectra}) > 1:
        raise ValueError(
            "merge requires spectra of one operator, got the dimensions "
            f"{[spectrum.dimension for spectrum in spectra]}"
        )
    used = [
        (run.get("seed"), index)
        for spectrum in spectra
        for run in spectrum.settings.get("merged", [spectrum.settings])
        for index in run.get("probe_indices", [])
    ]
    if len(set(used)) < len(used):
        raise ValueError(
            "a probe occurs twice in the spectra to merge; run them with different seeds or "
            "probe_indices"
        )
    steps = max(spectrum.alpha.shape[1] for spectrum in spectra)

    def padded(array: Floats) -> Floats:
        return np.pad(array, ((0, 0), (0, steps - array.shape[1])))

    return Spectrum(
        alpha=np.concatenate([padded(spectrum.alpha) for spectrum in spectra]),
        beta=np.concatenate([padded(spectrum.beta) for spectrum in spectra]),
        order=np.concatenate([spectrum.order for spectrum in spectra]),
        dimension=first.dimension,
        eps=max(spectrum.eps for spectrum in spectra),
        asymmetry=max(spectrum.asymmetry for spectrum in spectra),
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
    """Differences of two spectra, the second minus the first.

    Attributes:
        lambda_min: difference of the smallest Ritz values.
        lambda_max: difference of the largest Ritz values.
        trace: difference of the traces, with its standard error for independent probes.
        frobenius_norm_squared: difference of the squared Frobenius norms, with its standard error.
        mass_below: difference of the fractions of eigenvalues below the lower of the two default
            thresholds, with limits of 95 % confidence.
        first: the first spectrum.
        second: the second spectrum.
    """

    lambda_min: float
    lambda_max: float
    trace: Estimate
    frobenius_norm_squared: Estimate
    mass_below: MassBelow
    first: Spectrum = field(repr=False, compare=False)
    second: Spectrum = field(repr=False, compare=False)

    @cached_property
    def wasserstein(self) -> float:
        """Wasserstein-1 distance of the weighted Ritz values, in units of the eigenvalues.

        Raises:
            ImportError: SciPy is not installed.
        """
        with requires_extra("longtail", "the Wasserstein distance of spectra"):
            from scipy.stats import wasserstein_distance
        places, weights = (
            [np.concatenate(getattr(spectrum, name)) for spectrum in (self.first, self.second)]
            for name in ("nodes", "weights")
        )
        return float(wasserstein_distance(*places, *weights))

    @property
    def trace_z(self) -> float:
        """Difference of the traces divided by its standard error; 0 if the traces are equal."""
        difference, stderr = self.trace.value, self.trace.stderr
        if stderr == 0:
            return math.copysign(math.inf, difference) if difference else 0.0
        return difference / stderr


def compare(first: Spectrum, second: Spectrum) -> Comparison:
    """Return the differences of two spectra, the second minus the first.

    The standard errors assume independent probes. With a common seed and similar operators, they are
    upper bounds.

    Example:
        >>> from fastsam.curvature import MatrixOperator, operator_spectrum
        >>> import torch
        >>> one = operator_spectrum(MatrixOperator(torch.eye(4)), steps=4)
        >>> two = operator_spectrum(MatrixOperator(2 * torch.eye(4)), steps=4, seed=1)
        >>> round(compare(one, two).wasserstein, 4)
        1.0
    """
    return Comparison(
        lambda_min=second.lambda_min - first.lambda_min,
        lambda_max=second.lambda_max - first.lambda_max,
        trace=_difference(first.trace_estimate, second.trace_estimate),
        frobenius_norm_squared=_difference(
            first.frobenius_norm_squared_estimate, second.frobenius_norm_squared_estimate
        ),
        mass_below=_mass_difference(first, second),
        first=first,
        second=second,
    )


def _difference(first: Estimate, second: Estimate) -> Estimate:
    """Return the difference of two independent estimates, the second minus the first.

    The degrees of freedom are those of Welch (Biometrika 34, 1947).
    """
    variance = first.stderr**2 + second.stderr**2
    share = sum(each.stderr**4 / each.degrees for each in (first, second))
    degrees = max(1.0, float(math.floor(variance**2 / share))) if 0 < share < math.inf else math.inf
    return Estimate(second.value - first.value, math.sqrt(variance), degrees=degrees)


def _mass_difference(first: Spectrum, second: Spectrum) -> MassBelow:
    threshold = min(first.default_threshold, second.default_threshold)
    # 97.5 % confidence for each, so that both hold together with 95 % (Bonferroni).
    one, two = (spectrum.mass_below(threshold, confidence=0.975) for spectrum in (first, second))
    return MassBelow(
        threshold=threshold,
        value=two.value - one.value,
        lower=two.lower - one.upper,
        upper=two.upper - one.lower,
    )
