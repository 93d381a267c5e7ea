"""The command: train the runs without a record, choose settings, and report."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from benchmarks.late_ascent import choice
from benchmarks.late_ascent.arms import BASE, Tier, arms_of, stage_of, tuned_on
from benchmarks.late_ascent.curvature import measure_curvature, spectra_path
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
from benchmarks.processes import in_processes
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
    ("fashion-5000", "primary"),
    ("fashion-600", "throughout"),
    ("noise-40", "primary"),
    ("noise-40", "throughout"),
    ("noise-20", "primary"),
    ("noise-20", "throughout"),
    ("wide", "primary"),
    ("wide", "throughout"),
    ("fashion-600", "curvature"),
    ("fashion-600", "branches"),
    ("fashion-5000", "branches"),
    ("fashion-5000", "throughout"),
    ("cifar10-4900", "primary"),
    ("cifar10-4900", "branches"),
    ("cifar10-4900", "throughout"),
)
"""Order of training: primary comparisons first, expensive controls last."""


@dataclass(frozen=True)
class LateAscent:
    """Compare SAM and SGD after the deferral, both at a tuned late learning rate, by balanced accuracy.

    Learning rate and weight decay of the first phase are chosen with SGD. After the deferral, two families of
    eight trials branch off, SGD and SAM. In each family, the trial with the best validation accuracy on two
    tuning seeds is chosen; these seeds are not reported. Records of finished runs are written to
    benchmarks/results/late-ascent/, from which an interrupted command is resumed.
    """

    setups: tuple[str, ...] = tuple(name for name, setup in SETUPS.items() if not setup.gpu)
    """Setups to train. Settings are always chosen on fashion-600. cifar10-4900 requires a GPU and CIFAR-10 in
    data/."""
    tiers: tuple[Tier, ...] = get_args(Tier)
    """Arms to train: the primary comparison, controls that share its early phase, controls from scratch, and
    the arms whose curvature is measured."""
    jobs: int = 2
    """Number of concurrent runs, with one thread each."""
    minutes: float = float("inf")
    """Start no seed after this many minutes."""
    cache: Path = Path("runs/late-ascent")
    """Folder for checkpoints."""

    def run(self) -> None:
        """Choose settings, train all arms, and report after each tier."""
        deadline = time.monotonic() + 60 * self.minutes
        base = self._choose(deadline)
        self._report()
        for setup, tier in ORDER:
            if setup not in self.setups or tier not in self.tiers:
                continue
            if (trials := tuned_on(setup)) is not None:
                self._choose_own(trials, deadline)
            work = [
                _Work(
                    Unit(setup, method, seed, stage_of(setup, tier)),
                    arms_of(setup, method, tier),
                    base.get(method, RECIPE),
                )
                for method in SETUPS[setup].methods
                for seed in range(SETUPS[setup].seeds)
            ]
            if tier == "curvature":
                self._measure(work, deadline)
            else:
                self._train(work, deadline)
            self._report()

    def _choose(self, deadline: float) -> dict[str, Values]:
        """Train the tuning seeds, and return the chosen base of each method."""
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
        """Train the tuning seeds of a setup with its own trials."""
        trials = [arm for arms in OWN_TRIALS[setup].values() for arm in arms]
        work = [
            _Work(Unit(setup, method, seed), trials, RECIPE)
            for method in SETUPS[setup].methods
            for seed in TUNING_SEEDS
        ]
        self._train(work, deadline)
        print(setup, choice.own_tuning_table(setup)["chosen"], flush=True)

    def _report(self) -> None:
        """Write the summary of all complete setups, and print their primary comparisons."""
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
        """Train the units that have no record."""
        missing = [each for each in work if each.is_missing()]
        in_processes(_train_unit, [(each, self.cache, deadline) for each in missing], self.jobs)
        left = [each.unit.path.name for each in missing if each.is_missing()]
        if left:
            raise SystemExit(f"{len(left)} seeds are left; repeat the command to resume")

    def _measure(self, work: Sequence[_Work], deadline: float) -> None:
        """Train the units without spectra, and measure the curvature of their networks."""
        missing = [each for each in work if not spectra_path(each.unit).is_file()]
        in_processes(_measure_unit, [(each, self.cache, deadline) for each in missing], self.jobs)


@dataclass(frozen=True)
class _Work:
    """A unit, its arms, and learning rate and weight decay of the phase that they share."""

    unit: Unit
    arms: Sequence[Arm]
    base: Values

    def is_missing(self) -> bool:
        """Return whether an arm has no record."""
        return bool({arm.name for arm in self.arms} - self.unit.records().keys())


def _train_unit(work: _Work, cache: Path, deadline: float) -> None:
    if time.monotonic() < deadline:
        work.unit.train(list(work.arms), work.base, cache)


def _measure_unit(work: _Work, cache: Path, deadline: float) -> None:
    if time.monotonic() < deadline:
        unit = work.unit
        unit.train(list(work.arms), work.base, cache, networks=True)
        measure_curvature(SETUPS[unit.setup], unit, choice.chosen_late(unit.method), cache)


def _first_trials(method: str) -> list[Arm]:
    return [*SGD_TRIALS, *SAM_TRIALS]


def _all_trials(method: str) -> list[Arm]:
    return [arm for arms in choice.families(method).values() for arm in arms]
