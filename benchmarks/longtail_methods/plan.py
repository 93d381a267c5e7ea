"""The plan: data, methods and optimizers, fixed before the first run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from benchmarks.late_ascent.plan import RECIPE, RECIPE_FACTOR, SETUPS, Setup, Values

SETUP = SETUPS["fashion-600"]
SEEDS = 5
OPTIMIZERS: tuple[Literal["sgd", "sam"], ...] = ("sgd", "sam")
RHO = 0.05
"""Radius of SAM, which ascends in the last fifth of the epochs. Its schedule is that of SGD."""


@dataclass(frozen=True)
class Group:
    """A way to train a network in one stage, and what continues from that network.

    Attributes:
        name: name in files and tables.
        method: method, ``LOSS-RULE``.
        settings: settings that differ from the setup.
        stages: names of lists whose second stage is trained from the network.
        calibrators: names of calibrators that are applied to the network.
    """

    name: str
    method: str = "ce"
    settings: tuple[tuple[str, Any], ...] = ()
    stages: tuple[str, ...] = ()
    calibrators: tuple[str, ...] = ()

    def values(self, setup: Setup, optimizer: str, seed: int) -> Values:
        """Return the settings of the first stage.

        Args:
            setup: data set and length of the run.
            optimizer: ``sgd`` or ``sam``.
            seed: seed of the run.
        """
        setup = replace(setup, deferred="-" in self.method)
        return {
            **setup.of_seed(seed),
            **RECIPE,
            **setup.schedule(RECIPE_FACTOR),
            **dict(self.settings),
            **({"rho": (RHO,), "ascent_start": str(setup.defer)} if optimizer == "sam" else {}),
        }


GROUPS = {
    group.name: group
    for group in (
        Group(
            "ce",
            stages=("crt", "lws", "disalign"),
            calibrators=("tau-norm", "logit-adjustment"),
        ),
        Group("mixup", settings=(("mixer", "mixup"),), stages=("mislas",)),
        Group("cmo", settings=(("mixer", "cmo"),)),
        Group("ce-drw", "ce-drw"),
    )
}
BASELINE = "ce sgd"
"""The arm that all others are compared with."""


@dataclass(frozen=True)
class Arm:
    """A network that is scored.

    Attributes:
        way: name of the method in tables.
        optimizer: optimizer of the first stage.
        step: ``first`` for a network of one stage, ``late`` for the late phase of such a network,
            ``second`` for a list of stages that continues from one, ``calibrated`` for one with a calibrator
            as its head.
        origin: name of the arm whose weights it starts from; None for random initial weights.
    """

    way: str
    optimizer: str
    step: Literal["first", "late", "second", "calibrated"] = "first"
    origin: str | None = None

    @property
    def name(self) -> str:
        """Name in records and tables."""
        return arm_name(self.way, self.optimizer)


def arm_name(way: str, optimizer: str) -> str:
    """Return the name of the arm of a method and an optimizer."""
    return f"{way} {optimizer}"


def arms_of(group: Group) -> list[Arm]:
    """Return the arms of a group. An arm comes after its origin."""
    first = arm_name(group.name, "sgd")
    arms = [Arm(group.name, "sgd"), Arm(group.name, "sam", "late", first)]
    for optimizer in OPTIMIZERS:
        origin = arm_name(group.name, optimizer)
        arms += [Arm(way, optimizer, "second", origin) for way in group.stages]
        arms += [Arm(way, optimizer, "calibrated", origin) for way in group.calibrators]
    return arms


def ways() -> list[str]:
    """Return the names of all methods in the order of the tables."""
    return [
        *GROUPS,
        *(way for group in GROUPS.values() for way in (*group.stages, *group.calibrators)),
    ]
