"""Figures of a report for print: PDF with letters as text, panels on shared axes."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastsam.curvature.plots import plain, plot_density, set_eigenvalue_scale
from fastsam.files import write_bytes
from fastsam.longtail.landscape import REDRAWN
from fastsam.longtail.measured import Measured
from fastsam.report import palette
from fastsam.report.canvas import legend_below, new_figure, pdf
from fastsam.report.charts import MATRIX_CLASSES
from fastsam.report.collect import Runs
from fastsam.report.figures import comparison_figure
from fastsam.report.groups import Group, by_settings, with_the_same_classes
from fastsam.report.marks import marks
from fastsam.report.pairs import panels_of
from fastsam.report.quantities import QUANTITIES
from fastsam.report.spectra import RunSpectrum, run_spectra
from fastsam.report.tables import accuracy_names, by_count, confusion


def write_figures(runs: Runs, folder: str | Path) -> list[Path]:
    """Write the figures of a report as PDF files into ``folder``, and return their paths.

    Raises:
        ImportError: matplotlib is not installed.
    """
    paths = []
    for name, figure in figures(runs):
        path = Path(folder, f"{name}.pdf")
        write_bytes(path, pdf(figure))
        paths.append(path)
    return paths


def figures(runs: Runs) -> Iterator[tuple[str, Any]]:
    """Yield each matplotlib figure of a report with its name."""
    groups = by_settings(runs.runs)
    panels = panels_of(runs, groups)
    if panels:
        yield "differences", comparison_figure(panels)
    yield "accuracy", _accuracy(groups)
    alike = with_the_same_classes(groups)
    for number, places in enumerate(alike, 1):
        yield f"classes{f'-{number}' if len(alike) > 1 else ''}", _classes(groups, places)
    small = [group for group in groups if len(group.first.class_names) <= MATRIX_CLASSES]
    if small:
        yield "confusion", _confusion(small)
    if any(result.test.bins for group in groups for result in group.results):
        yield "calibration", _calibration(groups)
    yield "training", _training(groups)
    spectra = [e for e in run_spectra(runs, groups) if e.item.subject.augment != REDRAWN]
    if spectra:
        yield "spectra", _spectra(spectra)


def _style(place: int) -> dict[str, Any]:
    look = palette.style(place)
    return {
        "color": palette.LIGHT[look.color],
        "linestyle": (0, look.dash) if look.dash else "solid",
        "marker": look.marker.matplotlib,
        "markersize": 4,
        "linewidth": 1.2,
    }


def _accuracy(groups: Sequence[Group]) -> Any:
    """Means over seeds with standard deviations, overall and by group of classes."""
    figure, axes = new_figure(1, 1, (7.0, 3.0))
    ax = axes[0, 0]
    names = accuracy_names(groups)
    for place, group in enumerate(groups):
        shift = 0.8 * ((place + 0.5) / len(groups) - 0.5)
        found = [
            Measured.of(result.test.group_accuracy(name) for result in group.results)
            for name in names
        ]
        ax.errorbar(
            [i + shift for i in range(len(names))],
            [each.mean for each in found],
            yerr=[each.deviation or 0.0 for each in found] if len(group.runs) > 1 else None,
            label=plain(group.name),
            capsize=2,
            **{**_style(place), "linestyle": "none"},
        )
    ax.set_xticks(range(len(names)), map(plain, names))
    ax.set_ylabel("test accuracy, %")
    legend_below(figure, ax)
    return figure


def _classes(groups: Sequence[Group], places: Sequence[int]) -> Any:
    """Accuracy of each class above its training images."""
    figure, axes = new_figure(2, 1, (7.0, 4.0), sharex=True, gridspec_kw={"height_ratios": (3, 1)})
    upper, lower = axes[:, 0]
    first = groups[places[0]].first
    order = by_count(first)
    for place in places:
        results = groups[place].results
        means = [Measured.of(r.test.per_class[label] for r in results).mean for label in order]
        upper.plot(range(len(order)), means, label=plain(groups[place].name), **_style(place))
    lower.bar(range(len(order)), [first.counts[label] for label in order], color="0.7")
    lower.set_yscale("log")
    upper.set_ylabel("test accuracy, %")
    lower.set_ylabel("images")
    if len(order) <= MATRIX_CLASSES:
        long = max(len(name) for name in first.class_names) > 3
        names = [plain(first.class_names[label]) for label in order]
        lower.set_xticks(range(len(order)), names, rotation=90 if long else 0, fontsize=8)
    else:
        lower.set_xlabel("class, by training images")
    legend_below(figure, upper)
    return figure


def _confusion(groups: Sequence[Group]) -> Any:
    """Draw a matrix for each group of runs, all on one scale."""
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    figure, axes = new_figure(rows, columns, (2.6 * columns + 0.6, 2.7 * rows))
    image = None
    for ax, group in zip(axes.flat, groups, strict=False):
        order, summed = by_count(group.first), confusion(group)
        matrix = np.array([[summed.get((i, j), 0) for j in order] for i in order], dtype=float)
        shares = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        image = ax.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        ax.set_title("\n".join(textwrap.wrap(plain(group.name), 34)), fontsize=7)
        names = [plain(group.first.class_names[label]) for label in order]
        ax.set_xticks(range(len(order)), names, rotation=90, fontsize=6)
        ax.set_yticks(range(len(order)), names, fontsize=6)
    for ax in list(axes.flat)[len(groups) :]:
        ax.remove()
    figure.supxlabel("taken for", fontsize=8)
    figure.supylabel("class", fontsize=8)
    figure.colorbar(image, ax=figure.axes, shrink=0.7, label="% of the class")
    return figure


def _calibration(groups: Sequence[Group]) -> Any:
    figure, axes = new_figure(1, 1, (4.5, 4.0))
    ax = axes[0, 0]
    ax.plot([0, 100], [0, 100], ":", color="0.6", linewidth=1)
    for place, group in enumerate(groups):
        label: str | None = plain(group.name)
        for result in group.results:
            if result.test.bins:
                points = [(each.confidence, each.accuracy) for each in result.test.bins]
                ax.plot(*zip(*points, strict=True), label=label, **_style(place))
                label = None
    ax.set_xlabel("confidence, %")
    ax.set_ylabel("accuracy, %")
    legend_below(figure, ax)
    return figure


def _training(groups: Sequence[Group]) -> Any:
    """One row for each quantity, on one axis of epochs."""
    shown = [
        each
        for each in QUANTITIES
        if any(each.value(e) is not None for g in groups for r in g.results for e in r.history)
    ]
    figure, axes = new_figure(len(shown), 1, (7.0, 1.6 * len(shown) + 0.4), sharex=True)
    for ax, quantity in zip(axes[:, 0], shown, strict=True):
        for place, group in enumerate(groups):
            label: str | None = plain(group.name)
            for result in group.results:
                history = [(e.epoch, quantity.value(e)) for e in result.history]
                points = [(epoch, np.nan if y is None else y) for epoch, y in history]
                style = {**_style(place), "markevery": max(1, len(points) // 8)}
                ax.plot(*zip(*points, strict=True), label=label, **style)
                label = None
        ax.set_yscale(quantity.scale)
        ax.set_ylabel(quantity.label, fontsize=8)
    for after in {mark.after: None for mark in marks(groups)}:
        kinds = ", ".join(mark.kind for mark in marks(groups) if mark.after == after)
        for ax in axes[:, 0]:
            ax.axvline(after + 0.5, color="0.5", linestyle=":", linewidth=0.8)
        axes[0, 0].annotate(
            kinds,
            (after + 0.5, 1),
            xycoords=("data", "axes fraction"),
            fontsize=7,
            color="0.35",
            ha="right",
            va="bottom",
        )
    axes[-1, 0].set_xlabel("epoch")
    legend_below(figure, axes[0, 0])
    return figure


def _spectra(spectra: Sequence[RunSpectrum]) -> Any:
    """Draw a panel for each class, all on the same axes, with a line for each run."""
    panels: dict[str, list[RunSpectrum]] = {}
    for each in spectra:
        panels.setdefault(each.about, []).append(each)
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    size = (3.6 * columns + 0.4, 2.6 * rows)
    figure, axes = new_figure(rows, columns, size, sharex=True, sharey=True)
    for ax, (title, items) in zip(axes.flat, panels.items(), strict=False):
        plot_density([each.item.spectrum for each in items], axes=ax)
        for line, each in zip(ax.get_lines(), items, strict=True):
            look = _style(each.place or 0)
            line.set(color=look["color"], linestyle=look["linestyle"], label=plain(each.name))
        ax.set_title("\n".join(textwrap.wrap(plain(title), 48)), fontsize=7)
        ax.label_outer()
    set_eigenvalue_scale(axes[0, 0], [each.item.spectrum for each in spectra])
    for ax in list(axes.flat)[len(panels) :]:
        ax.remove()
    legend_below(figure, *axes.flat)
    return figure
