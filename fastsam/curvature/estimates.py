"""Numbers with error bounds, which spectra and estimators return."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from fastsam.curvature.lanczos.quadrature import Floats
from fastsam.curvature.student import student_quantile


class Estimate(NamedTuple):
    """A number with its standard error.

    Attributes:
        value: the estimate.
        stderr: its standard error, including ``quadrature_error``.
        quadrature_error: estimated bound on the error of the quadrature.
        degrees: degrees of freedom of the standard error: the number of independent samples that it
            was computed from, less 1. Default infinity: as if it were known exactly.
    """

    value: float
    stderr: float
    quadrature_error: float = 0.0
    degrees: float = math.inf

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Return the interval that contains the true value with about ``confidence``.

        It is the t interval of the random part of the error, widened by the quadrature error.

        Raises:
            ValueError: ``confidence`` is not between 0 and 1.

        Example:
            >>> low, high = Estimate(value=1.0, stderr=0.5).interval()
            >>> round(low, 2), round(high, 2)
            (0.02, 1.98)
        """
        check_confidence(confidence)
        # Without the subtraction where the quadrature error is infinite.
        fixed = self.quadrature_error if math.isfinite(self.quadrature_error) else 0.0
        half = student_quantile(confidence, self.degrees) * (self.stderr - fixed) + fixed
        return self.value - half, self.value + half


@dataclass(frozen=True)
class MassBelow:
    """Fraction of the eigenvalues below a threshold.

    Attributes:
        threshold: the threshold, an eigenvalue.
        value: estimate: the middle of the quadrature's bounds, clipped to the limits.
        lower: lower confidence limit, which includes the errors of quadrature and probes.
        upper: upper confidence limit.
    """

    threshold: float
    value: float
    lower: float
    upper: float


@dataclass(frozen=True, eq=False)
class Histogram:
    """Fractions of the eigenvalues in bins; the two outer bins are open-ended.

    Attributes:
        edges: eigenvalues between the bins, ``[bins - 1]``.
        shares: estimated fractions, the middle of the quadrature's bounds, ``[bins]``. They sum to 1
            and may be outside their limits by less than one eigenvalue.
        lower: lower confidence limit of each fraction, ``[bins]``, which includes the errors of
            quadrature and probes.
        upper: upper confidence limit of each fraction, ``[bins]``.
    """

    edges: Floats
    shares: Floats
    lower: Floats
    upper: Floats


def check_confidence(confidence: float) -> None:
    """Raise ValueError for a confidence that is not between 0 and 1."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
