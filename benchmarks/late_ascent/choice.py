"""The choice of settings, which uses only records of the tuning seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.late_ascent.plan import (
    BASES,
    OWN_TRIALS,
    SAM_TRIALS,
    SETUPS,
    SGD_TRIALS,
    TUNED_ON,
    TUNING_SEEDS,
    Arm,
    Values,
    more_trials,
)
from benchmarks.late_ascent.records import Stage, Unit

BY = {"100 images": "by tau", "20 images": "by tau, few", "100 images, as trained": "raw"}
"""Selection criteria: balanced validation accuracy at the best tau on all images, at the best tau on the
first 20 images of each class, and without tau."""


def base_arm(base: Values) -> Arm:
    """Return the arm of a trial of SGD alone."""
    return Arm(
        f"lr {base['lr']:g} wd {base['weight_decay']:g}",
        settings=tuple(base.items()),
        branched=False,
    )


def score(
    method: str, arm: str, stage: Stage, by: str = "by tau", *, setup: str = TUNED_ON
) -> float:
    """Return the mean balanced validation accuracy over tuning seeds, at the best tau unless raw."""
    units = [Unit(setup, method, seed, stage) for seed in TUNING_SEEDS]
    curves = [unit.records()[arm]["validation"] for unit in units]
    if by == "raw":
        return statistics.mean(float(curve["by tau"][0]) for curve in curves)
    return statistics.mean(max(map(float, curve[by])) for curve in curves)


def chosen_base(method: str) -> Values:
    """Return the chosen learning rate and weight decay of the phase before the deferral."""
    return max(BASES, key=lambda base: score(method, base_arm(base).name, "bases"))


def families(method: str) -> dict[str, Sequence[Arm]]:
    """Return the trials of each family, with two more per family if a winner is at the end of its grid."""
    trials: dict[str, Sequence[Arm]] = {"sgd": SGD_TRIALS, "sam": SAM_TRIALS}
    winners = {name: _best(method, arms, "by tau") for name, arms in trials.items()}
    more = more_trials(winners["sgd"], winners["sam"])
    return {name: (*arms, *more.get(name, ())) for name, arms in trials.items()}


def chosen_late(method: str, by: str = "by tau") -> dict[str, Arm]:
    """Return the winner of each family."""
    return {name: _best(method, arms, by) for name, arms in families(method).items()}


def chosen_own(setup: str) -> dict[str, Arm]:
    """Return the winner of each family of a setup with its own trials."""
    return {
        family: max(arms, key=lambda arm: _own_score(setup, arm))
        for family, arms in OWN_TRIALS[setup].items()
    }


def _own_score(setup: str, arm: Arm) -> float:
    (method,) = SETUPS[setup].methods
    return score(method, arm.name, "late", setup=setup)


def recipe_sam(method: str) -> Arm:
    """Return the best trial of SAM at the recipe's late learning rate."""
    arms = [arm for arm in families(method)["sam"] if arm.factor == SAM_TRIALS[0].factor]
    return _best(method, arms, "by tau")


def tuning_table(method: str) -> dict[str, Any]:
    """Return the score of every trial by selection criterion, and the chosen arms."""
    trials = [arm for arms in families(method).values() for arm in arms]
    return {
        "base": {
            base_arm(base).name: score(method, base_arm(base).name, "bases") for base in BASES
        },
        "late": {
            images: {arm.name: score(method, arm.name, "late", by) for arm in trials}
            for images, by in BY.items()
        },
        "chosen": {
            "base": chosen_base(method),
            **{
                images: {name: arm.name for name, arm in chosen_late(method, by).items()}
                for images, by in BY.items()
            },
        },
    }


def own_tuning_table(setup: str) -> dict[str, Any]:
    """Return the score of every trial of a setup with its own trials, and the chosen arms."""
    return {
        "trials": {
            arm.name: _own_score(setup, arm) for arms in OWN_TRIALS[setup].values() for arm in arms
        },
        "chosen": {name: arm.name for name, arm in chosen_own(setup).items()},
    }


def _best(method: str, arms: Sequence[Arm], by: str) -> Arm:
    return max(arms, key=lambda arm: score(method, arm.name, "late", by))
