"""Tuning: draw all trials, train them as a sweep, and choose one by its accuracy on validation images."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastsam import files
from fastsam.files import write_text
from fastsam.longtail.config import TrainConfig, find_setting
from fastsam.longtail.data import LongTailData
from fastsam.longtail.errors import DataError, TrainingError, UsageError
from fastsam.longtail.results import Result
from fastsam.longtail.sweeps import (
    Execution,
    PlannedRun,
    RunOutcome,
    SweepTask,
    check_outcomes,
    plan_combinations,
    run_plan,
    stored_result,
)
from fastsam.longtail.training.run_folder import TUNING_FILE
from fastsam.longtail.tuning.samplers import TRIAL_SAMPLERS
from fastsam.longtail.tuning.space import Choices, Dimension
from fastsam.records import build

MOST_TRIALS = 10_000
RULE = "highest balanced accuracy on validation images, of equal ones the first"
_DIVERGED = TrainingError.__name__


@dataclass(frozen=True)
class Trial:
    """A trial and its scores.

    Attributes:
        name: folder of its runs below that of the tuning.
        settings: values of the settings that were searched and that its runs have.
        balanced: balanced accuracy on validation images of each seed, in percent; empty if a run is not
            finished.
        error: why a run failed; empty if none did.
    """

    name: str
    settings: dict[str, Any]
    balanced: list[float]
    error: str = ""

    @property
    def score(self) -> float | None:
        """Mean of the balanced accuracies; None without any."""
        return statistics.mean(self.balanced) if self.balanced else None

    @property
    def ended(self) -> bool:
        """Whether the trial counts: it is finished, or its loss or weights became infinite or NaN."""
        return bool(self.balanced) or self.error.startswith(_DIVERGED)


@dataclass(frozen=True)
class Tuning:
    """The scores of all trials, on validation images alone.

    Attributes:
        search: search space of each setting, as text.
        sampler: name of the sampler.
        search_seed: seed of the trials.
        fixed: settings that all trials share.
        trials: the trials, in the order in which they were drawn.
        chosen: name of the chosen trial; None until every trial has ended, and if all failed.
        rule: how it was chosen.
    """

    search: dict[str, str]
    sampler: str
    search_seed: int
    fixed: dict[str, Any]
    trials: list[Trial]
    chosen: str | None
    rule: str = RULE

    @property
    def best(self) -> Trial | None:
        """The chosen trial; None without one."""
        return next((trial for trial in self.trials if trial.name == self.chosen), None)

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the chosen trial by name, for :func:`fastsam.longtail.recipe`.

        Raises:
            TrainingError: if no trial is chosen.
        """
        if self.best is None:
            raise TrainingError("no trial is chosen, because trials are not finished or all failed")
        return {**self.fixed, **self.best.settings}

    def save(self, out: str | Path) -> None:
        """Write ``tuning.json`` to a folder, atomically and with a checksum."""
        write_text(Path(out) / TUNING_FILE, files.to_json(asdict(self)))

    @classmethod
    def load(cls, out: str | Path) -> Tuning:
        """Load the ``tuning.json`` of a folder.

        Raises:
            DataError: if it was not written by :meth:`save`, or was damaged or edited.
        """
        path = Path(out) / TUNING_FILE
        try:
            return build(cls, files.from_json(path.read_text("utf-8")))
        except ValueError as error:
            raise DataError(f"{path}: {error}") from error


@dataclass(frozen=True)
class TuningPlan:
    """The trials of a tuning, drawn before any of them starts.

    Attributes:
        runs: the runs of all trials.
        drawn: searched settings of each trial, by its name.
        notes: which settings some trials do not have, and which repeat an earlier one, as sentences.
        empty: the tuning without its trials.
    """

    runs: list[PlannedRun]
    drawn: dict[str, dict[str, Any]]
    notes: list[str]
    empty: Tuning

    def execute(
        self,
        out: str | Path,
        execution: Execution = Execution(),  # noqa: B008 (frozen)
    ) -> Iterator[RunOutcome]:
        """Train the trials; see :func:`fastsam.longtail.sweeps.run_plan`.

        Raises:
            UsageError: also if a data set has no validation images, before anything is trained.
        """

        def diverged(run: PlannedRun) -> str:
            error = SweepTask.of(run, out).error()
            return error if error.startswith(_DIVERGED) else ""

        yield from run_plan(
            self.runs, out, execution, check=check_validation, failed_before=diverged
        )

    def judge(self, out: str | Path) -> Tuning:
        """Read the scores of the trials, choose one if all have ended, and write ``tuning.json``.

        Only validation scores are read.
        """
        trials = [self._judged(name, Path(out)) for name in self.drawn]
        scored = [trial for trial in trials if trial.score is not None]
        chosen = None
        if scored and all(trial.ended for trial in trials):
            chosen = max(scored, key=lambda trial: trial.score or 0.0).name
        tuning = Tuning(**{**vars(self.empty), "trials": trials, "chosen": chosen})
        tuning.save(out)
        return tuning

    def _judged(self, name: str, out: Path) -> Trial:
        runs = [run for run in self.runs if run.group == name]
        results = [stored_result(run, out, quiet=True) for run in runs]
        scores = [_balanced(result) for result in results if result is not None]
        if len(scores) == len(runs):
            return Trial(name, self.drawn[name], scores)
        errors = [
            SweepTask.of(run, out).error()
            for run, result in zip(runs, results, strict=True)
            if result is None
        ]
        return Trial(name, self.drawn[name], [], next(filter(None, errors), ""))


def tune(
    out: str | Path,
    *,
    search: Mapping[str, Dimension | Sequence[Any]],
    trials: int,
    search_seed: int = 0,
    sampler: str = "random",
    seeds: int = 1,
    execution: Execution = Execution(),  # noqa: B008 (frozen)
    **settings: Any,
) -> Tuning:
    """Draw trials, train them, and choose the one with the highest balanced accuracy on validation images.

    All trials are drawn before the first one starts, so they depend on nothing but the search space and the
    seed. The choice reads no test score. As in :func:`fastsam.longtail.sweep`, the same call continues, and
    more trials can be added. A trial whose loss or weights become infinite or NaN counts as a trial without
    score.

    Args:
        out: folder of the trials. A run is in ``out/trial-NNN/seed-K``.
        search: values by name of setting: a list, :class:`Choices` or an :class:`Interval`.
        trials: number of trials.
        search_seed: seed of the draws.
        sampler: one of :data:`TRIAL_SAMPLERS`: ``random`` or ``optuna``.
        seeds: number of seeds of each trial, whose scores are averaged; they are 0, 1, ...
        execution: number of runs at a time, executor, and part of the plan.
        **settings: values that all trials share.

    Returns:
        The scores of all trials, which are also in ``out/tuning.json``.

    Raises:
        UsageError: if a setting or a value is not valid, or the data set has no validation images; before
            anything is trained.
        TrainingError: if a trial failed for another reason than infinite or NaN numbers, or all failed.
        Stopped: if a signal stopped the trials.

    Example:
        >>> from fastsam.longtail import Interval
        >>> fixed = {"data": "digits-lt", "method": "ce", "optimizer": "sgd"}
        >>> search = {"lr": Interval(0.01, 1.0, log=True), "weight_decay": [0.0, 5e-4]}
        >>> tuning = tune("runs/tune", search=search, trials=2, **fixed)  # doctest: +SKIP
        >>> for name, drawn in plan_trials(search, fixed, trials=2).drawn.items():
        ...     print(name, drawn)
        trial-000 {'lr': 0.1879, 'weight_decay': 0.0}
        trial-001 {'lr': 0.01208, 'weight_decay': 0.0}
    """
    plan = plan_trials(
        search, settings, trials=trials, search_seed=search_seed, sampler=sampler, seeds=seeds
    )
    outcomes = list(plan.execute(out, execution))
    tuning = plan.judge(out)
    check_trials(tuning, outcomes)
    return tuning


def plan_trials(
    search: Mapping[str, Dimension | Sequence[Any]],
    settings: Mapping[str, Any],
    *,
    trials: int,
    search_seed: int = 0,
    sampler: str = "random",
    seeds: int = 1,
) -> TuningPlan:
    """Draw trials and check the settings of each; see :func:`tune`.

    Raises:
        UsageError: if a setting or a value is not valid, or a setting is both searched and fixed.
        ImportError: if the sampler needs a package that is not installed.
    """
    if not 1 <= trials <= MOST_TRIALS:
        raise UsageError(f"trials must be at least 1 and at most {MOST_TRIALS}, got {trials}")
    if not 0 <= search_seed < 2**32:
        raise UsageError(f"search_seed must be at least 0 and below 2**32, got {search_seed}")
    if not search:
        raise UsageError(
            "tuning requires a setting to search; pass for instance --search lr=log:0.01:1"
        )
    for name in search:
        find_setting(name)  # raises: unknown
        if name in settings:
            raise UsageError(f"{name} is both searched and fixed; pass one of them")
    space = {
        name: Choices(values) if isinstance(values, Sequence) else values
        for name, values in sorted(search.items())
    }
    points = TRIAL_SAMPLERS[sampler].build(trials, len(space), search_seed)
    drawn = {
        f"trial-{number:03d}": {
            name: dimension.value(float(place))
            for (name, dimension), place in zip(space.items(), point, strict=True)
        }
        for number, point in enumerate(points)
    }
    plan = plan_combinations(drawn.items(), settings, seeds=seeds)
    repeats = _repeats(plan.runs)
    runs = [run for run in plan.runs if run.group not in repeats]
    notes = [
        f"{name} has the settings of {first}: it is trained once" for name, first in repeats.items()
    ]
    configs = {run.group: run.config for run in runs}
    _check_comparable(space, settings, configs.values())
    kept = {
        name: {key: value for key, value in drawn[name].items() if key in config.flat()}
        for name, config in configs.items()
    }
    empty = Tuning(
        {name: str(dimension) for name, dimension in space.items()},
        sampler,
        search_seed,
        dict(settings),
        [],
        None,
    )
    return TuningPlan(runs, kept, [*plan.notes, *notes], empty)


def _check_comparable(
    space: Iterable[str], fixed: Iterable[str], configs: Collection[TrainConfig]
) -> None:
    """Raise :class:`UsageError` unless all trials have the same data and fixed settings."""
    for name in space:
        if name == "data" or any(
            name in config.parts["data"].__dataclass_fields__ for config in configs
        ):
            raise UsageError(
                f"{name} determines the images, so scores of its values cannot be compared; tune once for "
                "each value"
            )
    for name in fixed:
        if not all(name in config.flat() for config in configs):
            raise UsageError(
                f"{name} does not apply to every trial; search it, also with one value, and it is used where "
                "it applies"
            )


def check_validation(run: PlannedRun, data: LongTailData) -> None:
    """Raise :class:`UsageError` if the data set of a trial has no validation images."""
    if data.validation is not None:
        return
    remedy = "add validation images to it"
    if "validation_per_class" in run.config.flat():
        remedy = "hold some out with validation_per_class, for instance 25"
    raise UsageError(
        f"tuning chooses on validation images, but {run.config.data} has none; {remedy}"
    )


def check_trials(tuning: Tuning, outcomes: Sequence[RunOutcome]) -> None:
    """Raise an error if a run of a tuning is not finished for another reason than infinite or NaN numbers.

    Raises:
        TrainingError: if a run failed for another reason, or no trial has a score.
        Stopped: if a run was stopped by a signal.
    """
    check_outcomes([each for each in outcomes if not each.error.startswith(_DIVERGED)])
    if tuning.chosen is None and all(trial.ended for trial in tuning.trials):
        raise TrainingError(
            f"all {len(tuning.trials)} trials failed: {tuning.trials[0].error}. Search smaller values"
        )


def _repeats(runs: Sequence[PlannedRun]) -> dict[str, str]:
    """Return the first trial with the same settings, for each trial that repeats one."""
    first: dict[str, str] = {}
    found: dict[str, str] = {}
    for run in runs:
        known = first.setdefault(files.to_json(run.config.as_dict()), run.group)
        if known != run.group:
            found[run.group] = known
    return found


def _balanced(result: Result) -> float:
    """Return the balanced accuracy on validation images."""
    if result.validation is None:
        raise DataError("a trial has no validation scores; choose another --out")
    return result.validation.balanced
