"""Figures of spectra; matplotlib is needed only here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from fastsam.curvature.spectrum import Spectrum

FLOOR = 1e-7
"""Densities below this are drawn at it, as in the paper's figures."""


def plot_density(
    spectra: Sequence[Spectrum],
    *,
    axes: Any = None,
    sigma: float | str = "scale-free",
    labels: Sequence[str | None] | None = None,
) -> Any:
    """Draw densities into one axes: symlog eigenvalues, log density. Returns the axes.

    Args:
        spectra: what to draw.
        axes: matplotlib axes; None makes a new figure.
        sigma: see :meth:`Spectrum.density`.
        labels: one per spectrum, for the legend.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib") from error
    if axes is None:
        axes = pyplot.subplots()[1]
    widest = max(max(abs(s.lambda_min), abs(s.lambda_max)) for s in spectra) or 1.0
    for spectrum, label in zip(spectra, labels or [None] * len(spectra), strict=True):
        grid = _symlog_grid(spectrum, sigma)
        density = np.maximum(spectrum.density(grid, sigma), FLOOR)
        axes.plot(grid, density, label=label, linewidth=1)
    axes.set_xscale("symlog", linthresh=widest / 100)
    axes.set_yscale("log")
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel("density")
    if any(labels or []):
        axes.legend()
    return axes


def _symlog_grid(spectrum: Spectrum, sigma: float | str) -> Any:
    """An even grid with every node's neighbourhood added: no peak falls between points."""
    even = spectrum.grid(2001, sigma=sigma)
    width = spectrum.width(sigma) if isinstance(sigma, str) else sigma
    nodes = np.concatenate(spectrum.nodes)
    around = nodes[:, None] + width * np.linspace(-3, 3, 13)
    return np.unique(np.concatenate([even, around.ravel()]))
