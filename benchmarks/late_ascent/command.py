"""The command: train whatever has no record yet, choose, and report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from benchmarks.late_ascent import choice
from benchmarks.late_ascent.arms import BASE, Tier, arms_of
from benchmarks.late_ascent.curvature import measure_curvature
from benchmarks.late_ascent.plan import (
    BASES,
    METHODS,
    OWN_TRIALS,
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

ORDER: tuple[tuple[str, Tier], ...] = (
    ("fashion-600", "primary"),
    ("digits", "primary"),
    ("digits", "branches"),
    ("digits", "throughout"),
    ("digits-noise-40", "primary"),
    ("digits-noise-40", "throughout"),
    ("balanced-noise-40", "primary"),
    ("balanced-noise-40", "throughout"),
    ("fashion-600", "branches"),
    ("fashion-5000", "primary"),
    ("fashion-600", "throughout"),
    ("noise-40", "primary"),
    ("noise-40", "throughout"),
    ("noise-20", "primary"),
    ("noise-20", "throughout"),
    ("wide", "primary"),
    ("wide", "throughout"),
    ("fashion-5000", "branches"),
    ("fashion-5000", "throughout"),
    ("cifar10-4900", "primary"),
    ("cifar10-4900", "branches"),
    ("cifar10-4900", "throughout"),
)
"""What is trained first answers the question; controls that cost more than they say come last."""


@dataclass(frozen=True)
class LateAscent:
    """At a tuned late learning rate, does SAM after the deferral beat SGD in balanced accuracy?

    SGD alone chooses learning rate and weight decay. Two families of eight trials continue it after the
    deferral, SGD and SAM, and each is chosen by its validation accuracy on two seeds that are not reported.
    Every finished run has its record in benchmarks/results/late-ascent/: an interrupted command goes on
    from there.
    """

    setups: tuple[str, ...] = tuple(name for name, setup in SETUPS.items() if not setup.gpu)
    """Which setups to train; settings are chosen on fashion-600 in any case. cifar10-4900 needs a GPU, and
    CIFAR-10's archive in data/."""
    jobs: int = 2
    """Trainings at the same time, one thread each."""
    minutes: float = float("inf")
    """Begin no seed after this long."""
    cache: Path = Path("runs/late-ascent")
    """Folder for checkpoints."""

    def run(self) -> None:
        """Train stage by stage."""
        deadline = time.monotonic() + 60 * self.minutes
        base = self._choose(deadline)
        for setup, tier in ORDER:
            if setup not in self.setups:
                continue
            if setup in OWN_TRIALS:
                self._choose_own(setup, deadline)
            work = [
                _Work(Unit(setup, method, seed), arms_of(setup, method, tier), base.get(method, {}))
                for seed in range(SETUPS[setup].seeds)
                for method in SETUPS[setup].methods
            ]
            self._train(work, deadline)
            if (setup, tier) == (TUNED_ON, "primary"):
                self._measure([each.unit for each in work], deadline)
            self._report()

    def _choose(self, deadline: float) -> dict[str, Values]:
        """Train the tuning seeds; return the chosen base of each method."""
        tuning = [(method, seed) for method in METHODS for seed in TUNING_SEEDS]
        bases = [choice.base_arm(base) for base in BASES]
        self._train(
            [_Work(Unit(TUNED_ON, *pair, "bases"), bases, RECIPE) for pair in tuning], deadline
        )
        base = {method: choice.chosen_base(method) for method in METHODS}
        for trials in (_first_trials, _all_trials):
            self._train(
                [
                    _Work(Unit(TUNED_ON, method, seed), [BASE, *trials(method)], base[method])
                    for method, seed in tuning
                ],
                deadline,
            )
        for method in METHODS:
            print(method, choice.tuning_table(method)["chosen"], flush=True)
        return base

    def _choose_own(self, setup: str, deadline: float) -> None:
        """Train the tuning seeds of a setup that has trials of its own."""
        trials = [arm for arms in OWN_TRIALS[setup].values() for arm in arms]
        work = [
            _Work(Unit(setup, method, seed), trials, {})
            for method in SETUPS[setup].methods
            for seed in TUNING_SEEDS
        ]
        self._train(work, deadline)
        print(setup, choice.own_tuning_table(setup)["chosen"], flush=True)

    def _report(self) -> None:
        """Write and print what the complete setups say."""
        results = summary()
        write_text(FOLDER / "summary.json", json.dumps(results, indent=1) + "\n")
        for name, table in results["setups"].items():
            primary, chosen = table["primary"], table["chosen"]
            print(
                f"{name}: {chosen['sam']} minus {chosen['sgd']}, balanced accuracy after tau: "
                f"{primary['mean']:+.2f} +- {primary['half_width']:.2f} points, {primary['verdict']}",
                flush=True,
            )

    def _train(self, work: Sequence[_Work], deadline: float) -> None:
        """Train what has no record."""
        missing = [each for each in work if each.is_missing()]
        self._in_processes(_train_unit, [(each, self.cache, deadline) for each in missing])
        left = [each.unit.path.name for each in missing if each.is_missing()]
        if left:
            raise SystemExit(f"{len(left)} seeds are left; the same command goes on")

    def _measure(self, units: Sequence[Unit], deadline: float) -> None:
        """Measure the curvature of units whose networks are there."""
        self._in_processes(_measure_unit, [(unit, self.cache, deadline) for unit in units])

    def _in_processes(self, task: Callable[..., None], items: Iterable[tuple[object, ...]]) -> None:
        """Run tasks in processes of their own; torch's threads do not survive a fork."""
        with ProcessPoolExecutor(self.jobs, mp_context=get_context("spawn")) as pool:
            futures = [pool.submit(task, *item) for item in items]
            for future in as_completed(futures):
                future.result()


@dataclass(frozen=True)
class _Work:
    """A unit, the arms to train, and learning rate and weight decay of the phase that they share."""

    unit: Unit
    arms: Sequence[Arm]
    base: Values

    def is_missing(self) -> bool:
        """Whether an arm has no record."""
        return bool({arm.name for arm in self.arms} - self.unit.records().keys())


def _train_unit(work: _Work, cache: Path, deadline: float) -> None:
    if time.monotonic() < deadline:
        work.unit.train(list(work.arms), work.base, cache)


def _measure_unit(unit: Unit, cache: Path, deadline: float) -> None:
    if time.monotonic() < deadline:
        winners = choice.chosen_late(unit.method)
        names = {name: arm.name for name, arm in winners.items()}
        measure_curvature(SETUPS[unit.setup], unit, names, cache)


def _first_trials(method: str) -> list[Arm]:
    return [*SGD_TRIALS, *SAM_TRIALS]


def _all_trials(method: str) -> list[Arm]:
    return [arm for arms in choice.families(method).values() for arm in arms]
