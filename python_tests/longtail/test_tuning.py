"""Tuning: trials depend on the seed alone, and validation images choose."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastsam.cli import main
from fastsam.cli.execution import as_options, parse_search
from fastsam.cli.main import parse
from fastsam.files import write_text
from fastsam.longtail import Trainer, recipe
from fastsam.longtail.errors import DataError, TrainingError, UsageError
from fastsam.longtail.metrics import Metrics
from fastsam.longtail.results import Result
from fastsam.longtail.sweeps import (
    EXECUTORS,
    Execution,
    ExecutorPart,
    PlannedRun,
    SweepTask,
    TaskExit,
    register_executor,
)
from fastsam.longtail.tuning import (
    TRIAL_SAMPLERS,
    TUNING_FILE,
    Choices,
    Interval,
    Tuning,
    TuningPlan,
    check_trials,
    plan_trials,
    tune,
)
from fastsam.rank_errors import write_error

TINY = {"data": "digits-lt", "method": "ce", "optimizer": "sgd", "epochs": 1, "batch_size": 138}
SEARCH = {"lr": Interval(0.01, 1.0, log=True), "weight_decay": [0.0, 5e-4]}
Score = Callable[[PlannedRun], float | None]


@pytest.fixture(scope="module")
def trained() -> Result:
    """Train one run, whose result stands for those of others."""
    return Trainer(recipe(**TINY).config(), progress=False).fit()


def finish(plan: TuningPlan, out: Path, trained: Result, balanced: Score) -> None:
    """Write results with these balanced accuracies on validation images; those on test images oppose them."""
    for run in plan.runs:
        score = balanced(run)
        if score is None:
            continue
        result = replace(
            trained,
            config=run.config.as_dict(),
            validation=replace(trained.validation, balanced=score),
            test=replace(trained.test, balanced=100 - score, accuracy=100 - score),
        )
        write_text(out / run.name / "result.json", result.to_json())


def test_trials_depend_on_the_search_seed_alone() -> None:
    first = plan_trials(SEARCH, TINY, trials=5, search_seed=3)
    again = plan_trials(dict(reversed(SEARCH.items())), TINY, trials=5, search_seed=3)
    assert first == again
    more = plan_trials(SEARCH, TINY, trials=8, search_seed=3)
    assert more.runs[:5] == first.runs
    assert list(more.drawn)[5:] == ["trial-005", "trial-006", "trial-007"]
    other = plan_trials(SEARCH, TINY, trials=5, search_seed=4)
    assert all(first.drawn[name] != other.drawn[name] for name in first.drawn)
    # As numpy draws them: one row per trial, one column per setting in alphabetical order.
    for place, (number, run) in zip(
        np.random.default_rng(3).random((5, 2)), enumerate(first.runs), strict=True
    ):
        assert run.name == f"trial-{number:03d}/seed-0"
        lr = math.exp(math.log(0.01) + place[0] * math.log(100))
        assert run.config.lr == pytest.approx(lr, rel=1e-3)
        assert run.config.weight_decay == (0.0 if place[1] < 0.5 else 5e-4)


@pytest.mark.parametrize("name", ["random", "optuna"])
def test_samplers_fill_the_cube_and_can_be_extended(name: str) -> None:
    if name == "optuna":
        pytest.importorskip("optuna")
    sampler = TRIAL_SAMPLERS[name]
    points = sampler.build(64, 3, 7)
    assert points.shape == (64, 3)
    assert ((points >= 0) & (points < 1)).all()
    assert (sampler.build(20, 3, 7) == points[:20]).all()
    assert (sampler.build(64, 3, 8) != points).all()
    counts = np.stack([np.histogram(column, 4, (0, 1))[0] for column in points.T])
    assert counts.min() >= (12 if name == "optuna" else 4)  # a Sobol sequence is balanced


def test_a_sampler_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(ImportError, match=r"needs optuna: pip install \"\.\[optuna\]\""):
        plan_trials(SEARCH, TINY, trials=1, sampler="optuna")
    with pytest.raises(UsageError, match="unknown trial sampler 'grid'; valid: optuna, random"):
        plan_trials(SEARCH, TINY, trials=1, sampler="grid")


def test_values_of_dimensions() -> None:
    whole = [Interval(1, 3).value(place) for place in np.linspace(0, 1, 301, endpoint=False)]
    assert {value: whole.count(value) for value in (1, 2, 3)} == pytest.approx(
        {1: 100, 2: 100, 3: 100}, abs=1
    )
    assert all(type(value) is int for value in whole)
    log = Interval(0.001, 10.0, log=True)
    assert [log.value(place) for place in (0, 0.25, 0.5, 0.75, 1 - 1e-12)] == [
        0.001,
        0.01,
        0.1,
        1.0,
        10.0,
    ]
    assert Interval(-1.0, 1.0).value(0.5) == 0.0
    assert Interval(8, 128, log=True).value(0.999) == 128
    assert Choices(["a", "b", "c"]).value(1 - 1e-12) == "c"
    for low, high, log_scale in ((1, 1, False), (2, 1, False), (0, 1, True), (0, math.inf, False)):
        with pytest.raises(UsageError, match=r"bounds"):
            Interval(low, high, log_scale)
    with pytest.raises(UsageError, match="at least one value"):
        Choices([])


def test_search_spaces_on_the_command_line() -> None:
    found = parse_search(
        [
            "lr=log:0.01:1",
            "weight_decay=0:1",
            "batch-size=log:16:64",
            "rho=0.05,0.1",
            "model=timm:a,resnet8",
        ]
    )
    assert found == {
        "lr": Interval(0.01, 1.0, log=True),
        "weight_decay": Interval(0.0, 1.0),
        "batch_size": Interval(16, 64, log=True),
        "rho": Choices(((0.05,), (0.1,))),
        "model": Choices(("timm:a", "resnet8")),
    }
    assert {name: str(dimension) for name, dimension in found.items()}["lr"] == "log:0.01:1.0"
    for wrong in ("lr=0.1:x", "lr=log:1", "lr=1:2:3", "batch_size=0.5:2"):
        with pytest.raises(UsageError, match="LOW:HIGH"):
            parse_search([wrong])


@pytest.mark.parametrize(
    ("search", "settings", "options", "message"),
    [
        ({}, TINY, {}, "requires a setting to search"),
        ({"lr": [0.1]}, {**TINY, "lr": 0.1}, {}, "both searched and fixed"),
        ({"lr": [0.1, -1]}, TINY, {}, r"lr must be above 0, got -1 \(run trial-00"),
        ({"roh": [0.1]}, TINY, {}, "did you mean 'rho'"),
        ({"rho": [0.1]}, TINY, {}, "rho requires optimizer"),
        (SEARCH, TINY, {"trials": 0}, "trials must be at least 1"),
        (SEARCH, TINY, {"search_seed": -1}, "search_seed must be at least 0"),
        (SEARCH, TINY, {"seeds": 0}, "seeds must be at least 1"),
        ({"imbalance": [1.0, 50.0]}, TINY, {}, "imbalance determines the images"),
        ({"data": ["digits-lt"]}, {"method": "ce", "optimizer": "sgd"}, {}, "data determines"),
        (
            {"optimizer": ["sgd", "sam"]},
            {"data": "digits-lt", "method": "ce", "rho": (0.1,)},
            {},
            "rho does not apply to every trial",
        ),
    ],
)
def test_a_wrong_search_is_refused(
    search: dict[str, Any], settings: dict[str, Any], options: dict[str, int], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        plan_trials(search, settings, **{"trials": 9, **options})


def test_trials_that_repeat_others_are_planned_once() -> None:
    plan = plan_trials(
        {"optimizer": ["sgd", "sam"], "rho": [0.05, 0.1]},
        {key: value for key, value in TINY.items() if key != "optimizer"},
        trials=20,
    )
    settings = [tuple(drawn.items()) for drawn in plan.drawn.values()]
    assert len(settings) == len(set(settings)) == 3
    assert {("optimizer", "sgd")} in map(set, settings)
    assert sum("it is trained once" in note for note in plan.notes) == 17


def test_validation_chooses_and_test_images_do_not(tmp_path: Path, trained: Result) -> None:
    plan = plan_trials(SEARCH, TINY, trials=4, seeds=2)
    scores = {"trial-000": 50.0, "trial-001": 70.0, "trial-002": 70.0, "trial-003": 60.0}
    finish(plan, tmp_path, trained, lambda run: scores[run.group] + (run.config.seed or -1))
    tuning = plan.judge(tmp_path)
    assert tuning.chosen == "trial-001"  # of equal ones the first
    assert [trial.score for trial in tuning.trials] == list(scores.values())
    assert tuning.trials[1].balanced == [69.0, 71.0]
    assert tuning.settings == {**TINY, **plan.drawn["trial-001"]}
    assert recipe(**tuning.settings).override(seed=1).config() == plan.runs[3].config
    assert Tuning.load(tmp_path) == tuning
    path = tmp_path / TUNING_FILE
    path.write_text(path.read_text().replace("trial-001", "trial-002"))
    with pytest.raises(DataError, match="checksum is wrong"):
        Tuning.load(tmp_path)


def test_nothing_is_chosen_before_all_trials_have_ended(tmp_path: Path, trained: Result) -> None:
    plan = plan_trials(SEARCH, TINY, trials=3)
    finish(plan, tmp_path, trained, lambda run: None if run.group == "trial-002" else 40.0)
    tuning = plan.judge(tmp_path)
    assert tuning.chosen is None
    assert [trial.balanced for trial in tuning.trials] == [[40.0], [40.0], []]
    with pytest.raises(TrainingError, match="no trial is chosen"):
        _ = tuning.settings
    # A trial whose numbers become infinite has ended, one that failed for another reason has not.
    folder = tmp_path / plan.runs[2].name
    folder.mkdir(parents=True)
    for error, chosen in (
        (TrainingError("the loss is infinite"), "trial-000"),
        (OSError("the disk is full\nTrainingError: no"), None),
    ):
        write_error(error, 0, folder / "error-rank-0.txt")
        assert plan.judge(tmp_path).chosen == chosen
    expected = "OSError: the disk is full TrainingError: no"
    assert SweepTask.of(plan.runs[2], tmp_path).error() == expected


def test_all_trials_may_fail(tmp_path: Path) -> None:
    plan = plan_trials(SEARCH, TINY, trials=2)
    for run in plan.runs:
        (tmp_path / run.name).mkdir(parents=True)
        write_error(TrainingError("NaN"), 0, tmp_path / run.name / "error-rank-0.txt")
    with pytest.raises(TrainingError, match="all 2 trials failed: TrainingError: NaN"):
        check_trials(plan.judge(tmp_path), [])


def test_diverged_trials_are_not_trained_again_and_failed_ones_are(
    tmp_path: Path, trained: Result
) -> None:
    plan = plan_trials(SEARCH, TINY, trials=3)
    errors: dict[str, Exception] = {
        "trial-000/seed-0": TrainingError("the loss is NaN"),
        "trial-001/seed-0": OSError("the disk is full"),
    }
    submitted: list[str] = []

    class Failing:
        """An executor whose first trials write their errors."""

        def __init__(self, jobs: int) -> None:
            pass

        def submit(self, task: SweepTask) -> Future[int]:
            submitted.append(task.name)
            folder = Path(task.out) / task.name
            folder.mkdir(parents=True, exist_ok=True)
            future: Future[int] = Future()
            if task.name in errors:
                write_error(errors[task.name], 0, folder / "error-rank-0.txt")
                future.set_result(TaskExit.FAILED)
            else:
                (run,) = (run for run in plan.runs if run.name == task.name)
                finish(replace(plan, runs=[run]), Path(task.out), trained, lambda run: 40.0)
                future.set_result(TaskExit.FINISHED)
            return future

        def stop(self) -> None:
            raise AssertionError("nothing is running")

        def close(self) -> None:
            pass

    register_executor(ExecutorPart(name="failing", build=Failing, summary="writes errors"))
    try:
        first = list(plan.execute(tmp_path, Execution(executor="failing")))
        assert [each.state for each in first] == ["failed", "failed", "finished"]
        assert plan.judge(tmp_path).chosen is None
        with pytest.raises(TrainingError, match=r"1 of 2 runs failed.*the disk is full"):
            check_trials(plan.judge(tmp_path), first)
        submitted.clear()
        del errors["trial-001/seed-0"]
        second = list(plan.execute(tmp_path, Execution(executor="failing")))
    finally:
        EXECUTORS._parts.pop("failing")
    # The order in which they are told: what is known at once, then what was trained.
    assert submitted == ["trial-001/seed-0"]
    assert [(each.run.group, each.state, each.trained, each.error) for each in second] == [
        ("trial-000", "failed", False, "TrainingError: the loss is NaN"),
        ("trial-002", "finished", False, ""),
        ("trial-001", "finished", True, ""),
    ]
    tuning = plan.judge(tmp_path)
    assert tuning.chosen == "trial-001"
    check_trials(tuning, second)


def test_data_without_validation_images_are_refused(
    tmp_path: Path, cifar_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data", "cifar10-lt", "--data-root", str(cifar_root), "--imbalance", "2"]
    command = ["tune", *options, "--method", "ce", "--optimizer", "sgd", "--search", "lr=0.1,0.2"]
    assert main([*command, "--out", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert "cifar10-lt has none; hold some out with validation_per_class" in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_command_prints_how_to_train_with_the_choice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tuned"
    fixed = ["--data", "digits-lt", "--method", "ce-drw", "--optimizer", "sam"]
    command = [
        "tune",
        *fixed,
        "--epochs",
        "2",
        "--search",
        "lr=log:0.01:1",
        "--search",
        "rho=0.05,0.1",
    ]
    assert main([*command, "--trials", "2", "--jobs", "2", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    tuning = Tuning.load(out)
    results = [Result.load(out / trial.name / "seed-0" / "result.json") for trial in tuning.trials]
    expected = [result.validation and result.validation.balanced for result in results]
    assert [trial.score for trial in tuning.trials] == expected
    assert sum("balanced accuracy " in line and "/seed-0: " in line for line in lines) == 2
    assert not any("test" in line.replace(str(tmp_path), "") for line in lines)
    words = shlex.split(lines[-1])
    assert words[:2] == ["fastsam", "train"]
    assert tuning.best is not None
    assert words[2:-2] == [*fixed, "--epochs", "2", *as_options(tuning.best.settings)]
    chosen = parse(words[1:])
    assert chosen.lr == tuning.best.settings["lr"]
    assert main([*words[1:], "--quiet"]) == 0
    again = Result.load(out / "chosen" / "result.json")
    best = results[[trial.name for trial in tuning.trials].index(tuning.chosen or "")]
    assert isinstance(again.test, Metrics)
    assert again.test == best.test


@pytest.mark.slow
def test_python_tunes_and_adds_trials(tmp_path: Path) -> None:
    first = tune(tmp_path, search=SEARCH, trials=1, **TINY)
    more = tune(tmp_path, search=SEARCH, trials=2, **TINY)
    assert more.trials[:1] == first.trials
    assert len(more.trials) == 2
    with pytest.raises(Exception, match="other settings"):
        tune(tmp_path, search=SEARCH, trials=2, search_seed=1, **TINY)
