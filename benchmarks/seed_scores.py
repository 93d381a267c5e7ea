"""Scores of records over several seeds, and paired differences between them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from fastsam.report.paired import Difference, paired

SCORES = (
    *("accuracy", "balanced", "head", "mid", "tail", "worst_class"),
    *("nll", "ece"),
)


def score_of(record: Mapping[str, Any], kind: str, name: str) -> float:
    """Return a test score of a run.

    Args:
        record: record of the run.
        kind: ``raw``, ``tau`` or ``tau, few``.
        name: name of the score.
    """
    return float(record["test"][kind][name])


def spread(values: Sequence[float]) -> list[float]:
    """Return mean and standard deviation; the latter is NaN for one value. Only the tables round them."""
    return [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan]


def stored_difference(entry: Mapping[str, Any]) -> Difference:
    """Return a difference that was stored with ``asdict``, perhaps beside other entries."""
    return Difference(**{field.name: entry[field.name] for field in fields(Difference)})


def difference(
    runs: Sequence[Mapping[str, Any]], left: str, right: str, kind: str, name: str
) -> Difference:
    """Return the paired difference of a test score of two arms.

    Args:
        runs: for each seed, the records by name of the arm.
        left: name of the arm to compare.
        right: name of the arm to compare with.
        kind: ``raw``, ``tau`` or ``tau, few``.
        name: name of the score.
    """
    return paired(
        *([score_of(records[arm], kind, name) for records in runs] for arm in (left, right))
    )
