"""The runs of a grid: every combination of values of some settings, with several seeds."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from fastsam.longtail.config import applies, check_applies, chosen_parts, find_setting
from fastsam.longtail.differences import identity
from fastsam.longtail.errors import UsageError
from fastsam.longtail.recipes import Recipe, recipe
from fastsam.longtail.settings import value_text
from fastsam.longtail.sweeps.plan import PlannedRun, check_stored_settings, stored_runs
from fastsam.longtail.sweeps.run import Execution, RunOutcome, run_plan
from fastsam.longtail.training.run_folder import PLAN_FILE

NAMES = ("data", "method", "optimizer")
"""The settings that select a recipe."""
MOST_SEEDS = 1000
_UNSAFE = re.compile(r"[^\w.,=+:-]")


@dataclass(frozen=True)
class GridPlan:
    """The runs of a grid.

    Attributes:
        runs: the runs; those that differ only in the seed follow each other.
        notes: which settings some combinations do not have, as sentences.
        varied: names of the settings in which the combinations differ.
    """

    runs: list[PlannedRun]
    notes: list[str]
    varied: frozenset[str] = frozenset()

    def check(self, out: str | Path) -> None:
        """Check that the plan in a folder has none of these runs under another name or with other settings.

        Settings that only determine where a run is executed do not count, unless the grid varies them.

        Raises:
            UsageError: if it has one under another name, because the settings in the grid are not those of
                an earlier command.
            CheckpointError: if a run of the same name has other settings.
            DataError: if the stored plan is damaged.
        """
        stored = stored_runs(out)
        check_stored_settings(stored, self.runs, out)
        known = {self._key(each["settings"]): name for name, each in stored.items()}
        for run in self.runs:
            name = known.get(self._key(run.config.as_dict()), run.name)
            if name != run.name and run.name not in stored:
                raise UsageError(
                    f"{Path(out) / PLAN_FILE} has the run {run.name} under the name {name}; vary the same "
                    "settings as before, or choose another --out"
                )

    def _key(self, settings: Mapping[str, Any]) -> str:
        """Return a text that two runs share if they are the same."""
        return json.dumps(identity(settings, varied=self.varied), sort_keys=True)


def sweep(
    out: str | Path,
    *,
    grid: Mapping[str, Sequence[Any]],
    seeds: int = 1,
    execution: Execution = Execution(),  # noqa: B008 (frozen)
    **settings: Any,
) -> list[RunOutcome]:
    """Train every combination of values of some settings, each with several seeds.

    Each run is trained by a process of its own, which sees the parts of fastsam and of installed plug-ins.
    Runs that are finished are loaded and interrupted ones are resumed, so the same call continues a sweep.
    A failed run does not stop the others.

    Args:
        out: folder of the sweep. A run is in ``out/NAME=VALUE,.../seed-K``.
        grid: values by name of setting. If a combination does not have a setting (``rho`` with ``sgd``), it
            is trained once without it.
        seeds: number of seeds of the training; they are 0, 1, ...
        execution: number of runs at a time, executor, and part of the plan.
        **settings: values that all runs share. ``data``, ``method`` and ``optimizer`` must be here or in
            ``grid``.

    Returns:
        What became of each run, in the order in which they ended.

    Raises:
        UsageError: if a setting or a value is not valid, or ``out`` has a run of the grid under another
            name; before anything is trained.
        CheckpointError: if ``out`` has runs of the same names with other settings; before anything is
            trained.
        Stopped: if a signal stopped the sweep.

    Example:
        >>> fixed = {"data": "digits-lt", "method": "ce", "epochs": 20}
        >>> grid = {"optimizer": ("sgd", "sam"), "rho": (0.05, 0.1)}
        >>> outcomes = sweep("runs/rho", grid=grid, execution=Execution(jobs=2), **fixed)  # doctest: +SKIP
        >>> for run in plan_grid(grid, fixed).runs:
        ...     print(run.name)
        optimizer=sgd/seed-0
        optimizer=sam,rho=0.05/seed-0
        optimizer=sam,rho=0.1/seed-0
    """
    plan = plan_grid(grid, settings, seeds=seeds)
    plan.check(out)
    return list(run_plan(plan.runs, out, execution))


def plan_grid(
    grid: Mapping[str, Sequence[Any]], settings: Mapping[str, Any], *, seeds: int = 1
) -> GridPlan:
    """Plan every combination of values, and check the settings of every run.

    Args:
        grid: values by name of setting.
        settings: values that all runs share, by name.
        seeds: number of seeds of each combination.

    Raises:
        UsageError: if a setting or a value is not valid, no combination has a setting, or a name is missing.
    """
    for name, values in grid.items():
        find_setting(name)  # raises: unknown
        if name in settings:
            raise UsageError(f"{name} is both in the grid and fixed; pass one of them")
        if not values:
            raise UsageError(f"the grid has no values of {name}; pass at least one")
        if len(set(map(value_text, values))) < len(values):
            raise UsageError(f"the grid has a value of {name} twice; give each value once")
    # An order that does not depend on that of the options, so that names of folders do not either.
    order = sorted(
        grid, key=lambda name: (name not in NAMES, NAMES.index(name) if name in NAMES else 0, name)
    )
    combinations = (
        dict(zip(order, values, strict=True)) for values in product(*(grid[n] for n in order))
    )
    return plan_combinations(
        ((None, combination) for combination in combinations), settings, seeds=seeds
    )


def plan_combinations(
    combinations: Iterable[tuple[str | None, Mapping[str, Any]]],
    settings: Mapping[str, Any],
    *,
    seeds: int = 1,
) -> GridPlan:
    """Plan runs that differ in some settings; see :func:`plan_grid`.

    Args:
        combinations: name and settings of each; None for a name made of the settings that the run has.
        settings: values that all runs share, by name.
        seeds: number of seeds of each combination.
    """
    if not 1 <= seeds <= MOST_SEEDS:
        raise UsageError(f"seeds must be at least 1 and at most {MOST_SEEDS}, got {seeds}")
    if "seed" in settings:
        raise UsageError("a sweep sets seed itself; pass the number of seeds")
    groups: dict[str, _Combination] = {}
    unused = _Unused()
    every: set[str] = set()
    for name, varied in combinations:
        every.update(varied)
        if "seed" in varied:
            raise UsageError("seed cannot be varied like other settings; pass the number of seeds")
        one = _Combination.of({**settings, **varied}, unused)
        if name is None:
            name = run_name({key: value for key, value in varied.items() if key in one.given})
        if name in groups and groups[name].given != one.given:
            raise UsageError(f"two combinations have the name {name!r:.80}; give each value once")
        groups[name] = one
    return GridPlan(
        [run for name, one in groups.items() for run in _seeded(name, one.recipe, seeds)],
        unused.notes(),
        frozenset(every),
    )


def run_name(varied: Mapping[str, Any]) -> str:
    """Return the folder of runs with these settings, without the seed; empty for no settings.

    Example:
        >>> run_name({"optimizer": "sam", "rho": (0.05, 0.5)})
        'optimizer=sam,rho=0.05-0.5'
    """
    text = ",".join(f"{name}={value_text(value)}" for name, value in varied.items())
    return _UNSAFE.sub("_", text)


def _seeded(name: str, chosen: Recipe, seeds: int) -> Iterator[PlannedRun]:
    for seed in range(seeds):
        full = f"{name}/seed-{seed}" if name else f"seed-{seed}"
        yield PlannedRun.of(full, chosen.override(seed=seed))


@dataclass
class _Unused:
    """Settings that some combinations do not have.

    Attributes:
        used: settings that at least one combination has.
        reasons: for each other setting, why combinations do not have it.
    """

    used: set[str] = field(default_factory=set)
    reasons: dict[str, dict[str, None]] = field(default_factory=dict)

    def notes(self) -> list[str]:
        """Describe the settings that only some combinations have.

        Raises:
            UsageError: if no combination has a setting.
        """
        for name, reasons in self.reasons.items():
            if name not in self.used:
                raise UsageError(next(iter(reasons)))
        return [
            f"{reason}: such runs are planned once, without {name}"
            for name, reasons in self.reasons.items()
            for reason in reasons
        ]


@dataclass(frozen=True)
class _Combination:
    """A recipe, and the settings that were given for it and that it has."""

    recipe: Recipe
    given: dict[str, Any]

    @classmethod
    def of(cls, values: Mapping[str, Any], unused: _Unused) -> _Combination:
        """Create the recipe from the given settings that its parts have."""
        for name in NAMES:
            if values.get(name) is None:
                raise UsageError(f"{name} is missing; pass --{name} NAME, in Python {name}=NAME")
        given = {name: values[name] for name in NAMES}
        rest = {name: value for name, value in values.items() if name not in NAMES}
        # Settings that select parts come first: they decide which other settings there are.
        while True:
            chosen = chosen_parts(_flat(given))
            more = {name for name in rest if _selects(name) and applies(name, chosen)}
            if not more:
                break
            given |= {name: rest.pop(name) for name in more}
        for name, value in rest.items():
            if applies(name, chosen):
                given[name] = value
        for name in values:
            if name in given:
                unused.used.add(name)
                continue
            try:
                check_applies(name, chosen)
            except UsageError as error:
                unused.reasons.setdefault(name, {})[str(error)] = None
        return cls(recipe(**given), given)


def _flat(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a recipe by name, with its data set, method and optimizer."""
    chosen = recipe(**given)
    names = {name: given[name] for name in NAMES}
    return names | {name: entry.value for name, entry in chosen.entries.items()}


def _selects(name: str) -> bool:
    """Return whether a setting selects a part of a run by name."""
    return find_setting(name)[0].metadata["names"] is not None
