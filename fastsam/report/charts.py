"""The interactive figures of the page, as data and layout of Plotly, which the page draws.

Colors are positions in the palette: the page fills them in for its color scheme.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastsam.longtail.measured import Measured
from fastsam.report.comparison import Judged, PairedPanel
from fastsam.report.groups import Group
from fastsam.report.paired import SMALLEST_EFFECT
from fastsam.report.palette import style
from fastsam.report.tables import accuracy_names, by_count, confusion

Axis = dict[str, Any]
SHOWN_MARKERS = 8
"""Markers of a curve; all epochs have points that a reader can hover."""
MATRIX_CLASSES = 30
"""Classes above which no confusion matrix is drawn."""

LOG_AXIS: Axis = {"type": "log", "tickformat": ".2~r", "nticks": 6}
"""A logarithmic axis."""


@dataclass(frozen=True)
class Chart:
    """A figure of the page.

    Attributes:
        title: what it shows.
        data: traces; ``meta.run`` is the place of the group of runs that a trace belongs to.
        layout: axes, shapes and annotations; the ``name`` of these lists the groups that they belong to.
        height: in pixels.
    """

    title: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    height: int = 320


def accuracy(groups: Sequence[Group]) -> Chart:
    """Test accuracy overall and by group of classes: means with deviations, and each seed."""
    names = accuracy_names(groups)
    data = []
    for place, group in enumerate(groups):
        shift = 0.8 * ((place + 0.5) / len(groups) - 0.5)
        columns = [[r.test.group_accuracy(name) for r in group.results] for name in names]
        found = [(i + shift, Measured.of(column)) for i, column in enumerate(columns)]
        known = [(x, each) for x, each in found if each.known]
        if len(group.runs) > 1:
            points = [(i + shift, v) for i, column in enumerate(columns) for v in column]
            data.append(trace(place, group.name, points, mode="markers", opacity=0.35))
        means = [(x, each.mean) for x, each in known]
        shown = trace(place, group.name, means, mode="markers", hover="%{y:.1f} %")
        shown["marker"]["size"] = 9
        if len(group.runs) > 1:
            shown["error_y"] = {"array": [each.deviation for _, each in known], "width": 3}
        data.append(shown)
    ticks = {"tickvals": list(range(len(names))), "ticktext": list(map(_text, names))}
    layout = {
        "xaxis": {"range": [-0.5, len(names) - 0.5], "showgrid": False, **ticks},
        "yaxis": titled("test accuracy, %"),
    }
    return Chart("Test accuracy; bars are standard deviations over seeds", data, layout)


def class_accuracy(groups: Sequence[Group], places: Sequence[int]) -> Chart:
    """Test accuracy of each class, largest class first, above the training images of each.

    Args:
        groups: groups of runs on the same classes.
        places: the place of each among all groups.
    """
    first = groups[0].first
    order = by_count(first)
    names = [_text(first.class_names[label]) for label in order]
    at = list(range(len(order)))
    data: list[dict[str, Any]] = []
    for place, group in zip(places, groups, strict=True):
        scores = [[r.test.per_class[label] for r in group.results] for label in order]
        means = [Measured.of(column).mean for column in scores]
        shown = trace(place, group.name, list(zip(at, means, strict=True)))
        data.append({**shown, "text": names, "hovertemplate": hover_text("%{text}: %{y:.1f} %")})
    data.append(
        {
            "type": "bar",
            "name": "training images",
            "x": at,
            "y": [first.counts[label] for label in order],
            "yaxis": "y2",
            "text": names,
            "textposition": "none",
            "hovertemplate": "%{text}: %{y} training images<extra></extra>",
        }
    )
    few = len(order) <= MATRIX_CLASSES
    ticks = {"tickvals": at, "ticktext": names} if few else titled("class, by training images")
    layout = {
        "xaxis": {**ticks, "anchor": "y2", "showgrid": False},
        "yaxis": {**titled("test accuracy, %"), "domain": [0.3, 1]},
        "yaxis2": {**titled("images"), **LOG_AXIS, "domain": [0, 0.22], "nticks": 3},
    }
    return Chart("Test accuracy by class, and training images", data, layout, 400)


def reliability(groups: Sequence[Group]) -> Chart:
    """Accuracy over confidence in bins; every seed has a line."""
    data: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [0, 100],
            "y": [0, 100],
            "line": {"width": 1, "dash": "dot"},
            "hoverinfo": "skip",
        }
    ]
    for place, group in enumerate(groups):
        for result in group.results:
            bins = result.test.bins or []
            points = [(each.confidence, each.accuracy) for each in bins]
            shown = trace(place, group.name, points)
            shown["marker"] = {
                "symbol": shown["marker"]["symbol"],
                "size": [4 + 1.2 * math.sqrt(each.share) for each in bins],
            }
            shown["customdata"] = [each.share for each in bins]
            shown["hovertemplate"] = hover_text(
                "confidence %{x:.1f} %, accuracy %{y:.1f} %, %{customdata:.1f} % of the images"
            )
            data.append(shown)
    layout = {
        "xaxis": {**titled("confidence, %"), "range": [0, 101]},
        "yaxis": {**titled("accuracy, %"), "range": [-2, 102]},
    }
    return Chart(
        "Reliability: a calibrated network lies on the dotted line; large points have many images",
        data,
        layout,
        380,
    )


def confusion_matrix(place: int, group: Group) -> Chart | None:
    """Return shares of each class that were taken for each; None for too many classes."""
    names = group.first.class_names
    if len(names) > MATRIX_CLASSES:
        return None
    order = by_count(group.first)
    summed = confusion(group)
    counts = [[summed.get((i, j), 0) for j in order] for i in order]
    rows = [[100 * n / sum(row) if sum(row) else None for n in row] for row in counts]
    labels = [_text(names[label]) for label in order]
    ticks = {"tickvals": list(range(len(order))), "ticktext": labels}
    data = {
        "type": "heatmap",
        "z": rows,
        "customdata": counts,
        "zmin": 0,
        "zmax": 100,
        "xgap": 1,
        "ygap": 1,
        "colorbar": {"title": {"text": "%"}, "thickness": 10},
        "hovertemplate": "class %{y} taken for %{x}: %{z:.1f} %, %{customdata} images<extra></extra>",
        "meta": {"confusion": place},
    }
    layout = {
        "xaxis": {**titled("taken for"), **ticks, "showgrid": False},
        "yaxis": {**titled("class"), **ticks, "autorange": "reversed", "showgrid": False},
    }
    return Chart(f"Confusion, {group.name}", [data], layout, 440)


_SHOWN = {"balanced": "Balanced accuracy", "tail": "Accuracy of tail classes"}
_JUDGED: dict[Judged, str] = {"raw": "as trained", "calibrated": "calibrated"}


def differences(panels: Sequence[PairedPanel]) -> list[Chart]:
    """Return the differences of each pair: seeds as dots, means with their 95 % intervals.

    A score for which no difference is known has no figure.

    Args:
        panels: panels of the same data, all with or all without calibration.
    """
    pairs = [(panel, *pair) for panel in panels for pair in panel.compared()]
    ways = panels[0].judged
    band = {
        "type": "rect",
        "xref": "x",
        "yref": "paper",
        "x0": -SMALLEST_EFFECT,
        "x1": SMALLEST_EFFECT,
        "y0": 0,
        "y1": 1,
        "line": {"width": 0},
        "layer": "below",
    }
    charts = []
    for score, title in _SHOWN.items():
        data: list[dict[str, Any]] = []
        notes: list[dict[str, Any]] = []
        for judged in ways:
            found = [panel.difference(left, right, judged, score) for panel, left, right in pairs]
            shift = 0.0 if len(ways) == 1 else {"raw": -0.15, "calibrated": 0.15}[judged]
            places = [i + shift for i in range(len(pairs))]
            color = len(data) // 2
            gaps = [
                (gap, at)
                for at, (panel, left, right) in zip(places, pairs, strict=True)
                for gap in panel.gaps(left, right, judged, score)
            ]
            seeds = trace(color, _JUDGED[judged], gaps, mode="markers", opacity=0.4)
            seeds["showlegend"] = False
            placed = list(zip(found, places, strict=True))
            known = [(each, at) for each, at in placed if each.known]
            notes += [_note(at, each.verdict()) for each, at in placed if not each.known]
            means = trace(
                color,
                _JUDGED[judged],
                [(each.mean, at) for each, at in known],
                mode="markers",
                hover="%{x:+.1f} points, %{text}",
            )
            means["text"] = [f"{each} : {each.verdict()}" for each, _ in known]
            means["marker"] |= {"size": 9}
            widths = [each.half_width if math.isfinite(each.half_width) else 0 for each, _ in known]
            means["error_x"] = {"array": widths, "width": 4}
            for shown in (seeds, means):  # of no single run
                shown["meta"] = {"color": color}
            data += [seeds, means]
        labels = [f"{_wrapped(left)}<br>minus {_wrapped(right)}" for _, left, right in pairs]
        layout = {
            "showlegend": len(ways) > 1,
            "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
            "xaxis": {**titled("difference, points"), "zeroline": True},
            "yaxis": {
                "tickvals": list(range(len(pairs))),
                "ticktext": labels,
                "range": [len(pairs) - 0.5, -0.5],
                "automargin": True,
                "showgrid": False,
            },
            "shapes": [band],
            "annotations": notes,
        }
        if len(notes) < len(ways) * len(pairs):
            charts.append(Chart(title, data, layout, 140 + 60 * len(pairs)))
    return charts


def _note(at: float, text: str) -> dict[str, Any]:
    """Return a text at the left end of a row of differences."""
    side = {"x": 0, "xref": "paper", "xanchor": "left"}
    return {"text": text, "showarrow": False, "y": at, "yref": "y", **side}


def trace(
    place: int | None,
    name: str,
    points: Sequence[tuple[float, float]],
    *,
    mode: str = "lines+markers",
    opacity: float = 1.0,
    hover: str = "%{y:.1f}",
) -> dict[str, Any]:
    """Return a trace in the style of a group of runs; ``place`` is None for one that is always shown.

    Args:
        place: place of the group.
        name: what the reader sees when pointing at it.
        points: x and y of each point; one that is not finite is not shown.
        mode: ``lines``, ``markers`` or both, joined by ``+``.
        opacity: from 0 to 1.
        hover: what is said of a point, as a template of Plotly.
    """
    look = style(place or 0)
    return {
        "type": "scatter",
        "mode": mode,
        "name": _text(name),
        "x": [_finite(x) for x, _ in points],
        "y": [_finite(y) for _, y in points],
        "opacity": opacity,
        "line": {"width": 1.8, "dash": ",".join(f"{n}px" for n in look.dash) or "solid"},
        "marker": {"symbol": look.marker.plotly, "size": 6, "maxdisplayed": SHOWN_MARKERS}
        if "lines" in mode
        else {"symbol": look.marker.plotly, "size": 5},
        "hovertemplate": hover_text(hover),
        "meta": {"run": place, "color": look.color},
    }


def hover_text(values: str) -> str:
    """Return the template of what is said of a point, and by which run."""
    return f"{values}<extra>%{{fullData.name}}</extra>"


def titled(text: str) -> Axis:
    """Return an axis with a title."""
    return {"title": {"text": text}}


def _text(name: str) -> str:
    """Escape the part of HTML that Plotly interprets in texts."""
    return html.escape(name, quote=False)


def _wrapped(name: str, width: int = 22) -> str:
    """Break a name into lines of at most ``width`` letters where it has spaces."""
    lines = [""]
    for word in name.split(" "):
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return "<br>".join(map(_text, lines))


def _finite(value: float) -> float | None:
    """JSON knows neither infinity nor NaN."""
    return value if math.isfinite(value) else None
