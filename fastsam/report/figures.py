"""Figures of single commands: a comparison, curves, spectra."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

from fastsam.curvature.plots import plain, plot_density
from fastsam.longtail.landscape import REDRAWN, ClassSpectrum
from fastsam.report.canvas import legend_below, new_figure, png, svg
from fastsam.report.comparison import Judged, PairedComparison, PairedPanel
from fastsam.report.paired import SMALLEST_EFFECT


def comparison_png(comparison: PairedComparison) -> bytes:
    """Differences of every arm to the first, with intervals, as a PNG file."""
    return png(comparison_figure(comparison.panels))


_SHOWN = {"balanced": "balanced accuracy", "tail": "accuracy of tail classes"}
_MARKS: dict[Judged, dict[str, str]] = {
    "raw": {"color": "0.55", "mfc": "white", "label": "as trained"},
    "calibrated": {"color": "C0", "mfc": "C0", "label": "calibrated on validation images"},
}


def comparison_figure(panels: Sequence[PairedPanel]) -> Any:
    """Return a matplotlib figure of the differences of every arm to the first of its panel."""
    heights = [1.1 + 0.55 * (len(panel.arms) - 1) for panel in panels]
    figure, axes = new_figure(
        len(panels),
        len(_SHOWN),
        (9.0, 0.3 + sum(heights)),
        gridspec_kw={"height_ratios": heights},
    )
    for row, panel in zip(axes, panels, strict=True):
        for ax, score in zip(row, _SHOWN, strict=True):
            _draw_differences(ax, panel, score)
        title = f"{panel.title}: difference from {panel.arms[0].name}, points"
        row[0].set_title(plain(title), loc="left", fontsize=9)
        row[1].tick_params(labelleft=False)
    legend_below(figure, axes[0, 0])
    return figure


def _draw_differences(ax: Any, panel: PairedPanel, score: str) -> None:
    """Draw the difference of each arm to the first: seeds as dots, the mean with its 95 % interval.

    A difference that is not known is a word in place of the mean.
    """
    first, *others = panel.arms
    ax.axvspan(-SMALLEST_EFFECT, SMALLEST_EFFECT, color="0.93")
    ax.axvline(0, color="0.6", linewidth=0.8)
    for place, arm in enumerate(others):
        for judged in panel.judged:
            style = _MARKS[judged]
            shift = 0.0 if len(panel.judged) == 1 else {"raw": -0.16, "calibrated": 0.16}[judged]
            found = panel.difference(arm.name, first.name, judged, score)
            gaps = panel.gaps(arm.name, first.name, judged, score)
            height = place + shift
            ax.plot(gaps, [height] * len(gaps), ".", color=style["color"], alpha=0.35, markersize=4)
            error = found.half_width if math.isfinite(found.half_width) else 0.0
            label = style["label"] if place == 0 else None
            ax.errorbar(
                found.mean, height, xerr=error, fmt="o", capsize=3, **{**style, "label": label}
            )
            if not found.known:
                side = {"transform": ax.get_yaxis_transform(), "va": "center"}
                ax.text(0.02, height, found.verdict(), fontsize=7, color="0.35", **side)
    names = [_with_cost(panel, arm.name) for arm in others]
    ax.set_yticks(range(len(others)), names, fontsize=8)
    ax.set_ylim(len(others) - 0.5, -0.5)
    ax.set_xlabel(_SHOWN[score], fontsize=8)
    ax.tick_params(axis="x", labelsize=8)


def _with_cost(panel: PairedPanel, name: str) -> str:
    cost, label = panel.cost(name), fill(plain(name), 26)
    return label if math.isnan(cost) else f"{label}\n{cost:.2g}x the gradients"


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]], *, x: str, y: str, title: str
) -> str:
    """One line with marks for each name of ``series``, points ``(x, y)``."""
    figure, axes = new_figure(1, 1, (7.0, 3.6))
    ax = axes[0, 0]
    for name, points in series.items():
        ax.plot(*zip(*points, strict=True), marker="o", markersize=3, label=plain(name))
    ax.set_xlabel(plain(x))
    ax.set_ylabel(plain(y))
    ax.set_title(plain(title), fontsize=9)
    legend_below(figure, ax)
    return svg(figure)


def spectra_panels(spectra: Sequence[ClassSpectrum]) -> str:
    """One density per panel, eigenvalues on an asinh axis and densities on a log axis."""
    columns = min(2, len(spectra))
    rows = -(-len(spectra) // columns)
    figure, axes = new_figure(rows, columns, (5.0 * columns, 3.2 * rows))
    panels = list(axes.flat)
    for ax, item in zip(panels, spectra, strict=False):
        plot_density([item.spectrum], axes=ax)
        wrong = item.subject.augment == REDRAWN
        ax.set_title(
            ("MISTAKE: " if wrong else "") + plain(item.subject.title).replace(", loss", ",\nloss"),
            fontsize=7.5,
            color="firebrick" if wrong else "black",
        )
        low, high = item.spectrum.lambda_min, item.spectrum.lambda_max
        ratio = item.spectrum.ratio
        for value in (low, high):
            ax.axvline(value, linewidth=0.6, linestyle=":", color="grey")
        ax.annotate(
            f"{low:.3g} ... {high:.3g}" + ("" if math.isnan(ratio) else f"\n|min/max| {ratio:.3g}"),
            (0.98, 0.95),
            xycoords="axes fraction",
            ha="right",
            va="top",
            fontsize=8,
        )
    for ax in panels[len(spectra) :]:
        ax.remove()
    return svg(figure)
