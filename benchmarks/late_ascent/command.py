"""The command: train whatever has no record yet, choose, and report."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from benchmarks.late_ascent import choice
from benchmarks.late_ascent.plan import (
    BASES,
    METHODS,
    RADII,
    RECIPE,
    SAM_TRIALS,
    SETUPS,
    SGD_TRIALS,
    TUNED_ON,
    TUNING_SEEDS,
    Arm,
    Values,
)
from benchmarks.late_ascent.records import FOLDER, Unit
from benchmarks.late_ascent.summary import summary
from fastsam.files import write_text

BASE = Arm("base", branched=False)


@dataclass(frozen=True)
class LateAscent:
    """At a tuned late learning rate, does SAM after the deferral beat SGD in balanced accuracy?

    SGD alone chooses learning rate and weight decay. Two families of eight trials continue it after the
    deferral, SGD and SAM, and each is chosen by its validation accuracy on two seeds that are not reported.
    Every finished run has its record in benchmarks/results/late-ascent/: an interrupted command goes on
    from there.
    """

    setups: tuple[str, ...] = tuple(SETUPS)
    """Which setups to train; settings are chosen on fashion-600 in any case."""
    jobs: int = 2
    """Trainings at the same time, one thread each."""
    minutes: float = float("inf")
    """Begin no seed after this long."""
    cache: Path = Path("runs/late-ascent")
    """Folder for checkpoints."""

    def run(self) -> None:
        """Train stage by stage."""
        deadline = time.monotonic() + 60 * self.minutes
        tuning = [(method, seed) for method in METHODS for seed in TUNING_SEEDS]
        bases = [choice.base_arm(base) for base in BASES]
        self._train([(Unit(TUNED_ON, *pair, "bases"), bases, RECIPE) for pair in tuning], deadline)
        base = {method: choice.chosen_base(method) for method in METHODS}
        for trials in (lambda method: _first_trials(), _all_trials):
            units = [
                (Unit(TUNED_ON, method, seed), [BASE, *trials(method)], base[method])
                for method, seed in tuning
            ]
            self._train(units, deadline)
        for method in METHODS:
            print(method, choice.tuning_table(method)["chosen"])
        for setup in (SETUPS[name] for name in self.setups):
            units = [
                (Unit(setup.name, method, seed), reported_arms(method, setup.name), base[method])
                for seed in range(setup.seeds)
                for method in METHODS
            ]
            self._train(units, deadline)
            self._report()

    def _report(self) -> None:
        """Write and print what the complete setups say."""
        results = summary()
        write_text(FOLDER / "summary.json", json.dumps(results, indent=1) + "\n")
        for name, table in results["setups"].items():
            primary, chosen = table["primary"], table["chosen"]
            print(
                f"{name}: {chosen['sam']} minus {chosen['sgd']}, balanced accuracy after tau: "
                f"{primary['mean']:+.2f} +- {primary['half_width']:.2f} points, {primary['verdict']}"
            )

    def _train(self, work: Sequence[tuple[Unit, Sequence[Arm], Values]], deadline: float) -> None:
        """Train units in processes of their own; torch's threads do not survive a fork."""
        missing = [
            (unit, arms, base)
            for unit, arms, base in work
            if {arm.name for arm in arms} - unit.records().keys()
        ]
        with ProcessPoolExecutor(self.jobs, mp_context=get_context("spawn")) as pool:
            futures = [pool.submit(_train_unit, *each, self.cache, deadline) for each in missing]
            for future in as_completed(futures):
                future.result()
        left = [
            unit.path.name
            for unit, arms, _ in missing
            if {arm.name for arm in arms} - unit.records().keys()
        ]
        if left:
            raise SystemExit(f"{len(left)} seeds are left; the same command goes on")


def _train_unit(
    unit: Unit, arms: Sequence[Arm], base: Values, cache: Path, deadline: float
) -> None:
    if time.monotonic() < deadline:
        unit.train(list(arms), base, cache)


def _first_trials() -> list[Arm]:
    return [*SGD_TRIALS, *SAM_TRIALS]


def _all_trials(method: str) -> list[Arm]:
    return [arm for arms in choice.families(method).values() for arm in arms]


def reported_arms(method: str, setup: str) -> list[Arm]:
    """Return the arms that are reported, the base first."""
    few = choice.chosen_late(method, "by tau, few")
    winners = choice.chosen_late(method)
    sgd, sam = winners["sgd"], winners["sam"]
    arms = [
        BASE,
        Arm("sgd recipe", settings=tuple(RECIPE.items()), branched=False),
        sgd,
        sam,
        *few.values(),
        choice.recipe_sam(method),
        Arm(f"{sgd.name}, twice as long", factor=sgd.factor, decay=sgd.decay, late=2),
        Arm(f"{sgd.name}, other order", factor=sgd.factor, decay=sgd.decay, seed=1000),
        *(_with(sam, name, values) for name, values in _CHEAPER.items()),
    ]
    if setup != "fashion-5000" or method == "ce-drw":
        arms += [
            Arm(f"sam rho {rho:g}", "sam", settings=(("rho", (rho,)),), branched=False)
            for rho in RADII
        ]
    return list({arm.name: arm for arm in arms}.values())


_CHEAPER: dict[str, Values] = {
    "uniform quarter": {"ascent_share": 0.25},
    "weighted quarter": {"ascent_share": 0.25, "ascent_sample": "weighted"},
    "every 2nd step": {"ascent_interval": 2},
}


def _with(arm: Arm, name: str, values: Values) -> Arm:
    return Arm(
        f"{arm.name}, {name}",
        arm.optimizer,
        arm.factor,
        arm.decay,
        (*arm.settings, *values.items()),
    )
