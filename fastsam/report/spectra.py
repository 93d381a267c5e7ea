"""Densities of eigenvalues for the page: a figure for each subject, all on the same axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsam.curvature import Spectrum
from fastsam.curvature.plots import FLOOR
from fastsam.longtail.landscape import ClassSpectrum
from fastsam.report.charts import Chart, hover_text, trace
from fastsam.report.collect import Runs, class_order
from fastsam.report.groups import Group, places_of

POINTS = 400
"""Points of an even grid, besides those around the nodes."""
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RunSpectrum:
    """A spectrum and the run that it belongs to.

    Attributes:
        place: place of the group of runs; None for a spectrum of no run.
        name: name of the run.
        item: the spectrum and what it is of.
    """

    place: int | None
    name: str
    item: ClassSpectrum

    @property
    def about(self) -> str:
        """The class and how the spectrum was computed: spectra of other runs are compared with it."""
        subject = self.item.subject
        return subject.title.removeprefix(f"{subject.run}, epoch {subject.epoch}, ")


def run_spectra(runs: Runs, groups: Sequence[Group]) -> list[RunSpectrum]:
    """Return every spectrum with its run: by class, that of all classes first."""
    place_of = places_of(groups)
    found = [
        RunSpectrum(place_of.get(id(run)), " ".join([run.name, *_in(run.folder)]), item)
        for run in runs.runs
        for item in run.spectra
    ] + [RunSpectrum(None, item.subject.run, item) for item in runs.strays]
    return sorted(found, key=lambda each: class_order(each.item))


def _in(folder: str) -> list[str]:
    return [f"({folder})"] if folder else []


@dataclass(frozen=True)
class Symlog:
    """An axis that is linear around 0 and logarithmic further out.

    Attributes:
        linear: where it changes.
    """

    linear: float

    @classmethod
    def of(cls, spectra: Sequence[Spectrum]) -> Symlog:
        """Return an axis that shows all of ``spectra``, the middle two decades below the widest linear."""
        widest = max(max(abs(s.lambda_min), abs(s.lambda_max)) for s in spectra) or 1.0
        return cls(10.0 ** math.floor(math.log10(widest / 50)))

    def __call__(self, values: Floats) -> Floats:
        """Return where eigenvalues lie on the axis."""
        return np.arcsinh(values / self.linear)

    def inverse(self, places: Floats) -> Floats:
        """Return the eigenvalues that lie at ``places``."""
        return self.linear * np.sinh(places)

    def ticks(self, low: float, high: float) -> dict[str, Any]:
        """Return powers of ten between two eigenvalues as ticks."""
        largest = max(abs(low), abs(high), self.linear)
        decades = range(round(math.log10(self.linear)), math.ceil(math.log10(largest)) + 1)
        powers = [10.0**decade for decade in decades]
        values = [v for v in (*(-p for p in powers[::-1]), 0.0, *powers) if low <= v <= high]
        return {
            "tickvals": self(np.array(values)).tolist(),
            "ticktext": [f"{value:g}" for value in values],
        }


def spectra_charts(spectra: Sequence[RunSpectrum]) -> list[Chart]:
    """Return a figure for each class, split, loss and augmentation, with a density for each run."""
    axis = Symlog.of([each.item.spectrum for each in spectra])
    grids = [_grid(each.item.spectrum, axis) for each in spectra]
    low, high = min(grid[0] for grid in grids), max(grid[-1] for grid in grids)
    charts: dict[str, Chart] = {}
    top = FLOOR
    for each, grid in zip(spectra, grids, strict=True):
        chart = charts.setdefault(each.about, Chart(each.about, [], {}, 320))
        density = np.maximum(each.item.spectrum.density(grid), FLOOR)
        top = max(top, float(density.max()))
        chart.data.extend(_traces(each, axis, grid, density))
    for chart in charts.values():
        places = axis(np.array([low, high]))
        chart.layout.update(
            xaxis={
                "title": {"text": "eigenvalue"},
                "range": places.tolist(),
                **axis.ticks(float(low), float(high)),
            },
            yaxis={
                "title": {"text": "density"},
                "type": "log",
                "range": [math.log10(FLOOR) - 0.3, math.log10(top) + 0.3],
                "exponentformat": "power",
                "dtick": 2,
            },
        )
    return list(charts.values())


def _traces(each: RunSpectrum, axis: Symlog, grid: Floats, density: Floats) -> list[dict[str, Any]]:
    """Return the density of a spectrum, and its extremes as two points on the floor."""
    spectrum, place = each.item.spectrum, each.place
    inside = _around(density > FLOOR)
    points = list(zip(axis(grid)[inside].round(5).tolist(), _short(density[inside]), strict=True))
    curve = trace(place, each.name, points, mode="lines")
    curve["customdata"] = _short(grid[inside])
    curve["hovertemplate"] = hover_text("eigenvalue %{customdata:.4g}: density %{y:.3g}")
    extremes = np.array([spectrum.lambda_min, spectrum.lambda_max])
    ends = trace(place, each.name, [(x, FLOOR) for x in axis(extremes).tolist()], mode="markers")
    ends["marker"]["size"] = 9
    ends["text"] = [
        f"{name} {value:.4g} within {error:.1g}"
        for name, value, error in (
            ("smallest eigenvalue", spectrum.lambda_min, spectrum.lambda_min_residual),
            ("largest eigenvalue", spectrum.lambda_max, spectrum.lambda_max_residual),
        )
    ]
    ends["hovertemplate"] = hover_text("%{text}")
    return [curve, ends]


def _grid(spectrum: Spectrum, axis: Symlog) -> Floats:
    """Eigenvalues at which the density is drawn: even on the axis, and around every node."""
    width = spectrum.width()
    nodes = np.concatenate(spectrum.nodes)
    around = (nodes[:, None] + width * np.linspace(-3, 3, 7)).ravel()
    low, high = axis(np.array([nodes.min() - 5 * width, nodes.max() + 5 * width]))
    found: Floats = np.unique(
        np.concatenate([axis.inverse(np.linspace(low, high, POINTS)), around])
    )
    return found


def _around(shown: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Also the points beside those that are shown."""
    wide = shown.copy()
    wide[:-1] |= shown[1:]
    wide[1:] |= shown[:-1]
    return wide


def _short(values: Floats) -> list[float]:
    """Numbers of six digits: the page holds thousands of them."""
    return [float(f"{value:.6g}") for value in values]
