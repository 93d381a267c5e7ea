"""Summary of the curvature records: negative curvature, changes by SAM, and correlation with accuracy."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from scipy.stats import pearsonr

from benchmarks.late_ascent.arms import winners
from benchmarks.late_ascent.curvature import spectra_path
from benchmarks.late_ascent.records import Unit
from benchmarks.seed_scores import score_of
from fastsam.report.paired import paired

GROUPS = ("head", "tail")
PLACES = ("switch", "sgd", "sam")
RATIO, GRADIENT = 0.05, 0.1
"""Conditions for negative curvature: |lambda_min| / lambda_max is above RATIO, and the gradient norm is below
GRADIENT times its value at initialization."""
_TINY = 1e-12
"""Losses and eigenvalues below this are rounding errors."""

Record = Mapping[str, Any]


def curvature_summary(units: Sequence[Unit]) -> dict[str, Any] | None:
    """Return the curvature summary of the seeds of a setup, or None unless every seed was measured."""
    if not all(spectra_path(unit).is_file() for unit in units):
        return None
    measured = [json.loads(spectra_path(unit).read_text()) for unit in units]
    changes = {group: _changes(measured, group) for group in GROUPS}
    zeros = [0.0] * len(measured)
    return {
        "negative curvature": {
            group: {place: _negative(measured, place, group) for place in PLACES}
            for group in GROUPS
        },
        "sam minus sgd": {
            group: {what: asdict(paired(values, zeros)) for what, values in found.items()}
            for group, found in changes.items()
        },
        "correlation with the change of tail accuracy": {
            kind: _correlation(changes["tail"]["log lambda_max"], _tail_gains(units, kind))
            for kind in ("raw", "tau")
        },
        "medians": {
            group: {place: _medians(measured, place, group) for place in PLACES} for group in GROUPS
        },
    }


def is_negative(entry: Record, initial_gradient: float) -> bool:
    """Return whether a class has negative curvature, by the definition fixed before the runs."""
    low = entry["lambda_min"] + entry["lambda_min_residual"]
    steep = -entry["lambda_min"] / entry["lambda_max"] > RATIO
    return bool(low < 0 and steep and entry["gradient_norm"] < GRADIENT * initial_gradient)


def _changes(measured: Sequence[Record], group: str) -> dict[str, list[float]]:
    """Return SAM minus SGD for each seed, as means over the three classes of a group.

    lambda_max is compared by its natural logarithm: without correction; at equal class loss, by subtracting a
    slope of log lambda_max on log loss, which is fitted over all classes of the group or within each class of
    a seed; and multiplied by the squared weight norm, which removes the scale that batch normalization leaves
    undetermined.
    """
    slope, within = (_slope(measured, group, within=inside) for inside in (False, True))
    quantities: dict[str, Callable[[Record], float]] = {
        "log lambda_max": lambda entry: _log(entry["lambda_max"]),
        "log lambda_max at equal loss": lambda entry: (
            _log(entry["lambda_max"]) - slope * _log(entry["loss"])
        ),
        "log lambda_max at equal loss, slope within a class": lambda entry: (
            _log(entry["lambda_max"]) - within * _log(entry["loss"])
        ),
        "log lambda_max times squared weight norm": lambda entry: (
            _log(entry["lambda_max"]) + 2 * _log(entry["weight_norm"])
        ),
        "log loss": lambda entry: _log(entry["loss"]),
        "lambda_min / lambda_max": lambda entry: float(entry["lambda_min"] / entry["lambda_max"]),
    }

    def mean(place: Record, value: Callable[[Record], float]) -> float:
        return float(np.mean([value(entry) for entry in place[group].values()]))

    return {
        what: [mean(seed["sam"], value) - mean(seed["sgd"], value) for seed in measured]
        for what, value in quantities.items()
    }


def _negative(measured: Sequence[Record], place: str, group: str) -> dict[str, int]:
    """Count the pairs of seed and class for which each condition holds, and for which all hold."""
    entries = [
        (entry, seed["initialization"][label])
        for seed in measured
        for label, entry in seed[place][group].items()
    ]
    return {
        "of": len(entries),
        "lambda_min below its residual": sum(
            entry["lambda_min"] + entry["lambda_min_residual"] < 0 for entry, _ in entries
        ),
        f"-lambda_min above {RATIO} lambda_max": sum(
            -entry["lambda_min"] > RATIO * entry["lambda_max"] for entry, _ in entries
        ),
        f"gradient below {GRADIENT} of the initial one": sum(
            entry["gradient_norm"] < GRADIENT * initial for entry, initial in entries
        ),
        "negative curvature": sum(is_negative(entry, initial) for entry, initial in entries),
    }


def _slope(measured: Sequence[Record], group: str, *, within: bool) -> float:
    """Fit the slope of log lambda_max on log loss, over classes of a group, checkpoints and seeds.

    Args:
        measured: spectra of each seed.
        group: ``head`` or ``tail``.
        within: give every class of a seed its own intercept, so that only its checkpoints are compared.
    """
    points = np.array(
        [
            [
                (_log(seed[p][group][c]["loss"]), _log(seed[p][group][c]["lambda_max"]))
                for p in PLACES
            ]
            for seed in measured
            for c in seed["switch"][group]
        ]
    )  # [classes, checkpoints, 2]
    centered = points - points.mean(axis=1 if within else (0, 1), keepdims=True)
    losses, values = centered[..., 0], centered[..., 1]
    return float((losses * values).sum() / (losses**2).sum())


def _log(value: float) -> float:
    return math.log(max(value, _TINY))


def _medians(measured: Sequence[Record], place: str, group: str) -> dict[str, float]:
    entries = [entry for seed in measured for entry in seed[place][group].values()]
    names = ("lambda_max", "lambda_min", "trace", "loss", "gradient_norm", "weight_norm")
    return {name: float(np.median([entry[name] for entry in entries])) for name in names}


def _tail_gains(units: Sequence[Unit], kind: str) -> list[float]:
    """Return the tail accuracy of late SAM minus that of late SGD for each seed."""
    chosen = winners(units[0].setup, units[0].method)
    gains = []
    for unit in units:
        records = unit.records()
        sam, sgd = (score_of(records[chosen[name].name], kind, "tail") for name in ("sam", "sgd"))
        gains.append(sam - sgd)
    return gains


def _correlation(changes: Sequence[float], gains: Sequence[float]) -> dict[str, float]:
    """Compute Pearson's correlation with its 95 % interval by Fisher's transformation."""
    found = pearsonr(changes, gains)
    low, high = found.confidence_interval(0.95)
    return {"r": float(found.statistic), "low": float(low), "high": float(high), "n": len(changes)}
