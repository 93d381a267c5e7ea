"""The figures of a report, each as SVG text."""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fastsam.curvature.plots import plain, plot_density
from fastsam.extras import requires_extra
from fastsam.longtail.landscape import REDRAWN, ClassSpectrum
from fastsam.longtail.results import Result
from fastsam.report.comparison import Judged, PairedComparison, PairedPanel
from fastsam.report.paired import SMALLEST_EFFECT
from fastsam.report.tables import by_settings

_INCHES_PER_LETTER, _INCHES_PER_MARK, _INCHES_PER_LINE = 0.075, 0.5, 0.19
"""Sizes in a legend of 8 points."""


def _figure(rows: int, columns: int, size: tuple[float, float], **grid: object) -> tuple[Any, Any]:
    # The object interface needs no global backend and leaves the caller's figures alone.
    with requires_extra("plots", "a figure"):
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, gridspec_kw=grid)


def _svg(figure: Any) -> str:
    with requires_extra("plots", "a figure"):
        import matplotlib
    text = io.StringIO()
    # Without metadata and with a fixed salt, the same numbers give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "fastsam"}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=nothing)
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _legend_below(figure: Any, ax: Any) -> None:
    """A legend of any length below all axes; the figure grows by it, so that they keep their size."""
    handles, labels = ax.get_legend_handles_labels()
    width, height = figure.get_size_inches()
    columns = max(int(width / (_INCHES_PER_LETTER * max(map(len, labels)) + _INCHES_PER_MARK)), 1)
    columns = min(columns, len(labels))
    figure.set_size_inches(width, height + _INCHES_PER_LINE * -(-len(labels) // columns))
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False
    )


def accuracy_bars(results: Sequence[Result]) -> str:
    """Test accuracy overall and by group: one bar per run, or per mean of runs that differ in seeds."""
    figure, axes = _figure(1, 1, (7.0, 3.2))
    ax = axes[0, 0]
    names = ["all", *results[0].test.groups]
    together = by_settings(results)
    width = 0.8 / len(together)
    for position, (label, members) in enumerate(together.items()):
        columns = [
            [r.test.accuracy, *(r.test.groups.get(name, float("nan")) for name in names[1:])]
            for r in members
        ]
        values = list(zip(*columns, strict=True))
        heights = [statistics.mean(value) for value in values]
        spread = [statistics.stdev(value) for value in values] if len(members) > 1 else None
        places = [i - 0.4 + width * (position + 0.5) for i in range(len(names))]
        bars = ax.bar(places, heights, width, yerr=spread, label=plain(label))
        ax.bar_label(bars, fmt="%.1f", fontsize=7)
    ax.set_xticks(range(len(names)), map(plain, names))
    ax.set_ylim(0, 109)
    ax.margins(x=0.02)
    ax.set_ylabel("test accuracy, %")
    _legend_below(figure, ax)
    return _svg(figure)


def comparison_svg(comparison: PairedComparison) -> str:
    """Differences of every arm to the first, with intervals, as SVG text."""
    return _svg(_comparison_figure(comparison))


def comparison_png(comparison: PairedComparison) -> bytes:
    """Return the picture of :func:`comparison_svg` as PNG."""
    picture = io.BytesIO()
    _comparison_figure(comparison).savefig(picture, format="png", dpi=120)
    return picture.getvalue()


_SHOWN = {"balanced": "balanced accuracy", "tail": "accuracy of tail classes"}
_MARKS: dict[Judged, dict[str, str]] = {
    "raw": {"color": "0.55", "mfc": "white", "label": "as trained"},
    "calibrated": {"color": "C0", "mfc": "C0", "label": "calibrated on validation images"},
}


def _comparison_figure(comparison: PairedComparison) -> Any:
    panels = comparison.panels
    heights = [1.1 + 0.55 * (len(panel.arms) - 1) for panel in panels]
    figure, axes = _figure(
        len(panels), len(_SHOWN), (9.0, 0.3 + sum(heights)), height_ratios=heights
    )
    for row, panel in zip(axes, panels, strict=True):
        for ax, score in zip(row, _SHOWN, strict=True):
            _draw_differences(ax, panel, score)
        title = f"{panel.title}: minus {panel.arms[0].name}, points"
        row[0].set_title(plain(title), loc="left", fontsize=9)
        row[1].tick_params(labelleft=False)
    _legend_below(figure, axes[0, 0])
    return figure


def _draw_differences(ax: Any, panel: PairedPanel, score: str) -> None:
    """Draw the difference of each arm to the first: seeds as dots, the mean with its 95 % interval."""
    first, *others = panel.arms
    ax.axvspan(-SMALLEST_EFFECT, SMALLEST_EFFECT, color="0.93")
    ax.axvline(0, color="0.6", linewidth=0.8)
    for place, arm in enumerate(others):
        for shift, (judged, style) in zip((-0.16, 0.16), _MARKS.items(), strict=True):
            found = panel.difference(arm.name, first.name, judged, score)
            pairs = zip(arm.scores(judged, score), first.scores(judged, score), strict=True)
            gaps = [left - right for left, right in pairs]
            height = place + shift
            ax.plot(gaps, [height] * len(gaps), ".", color=style["color"], alpha=0.35, markersize=4)
            error = found.half_width if found.n > 1 else 0.0
            label = style["label"] if place == 0 else None
            ax.errorbar(
                found.mean, height, xerr=error, fmt="o", capsize=3, **{**style, "label": label}
            )
    names = [f"{plain(arm.name)}\n{panel.cost(arm.name):.2g}x the gradients" for arm in others]
    ax.set_yticks(range(len(others)), names, fontsize=8)
    ax.set_ylim(len(others) - 0.5, -0.5)
    ax.set_xlabel(_SHOWN[score], fontsize=8)
    ax.tick_params(axis="x", labelsize=8)


def training_curves(results: Sequence[Result]) -> str:
    """Training loss and validation accuracy by epoch; runs that differ in seeds share a color."""
    figure, axes = _figure(1, 2, (9.0, 3.0))
    loss, accuracy = axes[0]
    for place, (label, members) in enumerate(by_settings(results).items()):
        for result in members:
            style = {"color": f"C{place}", "label": plain(label) if result is members[0] else None}
            loss.plot(
                *zip(*((record.epoch, record.loss) for record in result.history), strict=True),
                **style,
            )
            judged = [
                (record.epoch, record.validation_accuracy)
                for record in result.history
                if record.validation_accuracy is not None
            ]
            if judged:
                accuracy.plot(*zip(*judged, strict=True), **style)
    loss.set_yscale("log")
    loss.set_ylabel("training loss")
    accuracy.set_ylabel("validation accuracy, %")
    for ax in (loss, accuracy):
        ax.set_xlabel("epoch")
    _legend_below(figure, loss)
    return _svg(figure)


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]], *, x: str, y: str, title: str
) -> str:
    """One line with marks for each name of ``series``, points ``(x, y)``."""
    figure, axes = _figure(1, 1, (7.0, 3.6))
    ax = axes[0, 0]
    for name, points in series.items():
        ax.plot(*zip(*points, strict=True), marker="o", markersize=3, label=plain(name))
    ax.set_xlabel(plain(x))
    ax.set_ylabel(plain(y))
    ax.set_title(plain(title), fontsize=9)
    _legend_below(figure, ax)
    return _svg(figure)


def spectra_panels(spectra: Sequence[ClassSpectrum]) -> str:
    """One density per panel, eigenvalues on a symlog and densities on a log axis."""
    columns = min(2, len(spectra))
    rows = -(-len(spectra) // columns)
    figure, axes = _figure(rows, columns, (5.0 * columns, 3.2 * rows))
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
        for value in (low, high):
            ax.axvline(value, linewidth=0.6, linestyle=":", color="grey")
        ax.annotate(
            f"{low:.3g} ... {high:.3g}\n|min/max| {item.spectrum.ratio:.3g}",
            (0.98, 0.95),
            xycoords="axes fraction",
            ha="right",
            va="top",
            fontsize=8,
        )
    for ax in panels[len(spectra) :]:
        ax.remove()
    return _svg(figure)
