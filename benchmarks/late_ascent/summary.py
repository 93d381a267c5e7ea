"""The summary of all setups, computed from the records of the reported seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.late_ascent import choice
from benchmarks.late_ascent.arms import BASE, winners
from benchmarks.late_ascent.curvature_summary import curvature_summary
from benchmarks.late_ascent.plan import METHODS, OWN_TRIALS, SETUPS, Setup
from benchmarks.late_ascent.records import Unit
from benchmarks.late_ascent.verdict import holm
from benchmarks.seed_scores import SCORES, difference, score_of, spread, stored_difference

KINDS = ("raw", "tau", "tau, few")
CONFIRMED = ("fashion-600", "fashion-5000")
"""Setups whose primary comparisons, for each method, are corrected for multiple comparisons."""


def summary() -> dict[str, Any]:
    """Return the summary of all setups and methods with records of every reported seed.

    The primary comparison is the balanced accuracy of the chosen late SAM minus that of the chosen late SGD,
    with tau chosen on validation images. Its p values are corrected over the methods and the complete setups
    in :data:`CONFIRMED`. All other comparisons are descriptive.
    """
    pairs = [(setup, method) for setup in SETUPS.values() for method in setup.methods]
    complete = {
        f"{setup.name} {method}": _table(setup, method)
        for setup, method in pairs
        if _is_complete(setup, method)
    }
    confirmed = {
        name: table["primary"]["p"]
        for name, table in complete.items()
        if name.partition(" ")[0] in CONFIRMED
    }
    corrected = holm(confirmed)
    for name, table in complete.items():
        primary = table["primary"]
        p = corrected.get(name, primary["p"])
        primary["p, corrected"] = p
        primary["verdict"] = stored_difference(primary).verdict(p)
    tuning = {method: choice.tuning_table(method) for method in METHODS}
    for name in OWN_TRIALS:
        if any(title.partition(" ")[0] == name for title in complete):
            tuning[name] = choice.own_tuning_table(name)
    return {
        "tuning": tuning,
        "setups": complete,
    }


def _units(setup: Setup, method: str) -> list[Unit]:
    return [Unit(setup.name, method, seed) for seed in range(setup.seeds)]


def _is_complete(setup: Setup, method: str) -> bool:
    runs = [unit.records() for unit in _units(setup, method)]
    if not all(runs):
        return False  # settings may not have been chosen yet
    wanted = {arm.name for arm in winners(setup.name, method).values()}
    return all(wanted <= records.keys() for records in runs)


def _table(setup: Setup, method: str) -> dict[str, Any]:
    runs = [unit.records() for unit in _units(setup, method)]
    everywhere = [name for name in runs[0] if all(name in records for records in runs)]
    chosen = winners(setup.name, method)
    sgd, sam = chosen["sgd"].name, chosen["sam"].name
    primary = difference(runs, sam, sgd, "tau", "balanced")
    return {
        "seeds": len(runs),
        "chosen": {"sgd": sgd, "sam": sam},
        "primary": asdict(primary),
        "arms": {name: _arm([records[name] for records in runs]) for name in everywhere},
        "minus the chosen SGD": {
            kind: {name: _differences(runs, name, sgd, kind) for name in everywhere if name != sgd}
            for kind in KINDS
        },
        "curvature": curvature_summary(setup, method),
        "minus base": asdict(difference(runs, sam, BASE.name, "tau", "balanced"))
        if BASE.name in everywhere
        else None,
        "few": _other_choice(setup, method, runs, "by tau, few", "tau, few"),
        "raw": _other_choice(setup, method, runs, "raw", "raw"),
    }


def _other_choice(
    setup: Setup, method: str, runs: Sequence[Mapping[str, Any]], by: str, kind: str
) -> dict[str, Any] | None:
    """Return the primary comparison under another selection criterion; None if its arms are not trained."""
    if setup.name in OWN_TRIALS:
        return None
    chosen = choice.chosen_late(method, by)
    sgd, sam = chosen["sgd"].name, chosen["sam"].name
    if any({sgd, sam} - records.keys() for records in runs):
        return None
    return {
        "sgd": sgd,
        "sam": sam,
        **asdict(difference(runs, sam, sgd, kind, "balanced")),
    }


def _arm(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compute mean and standard deviation of every score over seeds, and the mean cost."""
    return {
        "gradients": statistics.mean(float(record["gradients"]) for record in records),
        "clean training": {
            name: spread([float(record["clean training"][name]) for record in records])
            for name in ("accuracy", "nll")
        },
        **{
            kind: {
                name: spread([score_of(record, kind, name) for record in records])
                for name in SCORES
            }
            for kind in KINDS
        },
    }


def _differences(
    runs: Sequence[Mapping[str, Any]], left: str, right: str, kind: str
) -> dict[str, Any]:
    return {name: asdict(difference(runs, left, right, kind, name)) for name in SCORES}
