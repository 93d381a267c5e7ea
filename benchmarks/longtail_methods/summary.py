"""Summary of the records: mean scores of every arm, and paired differences between arms."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.longtail_methods.plan import BASELINE, GROUPS, OPTIMIZERS, arm_name, arms_of, ways
from benchmarks.longtail_methods.runs import Unit, recorded_seeds
from benchmarks.seed_scores import SCORES, difference, score_of, spread
from fastsam.report.paired import Difference

KINDS = ("raw", "tau")
"""As trained, and after logit adjustment with tau chosen on validation images."""


@dataclass(frozen=True)
class ArmSummary:
    """Scores and cost of an arm over the seeds.

    Attributes:
        way: name of the method.
        optimizer: optimizer of the first stage.
        gradients: mean cost of all stages in forward-backward passes over whole batches.
        scores: mean and standard deviation of the test scores, by kind and name.
        gap: balanced accuracy minus that of the baseline, by kind; empty for the baseline.
        sam_gap: balanced and tail accuracy minus those of the same method with SGD, by kind; empty for SGD.
    """

    way: str
    optimizer: str
    gradients: float
    scores: Mapping[str, Mapping[str, Sequence[float]]]
    gap: Mapping[str, Difference]
    sam_gap: Mapping[str, Mapping[str, Difference]]


@dataclass(frozen=True)
class Summary:
    """Summary of the seeds whose arms are all trained.

    Attributes:
        seeds: the seeds.
        arms: the arms by name.
    """

    seeds: Sequence[int]
    arms: Mapping[str, ArmSummary]


def summary() -> Summary | None:
    """Summarize the seeds with a record of every arm; None if there are none."""
    found = dict(_complete_seeds())
    runs = list(found.values())
    if not runs:
        return None
    arms = {
        arm_name(way, optimizer): _arm(runs, way, optimizer)
        for way in ways()
        for optimizer in OPTIMIZERS
    }
    return Summary(list(found), arms)


def _complete_seeds() -> Iterator[tuple[int, dict[str, Any]]]:
    wanted = {arm.name for group in GROUPS.values() for arm in arms_of(group)}
    for seed in recorded_seeds():
        records: dict[str, Any] = {}
        for group in GROUPS.values():
            records |= Unit(group, seed).runs.records()
        if wanted <= records.keys():
            yield seed, records


def _arm(runs: Sequence[Mapping[str, Any]], way: str, optimizer: str) -> ArmSummary:
    name, sgd = arm_name(way, optimizer), arm_name(way, "sgd")
    records = [run[name] for run in runs]
    return ArmSummary(
        way,
        optimizer,
        statistics.mean(float(record["gradients"]) for record in records),
        {
            kind: {
                score: spread([score_of(record, kind, score) for record in records])
                for score in SCORES
            }
            for kind in KINDS
        },
        {}
        if name == BASELINE
        else {kind: difference(runs, name, BASELINE, kind, "balanced") for kind in KINDS},
        {}
        if name == sgd
        else {
            kind: {
                score: difference(runs, name, sgd, kind, score) for score in ("balanced", "tail")
            }
            for kind in KINDS
        },
    )
