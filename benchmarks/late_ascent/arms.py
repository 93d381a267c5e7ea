"""The arms that are trained with the reported seeds, after settings were chosen."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from benchmarks.late_ascent import choice
from benchmarks.late_ascent.plan import (
    OWN_TRIALS,
    RADII,
    RECIPE,
    SETUPS,
    Arm,
    Values,
    throughout,
)
from benchmarks.late_ascent.records import Stage

Tier = Literal["primary", "branches", "throughout", "curvature"]
BASE = Arm("base", branched=False)
MEMORIZED = "balanced-noise-40"
"""Setup whose chosen settings are also trained on the long-tailed sets with wrong labels."""

_CHEAPER: dict[str, Values] = {
    "uniform quarter": {"ascent_share": 0.25},
    "weighted quarter": {"ascent_share": 0.25, "ascent_sample": "weighted"},
    "every 2nd step": {"ascent_interval": 2},
}


def tuned_on(setup: str) -> str | None:
    """Return the setup whose own trials determine arms of ``setup``; None if there is none."""
    if setup in OWN_TRIALS:
        return setup
    return MEMORIZED if SETUPS[setup].has_wrong_labels else None


def winners(setup: str, method: str) -> dict[str, Arm]:
    """Return the chosen arms of SGD and SAM, between which the primary comparison is made."""
    return choice.chosen_own(setup) if setup in OWN_TRIALS else choice.chosen_late(method)


def arms_of(setup: str, method: str, tier: Tier) -> list[Arm]:
    """Return the arms of a setup. The arm that others branch from comes first.

    Args:
        setup: name of the setup.
        method: method, ``LOSS-RULE``.
        tier: ``primary`` for the two compared arms and the base that they branch from; ``branches`` for
            controls that also branch, after the arms that they are compared with; ``throughout`` for controls
            that train from scratch; ``curvature`` for those of ``primary``, whose curvature is measured.
    """
    if setup in OWN_TRIALS:
        return _own_arms(setup, tier)
    if tier == "curvature":
        tier = "primary"
    chosen = winners(setup, method)
    sgd, sam = chosen["sgd"], chosen["sam"]
    if tier == "primary":
        return [BASE, sgd, sam]
    if tier == "throughout":
        return _throughout_arms(setup, method)
    branches = [
        *(BASE, sgd, sam),
        *choice.chosen_late(method, "by tau, few").values(),
        *choice.chosen_late(method, "raw").values(),
        choice.recipe_sam(method),
        replace(sgd, name=f"{sgd.name}, twice as long", late=2),
        replace(sgd, name=f"{sgd.name}, other order", seed=1000),
        *(_with(sam, name, values) for name, values in _CHEAPER.items()),
    ]
    return list({arm.name: arm for arm in branches}.values())


def stage_of(setup: str, tier: Tier) -> Stage:
    """Return the stage in whose records the arms of a tier are."""
    is_second = SETUPS[setup].second_run and tier in ("branches", "curvature")
    return "second" if is_second else "late"


def _throughout_arms(setup: str, method: str) -> list[Arm]:
    recipe = [Arm("sgd recipe", settings=tuple(RECIPE.items()), branched=False)]
    if choice.chosen_base(method) == RECIPE:
        recipe = []  # the base is the recipe
    sam = [
        Arm(f"sam rho {rho:g}", "sam", settings=(("rho", (rho,)),), branched=False) for rho in RADII
    ]
    if setup == "fashion-5000" and method != "ce-drw":
        return recipe
    if SETUPS[setup].has_wrong_labels:
        return [*recipe, *sam, *choice.chosen_own(MEMORIZED).values()]
    return [*recipe, *sam]


def _own_arms(setup: str, tier: Tier) -> list[Arm]:
    chosen = choice.chosen_own(setup)
    if tier == "primary":
        return list(chosen.values())
    if tier == "branches":
        return []
    return [throughout("sgd", dict(chosen["sgd"].settings)["weight_decay"], longer=2)]


def _with(arm: Arm, name: str, values: Values) -> Arm:
    settings = (*arm.settings, *values.items())
    return replace(arm, name=f"{arm.name}, {name}", settings=settings)
