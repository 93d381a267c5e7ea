"""The interactive figures of training by epoch: loss, accuracies, learning rate, rho and curvature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastsam.longtail.results import Result
from fastsam.report.charts import LOG_AXIS, Axis, Chart, titled, trace
from fastsam.report.groups import Group
from fastsam.report.marks import Mark, marks
from fastsam.report.quantities import QUANTITIES


def training(groups: Sequence[Group]) -> list[Chart]:
    """Loss, accuracies, learning rate and rho by epoch, with deferral and ascent start."""
    found = _marks_by_epoch(groups)
    charts = []
    for quantity in QUANTITIES:
        data = []
        for place, group in enumerate(groups):
            for result in group.results:
                history = [(e.epoch, quantity.value(e)) for e in result.history]
                points = [(epoch, y) for epoch, y in history if y is not None]
                if points:
                    hover = f"epoch %{{x}}: {quantity.axis} %{{y:.4g}}"
                    who = group.name + _seed(result, group)
                    data.append(trace(place, who, points, hover=hover))
        if data:
            axis = {**titled(quantity.axis), **(LOG_AXIS if quantity.scale == "log" else {})}
            if quantity.from_zero:
                axis["rangemode"] = "tozero"
            charts.append(_by_epoch(quantity.title, data, axis, found))
    return charts


def curvature(groups: Sequence[Group]) -> list[Chart]:
    """Largest and smallest Hessian eigenvalue by epoch, for each of the measured classes."""
    found = _marks_by_epoch(groups)
    names = [p.group for group in groups for result in group.results for p in result.curvature]
    charts = []
    for name in dict.fromkeys(names):
        largest: list[dict[str, Any]] = []
        smallest: list[dict[str, Any]] = []
        for place, group in enumerate(groups):
            for result in group.results:
                steps = result.steps_per_epoch or 1
                # Steps of epoch e lie between e - 0.5 and e + 0.5, as the lines where something begins do.
                points = [(p.step / steps + 0.5, p) for p in result.curvature if p.group == name]
                if not points:
                    continue
                who = group.name + _seed(result, group)
                for traces, values in (
                    (largest, [(epoch, p.lambda_max) for epoch, p in points]),
                    (smallest, [(epoch, p.lambda_min) for epoch, p in points]),
                ):
                    hover = "epoch %{x:.1f}: lambda %{y:.4g}"
                    traces.append(trace(place, who, values, hover=hover))
                limit = [(epoch, 2 / p.lr) for epoch, p in points if p.lr]
                hover = "epoch %{x:.1f}: 2/lr %{y:.4g}"
                largest.append(
                    trace(place, f"2/lr, {who}", limit, mode="lines", opacity=0.4, hover=hover)
                )
        what = f"class {name}" if name.isdecimal() else f"{name} classes"
        for end, data, axis in (("Largest", largest, LOG_AXIS), ("Smallest", smallest, {})):
            title = f"{end} Hessian eigenvalue, {what}" + ("; 2/lr is pale" if axis else "")
            charts.append(_by_epoch(title, data, {**titled("eigenvalue"), **axis}, found))
    return charts


def _marks_by_epoch(groups: Sequence[Group]) -> dict[int, list[Mark]]:
    """Return what begins after an epoch, by this epoch."""
    found: dict[int, list[Mark]] = {}
    for mark in marks(groups):
        found.setdefault(mark.after, []).append(mark)
    return found


def _by_epoch(
    title: str, data: list[dict[str, Any]], axis: Axis, found: Mapping[int, list[Mark]]
) -> Chart:
    """Return a figure over epochs, with lines where something begins."""
    layout = {
        "xaxis": {**titled("epoch"), "rangemode": "tozero"},
        "yaxis": axis,
        "shapes": [_line(*event) for event in found.items()],
        "annotations": [_annotation(*event) for event in found.items()],
    }
    return Chart(title, data, layout, 300)


def _seed(result: Result, group: Group) -> str:
    return f", seed {result.config['seed']}" if len(group.runs) > 1 else ""


def _annotation(after: int, kinds: Sequence[Mark]) -> dict[str, Any]:
    """Return the label of the line that marks an event after an epoch."""
    return {
        "x": after + 0.5,
        "y": 1,
        "xref": "x",
        "yref": "paper",
        "xanchor": "right",
        "yanchor": "top",
        "textangle": -90,
        "text": ", ".join(mark.kind for mark in kinds),
        "showarrow": False,
        "name": _places(kinds),
    }


def _line(after: int, kinds: Sequence[Mark]) -> dict[str, Any]:
    """Return a line between an epoch and the next."""
    at = {"x0": after + 0.5, "x1": after + 0.5, "y0": 0, "y1": 1, "xref": "x", "yref": "paper"}
    return {"type": "line", "line": {"width": 1, "dash": "dot"}, **at, "name": _places(kinds)}


def _places(kinds: Sequence[Mark]) -> str:
    """Return the groups of runs that a line belongs to. It is hidden when all of them are."""
    return " ".join(str(place) for place in sorted({p for mark in kinds for p in mark.places}))
