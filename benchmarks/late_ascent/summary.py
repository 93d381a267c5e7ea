"""The summary of all setups, computed from the records of the reported seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.late_ascent import choice
from benchmarks.late_ascent.arms import BASE, stage_of, winners
from benchmarks.late_ascent.curvature_summary import curvature_summary
from benchmarks.late_ascent.plan import METHODS, OWN_TRIALS, SETUPS, Setup, late_sgd
from benchmarks.late_ascent.records import Stage, Unit
from benchmarks.late_ascent.verdict import holm
from benchmarks.seed_scores import SCORES, difference, score_of, spread, stored_difference

KINDS = ("raw", "tau", "tau, few")
CONFIRMED = ("fashion-600", "fashion-5000")
"""Setups whose primary comparisons, for each method, are corrected for multiple comparisons."""


def summary() -> dict[str, Any]:
    """Return the summary of all setups and methods with records of every reported seed.

    The primary comparison is the balanced accuracy of the chosen late SAM minus that of the chosen late SGD,
    with tau chosen on validation images. Its p values are corrected over the methods and the complete setups
    in :data:`CONFIRMED`, in their first run. All other comparisons are descriptive, those of second runs too.
    """
    complete = {
        name: _table(units)
        for setup in SETUPS.values()
        for method in setup.methods
        for name, units in _units(setup, method).items()
        if _is_complete(units)
    }
    confirmed = {
        name: table["primary"]["p"]
        for name, table in complete.items()
        if table["setup"] in CONFIRMED and table["stage"] == "late"
    }
    corrected = holm(confirmed)
    for name, table in complete.items():
        primary = table["primary"]
        p = corrected.get(name, primary["p"])
        primary["p, corrected"] = p
        primary["verdict"] = stored_difference(primary).verdict(p)
    tuning = {method: choice.tuning_table(method) for method in METHODS}
    for name in OWN_TRIALS:
        if any(table["setup"] == name for table in complete.values()):
            tuning[name] = choice.own_tuning_table(name)
    return {
        "tuning": tuning,
        "setups": complete,
    }


def _units(setup: Setup, method: str) -> dict[str, list[Unit]]:
    """Return the reported seeds of the runs of a setup, by the name of the run in tables."""
    stages: dict[str, Stage] = {f"{setup.name} {method}": "late"}
    if setup.second_run:
        stages[f"{setup.name} {method}, second run"] = "second"
    return {
        name: [Unit(setup.name, method, seed, stage) for seed in range(setup.seeds)]
        for name, stage in stages.items()
    }


def _is_complete(units: Sequence[Unit]) -> bool:
    runs = [unit.records() for unit in units]
    if not all(runs):
        return False  # settings may not have been chosen yet
    wanted = {arm.name for arm in winners(units[0].setup, units[0].method).values()}
    return all(wanted <= records.keys() for records in runs)


def _table(units: Sequence[Unit]) -> dict[str, Any]:
    setup, method, stage = units[0].setup, units[0].method, units[0].stage
    runs = [unit.records() for unit in units]
    everywhere = [name for name in runs[0] if all(name in records for records in runs)]
    chosen = winners(setup, method)
    sgd, sam = chosen["sgd"].name, chosen["sam"].name
    primary = difference(runs, sam, sgd, "tau", "balanced")
    return {
        "setup": setup,
        "method": method,
        "stage": stage,
        "seeds": len(runs),
        "chosen": {"sgd": sgd, "sam": sam},
        "primary": asdict(primary),
        "arms": {name: _arm([records[name] for records in runs]) for name in everywhere},
        "minus the chosen SGD": {
            kind: {name: _differences(runs, name, sgd, kind) for name in everywhere if name != sgd}
            for kind in KINDS
        },
        "curvature": curvature_summary(units) if stage == stage_of(setup, "curvature") else None,
        "minus base": asdict(difference(runs, sam, BASE.name, "tau", "balanced"))
        if BASE.name in everywhere
        else None,
        "at equal rate": _at_equal_rate(setup, method, runs, everywhere),
        "reported seeds": _by_reported_seeds(setup, method, runs, everywhere),
        "few": _other_choice(setup, method, runs, "by tau, few", "tau, few"),
        "raw": _other_choice(setup, method, runs, "raw", "raw"),
    }


def _at_equal_rate(
    setup: str, method: str, runs: Sequence[Mapping[str, Any]], trained: Sequence[str]
) -> dict[str, Any] | None:
    """Return the chosen late SAM minus SGD at the same late learning rate and weight decay.

    The two arms differ in the ascent only. None if that SGD is not trained, or SAM trains from scratch.
    """
    sam = winners(setup, method)["sam"]
    sgd = late_sgd(sam.factor, sam.decay)
    if not sam.branched or sgd.name not in trained:
        return None
    return {
        "sgd": sgd.name,
        "sam": sam.name,
        **{kind: _differences(runs, sam.name, sgd.name, kind) for kind in KINDS},
    }


def _by_reported_seeds(
    setup: str, method: str, runs: Sequence[Mapping[str, Any]], trained: Sequence[str]
) -> dict[str, Any] | None:
    """Return SAM minus SGD after a choice by validation images of the reported seeds; None without a choice.

    Candidates are the trials that are trained on every reported seed, and for SGD the recipe's late phase.
    """
    if setup in OWN_TRIALS:
        return None

    def validation(arm: str) -> float:
        curves = (run[arm]["validation"]["by tau"] for run in runs)
        return statistics.mean(max(map(float, curve)) for curve in curves)

    names = {family: [arm.name for arm in arms] for family, arms in choice.families(method).items()}
    names["sgd"] = [BASE.name, *names["sgd"]]
    candidates = {family: [arm for arm in arms if arm in trained] for family, arms in names.items()}
    if all(len(arms) < 2 for arms in candidates.values()):
        return None
    chosen = {family: max(arms, key=validation) for family, arms in candidates.items()}
    return {
        **chosen,
        "candidates": {family: len(arms) for family, arms in candidates.items()},
        **asdict(difference(runs, chosen["sam"], chosen["sgd"], "tau", "balanced")),
    }


def _other_choice(
    setup: str, method: str, runs: Sequence[Mapping[str, Any]], by: str, kind: str
) -> dict[str, Any] | None:
    """Return the primary comparison under another selection criterion; None if its arms are not trained."""
    if setup in OWN_TRIALS:
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
