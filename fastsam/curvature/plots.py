"""Figures of spectra and of curvature during training, with matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from fastsam.curvature.lanczos.quadrature import Floats
from fastsam.curvature.points import CurvaturePoint
from fastsam.extras import requires_extra

FLOOR = 1e-7
"""Lower limit of the drawn density, as in the paper's figures."""


class Drawable(Protocol):
    """What a figure needs of a spectrum; :class:`fastsam.curvature.Spectrum` has it."""

    @property
    def nodes(self) -> list[Floats]:
        """Ritz values of each probe in ascending order."""

    @property
    def weights(self) -> list[Floats]:
        """Share of the eigenvalues at each Ritz value; they sum to 1 for each probe."""

    @property
    def lambda_min(self) -> float:
        """Smallest Ritz value."""

    @property
    def lambda_max(self) -> float:
        """Largest Ritz value."""

    @property
    def ratio(self) -> float:
        """``|lambda_min / lambda_max|``."""

    def width(self, rule: str = ...) -> float:
        """Return the standard deviation of the smoothing Gaussian."""

    def grid(self, points: int = ..., *, sigma: float | str = ...) -> Floats:
        """Return equidistant eigenvalues that cover all nodes."""

    def density(self, grid: ArrayLike, sigma: float | str = ...) -> Floats:
        """Return the smoothed density at ``grid``."""


def plain(text: str) -> str:
    """Escape the dollar signs in ``text``, so that matplotlib does not parse it as mathematics."""
    return text.replace("$", r"\$")


def plot_density(
    spectra: Sequence[Drawable],
    *,
    axes: Any = None,
    sigma: float | str = "scale-free",
    labels: Sequence[str | None] | None = None,
    stems: bool = False,
) -> Any:
    """Draw densities into one axes, with asinh eigenvalues and log density, and return the axes.

    Args:
        spectra: the spectra to draw.
        axes: matplotlib axes. Default None: a new figure.
        sigma: see :meth:`fastsam.curvature.Spectrum.density`.
        labels: a legend label per spectrum, or None; escaped by :func:`plain`.
        stems: whether to draw a line at each Ritz value, too, as high as its own part of the density.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if axes is None:
        axes = import_pyplot().subplots()[1]
    for spectrum, label in zip(spectra, labels or [None] * len(spectra), strict=True):
        grid = _fine_grid(spectrum, sigma)
        density = np.maximum(spectrum.density(grid, sigma), FLOOR)
        name = None if label is None else plain(label)
        (line,) = axes.plot(grid, density, label=name, linewidth=1)
        if stems:
            _draw_stems(axes, spectrum, sigma, color=line.get_color())
    set_eigenvalue_scale(axes, spectra)
    axes.set_yscale("log")
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel("density")
    if any(labels or []):
        axes.legend()
    return axes


def plot_spectra(
    spectra: Mapping[Any, Drawable],
    *,
    sigma: float | str = "scale-free",
    columns: int = 4,
    stems: bool = False,
) -> Any:
    """Draw one panel per spectrum with shared axes, as in the paper's Figures 2 and 5 to 7.

    Args:
        spectra: the spectra by name, such as the result of :func:`fastsam.class_spectra`. Names are
            escaped by :func:`plain`; a whole number is that of a class.
        sigma: see :meth:`fastsam.curvature.Spectrum.density`.
        columns: number of panels per row. Default 4.
        stems: as in :func:`plot_density`.

    Returns:
        The matplotlib figure. ``figure.savefig("spectra.pdf")`` writes it for print.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: ``spectra`` is empty.
    """
    if not spectra:
        raise ValueError("plot_spectra requires at least one spectrum, got none")
    pyplot = import_pyplot()
    columns = min(columns, len(spectra))
    rows = -(-len(spectra) // columns)
    figure, panels = pyplot.subplots(
        rows, columns, figsize=(3 * columns, 2.4 * rows), sharex=True, sharey=True, squeeze=False
    )
    flat = panels.ravel()
    for panel, (name, spectrum) in zip(flat, spectra.items(), strict=False):
        title = f"class {name}" if isinstance(name, int | np.integer) else str(name)
        plot_density([spectrum], axes=panel, sigma=sigma, stems=stems)
        set_eigenvalue_scale(panel, list(spectra.values()))
        panel.set_xticks(_ends_and_zero(panel, list(spectra.values())))
        panel.set_title(
            f"{plain(title)}\n$\\lambda$ {spectrum.lambda_min:.3g} to {spectrum.lambda_max:.3g}, "
            f"ratio {spectrum.ratio:.2g}",
            fontsize="small",
        )
        panel.label_outer()
    for panel in flat[len(spectra) :]:
        panel.remove()
    figure.tight_layout()
    return figure


def plot_tracking(
    points: Sequence[CurvaturePoint], *, marks: Mapping[str, float] | None = None
) -> Any:
    """Draw the extreme curvature by training step: lambda_max with 2/lr above, lambda_min below.

    Gradient descent is stable on a quadratic while lambda_max is below 2/lr.

    Args:
        points: measurements of a :class:`fastsam.curvature.CurvatureTracker`.
        marks: steps at which something begins, such as ``{"deferral": 1600, "ascents": 2000}``, by
            what it is. Names are escaped by :func:`plain`.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: ``points`` is empty.
    """
    if not points:
        raise ValueError("plot_tracking requires at least one point, got none")
    figure, (upper, lower) = import_pyplot().subplots(
        2, 1, sharex=True, figsize=(7, 5), squeeze=True
    )
    for number, group in enumerate(dict.fromkeys(point.group for point in points)):
        own = [point for point in points if point.group == group]
        steps, look = [point.step for point in own], {"color": f"C{number}", "marker": "."}
        upper.plot(steps, [point.lambda_max for point in own], label=plain(group), **look)
        lower.plot(steps, [point.lambda_min for point in own], **look)
    limits = {point.step: 2 / point.lr for point in points if point.lr}
    if limits:
        upper.plot(*zip(*sorted(limits.items()), strict=True), "k--", linewidth=1, label="2/lr")
    for name, step in (marks or {}).items():
        for axes in (upper, lower):
            axes.axvline(step, color="0.4", linestyle=":", linewidth=1)
        upper.annotate(
            plain(name),
            (step, 1),
            xycoords=("data", "axes fraction"),
            rotation=90,
            ha="right",
            va="top",
            fontsize="small",
        )
    upper.set_yscale("log")
    upper.set_ylabel(r"$\lambda_{\max}$")
    lower.set_ylabel(r"$\lambda_{\min}$")
    lower.set_xlabel("training step")
    upper.legend()
    figure.tight_layout()
    return figure


def import_pyplot(purpose: str = "a plot of spectra") -> Any:
    """Import matplotlib's pyplot; the error for a missing package names ``purpose``."""
    with requires_extra("plots", purpose):
        from matplotlib import pyplot
    return pyplot


def set_eigenvalue_scale(axes: Any, spectra: Sequence[Drawable]) -> None:
    """Set a scale of eigenvalues that is linear around 0 and logarithmic further out.

    It is that of asinh, which has no kink between the two parts, unlike matplotlib's symlog: a peak there
    keeps its form. The linear part ends at a power of ten, about a hundredth of the widest spectrum, so that
    0 has room between two ticks.

    Args:
        axes: matplotlib axes.
        spectra: spectra that the axis must show.
    """
    with requires_extra("plots", "a plot of spectra"):
        from matplotlib.ticker import NullLocator, SymmetricalLogLocator

    widest = max(max(abs(s.lambda_min), abs(s.lambda_max)) for s in spectra) or 1.0
    linear = 10.0 ** np.floor(np.log10(widest / 50))
    axes.set_xscale("asinh", linear_width=linear)
    axes.xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=linear))
    axes.xaxis.set_minor_locator(NullLocator())


def _ends_and_zero(axes: Any, spectra: Sequence[Drawable]) -> list[float]:
    """Return 0 and the last power of ten before each end, if it is outside the linear part.

    More ticks would overlap in a small panel.
    """
    ends = (min(s.lambda_min for s in spectra), max(s.lambda_max for s in spectra))
    powers = [np.sign(end) * 10.0 ** np.floor(np.log10(abs(end))) for end in ends if end]
    linear = axes.xaxis.get_transform().linear_width
    return sorted({0.0, *(float(power) for power in powers if abs(power) >= linear)})


def _draw_stems(axes: Any, spectrum: Drawable, sigma: float | str, *, color: str) -> None:
    """Draw a line at each Ritz value, up to the peak of its own Gaussian in the density."""
    width = spectrum.width(sigma) if isinstance(sigma, str) else sigma
    nodes = np.concatenate(spectrum.nodes)
    peaks = np.concatenate(spectrum.weights) / (len(spectrum.nodes) * width * np.sqrt(2 * np.pi))
    seen = peaks > FLOOR
    axes.vlines(nodes[seen], FLOOR, peaks[seen], color=color, linewidth=0.5, alpha=0.6)


def _fine_grid(spectrum: Drawable, sigma: float | str) -> Any:
    """Return an even grid with extra points around every node, so that no peak is missed."""
    even = spectrum.grid(2001, sigma=sigma)
    width = spectrum.width(sigma) if isinstance(sigma, str) else sigma
    nodes = np.concatenate(spectrum.nodes)
    around = nodes[:, None] + width * np.linspace(-3, 3, 13)
    return np.unique(np.concatenate([even, around.ravel()]))
