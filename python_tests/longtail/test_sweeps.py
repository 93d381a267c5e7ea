"""Sweeps: plans, shards, skipping of finished runs, and what becomes of runs that fail or are lost."""

from __future__ import annotations

import importlib.util
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from fastsam import stopping
from fastsam.cli import main
from fastsam.cli.execution import parse_grid
from fastsam.files import from_json, locked, write_text
from fastsam.longtail import Trainer, recipe
from fastsam.longtail.errors import CheckpointError, DataError, TrainingError, UsageError
from fastsam.longtail.reproduce import reproduce_table
from fastsam.longtail.results import Result
from fastsam.longtail.run_file import parse_setting
from fastsam.longtail.sweeps import (
    EXECUTORS,
    PLAN_FILE,
    Execution,
    ExecutorPart,
    PlannedRun,
    Shard,
    SweepTask,
    TaskExit,
    check_outcomes,
    check_unfinished,
    plan_grid,
    register_executor,
    run_plan,
    store_plan,
    stored_result,
    stored_runs,
    sweep,
)
from fastsam.longtail.sweeps import run as sweep_run
from fastsam.longtail.sweeps.executors.local import LocalExecutor, visible_gpus
from fastsam.stopping import Stopped

TINY = {"data": "digits-lt", "method": "ce", "optimizer": "sgd", "epochs": 1, "batch_size": 138}
FLAGS = ["--data", "digits-lt", "--method", "ce", "--epochs", "1", "--batch-size", "138"]


def names(runs: list[PlannedRun]) -> list[str]:
    return [run.name for run in runs]


class Here:
    """An executor without processes, which counts the tasks and may do something else for one of them."""

    usual: Callable[[SweepTask], int]
    instead: dict[str, Callable[[SweepTask], int]]
    submitted: Counter[str]

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs

    def submit(self, task: SweepTask) -> Future[int]:
        self.submitted[task.name] += 1
        future: Future[int] = Future()
        try:
            future.set_result(self.instead.get(task.name, self.usual)(task))
        except Exception as error:
            future.set_exception(error)
        return future

    def stop(self) -> None:
        raise AssertionError("nothing is running")

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def trained() -> Result:
    """Train one run, whose result stands for those of others."""
    return Trainer(recipe(**TINY).config(), progress=False).fit()


@pytest.fixture
def here(trained: Result) -> Iterator[type[Here]]:
    """Register the executor ``here``, which writes results without training."""

    def write(task: SweepTask) -> int:
        result = replace(trained, config=task.document["settings"])
        write_text(Path(task.out) / task.name / "result.json", result.to_json())
        return TaskExit.FINISHED

    kind = type("Fresh", (Here,), {"usual": write, "instead": {}, "submitted": Counter()})
    kind.usual = staticmethod(write)
    register_executor(ExecutorPart(name="here", build=kind, summary="in this process"))
    yield kind
    EXECUTORS._parts.pop("here")


def test_names_have_what_varies_in_an_order_of_their_own() -> None:
    grid = {"rho": (0.05, 0.1), "lr": (0.1,), "optimizer": ("sam",)}
    plan = plan_grid(grid, {"data": "digits-lt", "method": "ce-drw"}, seeds=2)
    assert names(plan.runs) == [
        f"optimizer=sam,lr=0.1,rho={rho}/seed-{seed}" for rho in ("0.05", "0.1") for seed in (0, 1)
    ]
    assert names(
        plan_grid(dict(reversed(grid.items())), {"data": "digits-lt", "method": "ce-drw"}).runs
    ) == [f"optimizer=sam,lr=0.1,rho={rho}/seed-0" for rho in ("0.05", "0.1")]
    assert names(plan_grid({}, TINY, seeds=2).runs) == ["seed-0", "seed-1"]
    one = plan.runs[3]
    expected = recipe("digits-lt", "ce-drw", "sam", rho=0.1, lr=0.1, seed=1)
    assert one.config == expected.config()
    assert one.sources == expected.sources
    assert plan.notes == []


def test_a_combination_without_a_setting_is_planned_once() -> None:
    plan = plan_grid({"optimizer": ("sgd", "sam"), "rho": (0.05, 0.1)}, _without("optimizer"))
    assert names(plan.runs) == [
        "optimizer=sgd/seed-0",
        "optimizer=sam,rho=0.05/seed-0",
        "optimizer=sam,rho=0.1/seed-0",
    ]
    (note,) = plan.notes
    assert "rho requires optimizer asam, looksam, sam, but the run has optimizer sgd" in note
    fixed = plan_grid({"optimizer": ("sgd", "sam")}, {**_without("optimizer"), "rho": 0.1})
    assert [run.config.rho for run in fixed.runs] == [None, (0.1,)]
    assert len(fixed.notes) == 1
    # A part that is selected in the grid brings settings of its own.
    schedules = {"lr_schedule": ("cosine", "multistep"), "lr_milestones": ((1, 1),)}
    assert names(plan_grid(schedules, TINY).runs) == [
        "lr_schedule=cosine/seed-0",
        "lr_milestones=1-1,lr_schedule=multistep/seed-0",
    ]
    with pytest.raises(UsageError, match="rho requires optimizer asam, looksam, sam"):
        plan_grid({"rho": (0.1,)}, TINY)


def _without(name: str) -> dict[str, Any]:
    return {key: value for key, value in TINY.items() if key != name}


@pytest.mark.parametrize(
    ("grid", "settings", "seeds", "message"),
    [
        ({"roh": (0.1,)}, TINY, 1, "did you mean 'rho'"),
        ({"lr": (0.1, -1.0)}, TINY, 1, r"lr must be above 0, got -1.0 \(run lr=-1\)"),
        ({"lr": ()}, TINY, 1, "no values of lr"),
        ({"lr": (0.1,)}, {**TINY, "lr": 0.2}, 1, "both in the grid and fixed"),
        ({"method": ("ce", "no-loss")}, _without("method"), 1, "unknown method 'no-loss'"),
        ({}, _without("data"), 1, "data is missing"),
        ({"seed": (1, 2)}, TINY, 1, "pass the number of seeds"),
        ({}, TINY, 0, "seeds must be at least 1"),
        ({"class_order": ("a/b", "a?b")}, {**TINY, "data": "cifar10-lt"}, 1, "class_order"),
        ({"data": ("timm:a/b",)}, _without("data"), 1, "unknown data"),
    ],
)
def test_a_wrong_plan_is_refused(
    grid: dict[str, Any], settings: dict[str, Any], seeds: int, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        plan_grid(grid, settings, seeds=seeds)


def test_names_are_safe_as_folders() -> None:
    found = plan_grid({"data_root": ("../x y", "/data")}, {**TINY, "data": "cifar10-lt"}).runs
    assert names(found) == ["data_root=.._x_y/seed-0", "data_root=_data/seed-0"]
    with pytest.raises(UsageError, match="two combinations have the name"):
        plan_grid({"data_root": ("a/b", "a_b")}, {**TINY, "data": "cifar10-lt"})
    (long,) = plan_grid({"data_root": ("x" * 300,)}, {**TINY, "data": "cifar10-lt"}).runs
    with pytest.raises(UsageError, match="a name of 310 characters"):
        store_plan("unused", [long])


def test_a_stored_plan_can_only_grow(tmp_path: Path) -> None:
    first = plan_grid({"lr": (0.1,)}, TINY, seeds=2).runs
    store_plan(tmp_path, first)
    path = tmp_path / PLAN_FILE
    assert from_json(path.read_text())["format"] == 1
    assert [PlannedRun.from_dict(*each) for each in stored_runs(tmp_path).items()] == first
    written = path.stat().st_mtime_ns
    store_plan(tmp_path, first[:1])
    assert path.stat().st_mtime_ns == written
    store_plan(tmp_path, plan_grid({"lr": (0.1, 0.2)}, TINY, seeds=3).runs)
    assert len(stored_runs(tmp_path)) == 6
    # Where a run is executed is not part of the plan.
    store_plan(tmp_path, plan_grid({"lr": (0.1,)}, {**TINY, "device": "cuda", "threads": 3}).runs)
    other = plan_grid({"lr": (0.1,)}, {**TINY, "batch_size": 92}).runs
    with pytest.raises(
        CheckpointError, match=r"lr=0.1/seed-0 with other settings: batch_size was 138, is now 92\."
    ):
        store_plan(tmp_path, other)
    with pytest.raises(UsageError, match="two runs with the name"):
        store_plan(tmp_path, [*first, *first])
    with pytest.raises(UsageError, match=r"under the name lr=0\.2/seed-0"):
        plan_grid({"weight_decay": (5e-4,)}, {**TINY, "lr": 0.2}, seeds=2).check(tmp_path)
    path.write_text(path.read_text().replace("0.2", "0.3"))
    with pytest.raises(DataError, match=r"checksum is wrong.*finished runs are kept"):
        store_plan(tmp_path, first)


def test_where_runs_are_executed_does_not_distinguish_them(tmp_path: Path) -> None:
    data = {**TINY, "data": "imagenet-lt", "epochs": 2, "workers": 4}
    rest = {key: value for key, value in data.items() if key != "batch_size"}
    store_plan(tmp_path, plan_grid({"lr": (0.1, 0.2)}, data).runs)
    for moved in ({"workers": 9}, {"device": "cuda:3"}, {"data_root": "elsewhere"}):
        plan_grid({"lr": (0.1,)}, {**data, **moved}).check(tmp_path)
        # The same run in a grid of another setting.
        with pytest.raises(UsageError, match=r"under the name lr=0\.2/seed-0"):
            plan_grid({"batch_size": (138,)}, {**rest, **moved, "lr": 0.2}).check(tmp_path)
    # Other settings are named one by one, with both values.
    with pytest.raises(
        CheckpointError,
        match=r"lr=0\.2/seed-0 with other settings: batch_size was 138, is now 92; nesterov was False, is "
        r"now True\. Choose another --out$",
    ):
        plan_grid({"lr": (0.2,)}, {**data, "batch_size": 92, "nesterov": True, "workers": 1}).check(
            tmp_path
        )
    # A grid of places compares them: these are several runs.
    places = plan_grid({"device": ("cpu", "cuda:1"), "lr": (0.3,)}, data)
    places.check(tmp_path)
    store_plan(tmp_path, places.runs)
    places.check(tmp_path)
    plan_grid({"device": ("cuda:2",), "lr": (0.3,)}, data).check(tmp_path)
    with pytest.raises(UsageError, match=r"under the name lr=0\.2/seed-0"):
        plan_grid({"device": ("cpu",), "lr": (0.2,)}, data).check(tmp_path)


def test_shards_cover_every_run_once() -> None:
    runs = list(range(11))
    for count in (1, 2, 3, 11, 20):
        parts = [Shard.parse(f"{index}/{count}").of(runs) for index in range(1, count + 1)]
        assert sorted(chain(*parts)) == runs
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for wrong in ("0/2", "3/2", "1", "1/0", "a/b", "-1/2", "", "1/2/3"):
        with pytest.raises(UsageError, match="shard must be I/N"):
            Shard.parse(wrong)


def test_values_on_the_command_line() -> None:
    grid = parse_grid(
        ["rho=0.05,0.1 0.5", "optimizer=sgd,sam", "lr-milestones=80 90", "nesterov=true,False"]
    )
    assert grid == {
        "rho": ((0.05,), (0.1, 0.5)),
        "optimizer": ("sgd", "sam"),
        "lr_milestones": ((80, 90),),
        "nesterov": (True, False),
    }
    assert parse_setting("batch_size", "64") == 64
    assert parse_setting("lr", "1") == 1.0
    assert parse_setting("class_order", "007") == "007"
    assert parse_setting("n_max", "5") == 5
    for wrong, message in (
        ("rho", "must be NAME=VALUES"),
        ("roh=1", "did you mean 'rho'"),
        ("lr=a", "lr must be a number, got 'a'"),
        ("epochs=1.5", "epochs must be a whole number"),
        ("lr=0.1,", "lr has an empty value; pass a value, or several with spaces"),
    ):
        with pytest.raises(UsageError, match=message):
            parse_grid([wrong])
    with pytest.raises(UsageError, match="lr twice"):
        parse_grid(["lr=1", "lr=2"])


def test_a_sweep_continues_where_it_is_finished(tmp_path: Path, here: type[Here]) -> None:
    here.usual = staticmethod(SweepTask.run)
    first = sweep(tmp_path, grid={"lr": (0.1,)}, execution=Execution(executor="here"), **TINY)
    assert [(each.run.name, each.state, each.trained) for each in first] == [
        ("lr=0.1/seed-0", "finished", True)
    ]
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")}
    more = sweep(
        tmp_path, grid={"lr": (0.1, 0.2)}, seeds=2, execution=Execution(executor="here"), **TINY
    )
    assert sorted((each.run.name, each.trained) for each in more) == [
        ("lr=0.1/seed-0", False),
        ("lr=0.1/seed-1", True),
        ("lr=0.2/seed-0", True),
        ("lr=0.2/seed-1", True),
    ]
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert set(here.submitted.values()) == {1}
    stored = Result.load(tmp_path / "lr=0.2" / "seed-1" / "result.json")
    assert (stored.config["lr"], stored.config["seed"]) == (0.2, 1)
    assert stored.sources["lr"] == "given"
    with pytest.raises(
        CheckpointError, match=r"other settings: weight_decay was 0.0005, is now 0.1\."
    ):
        sweep(
            tmp_path,
            grid={"lr": (0.1,)},
            execution=Execution(executor="here"),
            **TINY,
            weight_decay=0.1,
        )


def test_other_threads_are_refused_before_any_run_starts(
    tmp_path: Path, here: type[Here], capsys: pytest.CaptureFixture[str]
) -> None:
    here.instead = {"seed-1": SweepTask.run}
    plan = plan_grid({}, {**TINY, "threads": 1}, seeds=2).runs
    for _ in run_plan(plan, tmp_path, Execution(executor="here")):
        pass
    command = ["sweep", *FLAGS, "--optimizer", "sgd", "--seeds", "3", "--executor", "here"]
    command += ["--threads", "2", "--out", str(tmp_path)]
    (tmp_path / "seed-1" / "result.json").unlink()  # as if killed after its last checkpoint
    stored = (tmp_path / PLAN_FILE).read_text()
    here.submitted.clear()
    assert main(command) == 1
    error = capsys.readouterr().err
    assert (
        f"unfinished runs in {tmp_path} began with other settings (seed-1: threads was 1, is now 2). Use "
        "the same settings to finish them, or choose another --out" in error
    )
    assert (tmp_path / PLAN_FILE).read_text() == stored
    assert not here.submitted
    with holding(tmp_path / "seed-1"):  # another sweep, which may have other threads, finishes it
        check_unfinished(plan_grid({}, {**TINY, "threads": 2}, seeds=3).runs, tmp_path)
    # With the same number the command continues, and with finished runs any number will do.
    again = plan_grid({}, {**TINY, "threads": 1}, seeds=2).runs
    assert [each.state for each in run_plan(again, tmp_path, Execution(executor="here"))] == [
        "finished",
        "finished",
    ]
    assert main(command) == 0
    # Also runs that are trained in the process of the caller.
    settings = {"epochs": 1, "batch_size": 138}
    table = {"name": "table4", "data": "digits-lt", "out": tmp_path / "table", "seeds": 1}
    next(reproduce_table(**table, progress=False, threads=1, **settings))
    next(tmp_path.glob("table/*/seed-0/result.json")).unlink()
    with pytest.raises(CheckpointError, match=r"threads was 1, is now 2\)\. Use the same"):
        next(reproduce_table(**table, progress=False, threads=2, **settings))


def test_shards_share_a_folder(tmp_path: Path, here: type[Here]) -> None:
    plan = plan_grid({}, TINY, seeds=5).runs
    for index in (1, 2):
        execution = Execution(executor="here", shard=Shard(index, 2))
        assert {each.run.name for each in run_plan(plan, tmp_path, execution)} == {
            f"seed-{seed}" for seed in range(index - 1, 5, 2)
        }
    assert here.submitted == Counter(names(plan))
    assert not any(each.trained for each in run_plan(plan, tmp_path, Execution(executor="here")))


def test_failed_runs_do_not_stop_the_others(
    tmp_path: Path, here: type[Here], capsys: pytest.CaptureFixture[str]
) -> None:
    def diverge(task: SweepTask) -> int:
        document = {**task.document, "settings": {**task.document["settings"], "lr": 1e30}}
        return SweepTask(task.out, task.name, document).run()

    here.instead = {"seed-1": diverge}
    outcomes = list(
        run_plan(plan_grid({}, TINY, seeds=3).runs, tmp_path, Execution(executor="here"))
    )
    assert [each.state for each in outcomes] == ["finished", "failed", "finished"]
    assert outcomes[1].error.startswith("TrainingError: ")
    assert outcomes[1].result is None
    with pytest.raises(
        TrainingError, match=r"1 of 3 runs failed\. seed-1: TrainingError: .*tries them again"
    ):
        check_outcomes(outcomes)
    command = ["sweep", *FLAGS, "--optimizer", "sgd", "--seeds", "3", "--executor", "here"]
    assert main([*command, "--out", str(tmp_path / "again")]) == 1
    printed = capsys.readouterr()
    assert "[2/3] seed-1: failed TrainingError: " in printed.out
    assert "[3/3] seed-2: test accuracy " in printed.out
    assert "1 of 3 runs failed" in printed.err
    assert here.submitted["seed-1"] == 2
    here.instead = {"seed-1": SweepTask.run}
    assert main([*command, "--out", str(tmp_path / "again")]) == 0
    assert not list(tmp_path.glob("again/**/error-*"))
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "[1/3] seed-0: test accuracy " in printed.out
    assert printed.out.count("finished before") == 2


@pytest.mark.parametrize("how", ["killed", "crashed", "lost"])
def test_a_lost_run_is_started_again_once(
    how: str, tmp_path: Path, here: type[Here], capsys: pytest.CaptureFixture[str]
) -> None:
    def lose(task: SweepTask) -> int:
        if how == "lost":
            raise ConnectionError("gone")
        return -signal.SIGKILL if how == "killed" else 134

    def lose_once(task: SweepTask) -> int:
        return lose(task) if here.submitted[task.name] == 1 else here.usual(task)

    here.instead = {"seed-0": lose_once, "seed-1": lose}
    outcomes = {
        each.run.name: each
        for each in run_plan(
            plan_grid({}, TINY, seeds=2).runs, tmp_path, Execution(executor="here")
        )
    }
    assert outcomes["seed-0"].state == "finished"
    assert outcomes["seed-1"].state == "failed"
    text = {"killed": "killed by SIGKILL", "crashed": "exit code 134", "lost": "ConnectionError"}[
        how
    ]
    assert text in outcomes["seed-1"].error
    assert here.submitted == {"seed-0": 2, "seed-1": 2}
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(text in line and "starting it again" in line for line in lines)


def test_a_run_that_was_stopped_alone_is_continued_three_times(
    tmp_path: Path, here: type[Here], capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped_twice(task: SweepTask) -> int:
        return TaskExit.STOPPED if here.submitted[task.name] < 3 else here.usual(task)

    def stopped_as_it_ended(task: SweepTask) -> int:
        here.usual(task)
        return -signal.SIGTERM

    here.instead = {
        "seed-0": lambda task: TaskExit.STOPPED,
        "seed-1": stopped_twice,
        "seed-2": lambda task: -signal.SIGTERM,
        "seed-3": stopped_as_it_ended,
    }
    plan = plan_grid({}, TINY, seeds=4).runs
    outcomes = list(run_plan(plan, tmp_path, Execution(executor="here")))
    assert {each.run.name: each.state for each in outcomes} == {
        "seed-0": "stopped",
        "seed-1": "finished",
        "seed-2": "stopped",
        "seed-3": "finished",
    }
    assert here.submitted == {"seed-0": 4, "seed-1": 3, "seed-2": 4, "seed-3": 1}
    lines = capsys.readouterr().err.splitlines()
    line = "fastsam: seed-1: a signal stopped its process; starting it again"
    assert lines.count(line) == 2
    assert len(lines) == 3 + 2 + 3
    with pytest.raises(Stopped, match="2 of 4 runs were stopped"):
        check_outcomes(outcomes)
    command = ["sweep", *FLAGS, "--optimizer", "sgd", "--seeds", "4", "--executor", "here"]
    assert main([*command, "--out", str(tmp_path)]) == 75
    assert "The same command continues them" in capsys.readouterr().err


def test_a_run_of_another_process_is_looked_at_last(
    tmp_path: Path, here: type[Here], capsys: pytest.CaptureFixture[str]
) -> None:
    def busy_once(task: SweepTask) -> int:
        return TaskExit.BUSY if here.submitted[task.name] == 1 else here.usual(task)

    here.instead = {"seed-0": busy_once}
    outcomes = list(
        run_plan(plan_grid({}, TINY, seeds=3).runs, tmp_path, Execution(executor="here"))
    )
    assert [each.run.name for each in outcomes] == ["seed-1", "seed-2", "seed-0"]
    assert here.submitted["seed-0"] == 2
    assert capsys.readouterr().err == ""  # the other process has ended, so nothing is waited for


def test_a_sweep_says_which_process_it_waits_for(
    tmp_path: Path, here: type[Here], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_run, "_BUSY_SECONDS", 0.2)
    notices: list[str] = []
    with holding(tmp_path / "seed-0") as holder:

        def said(message: object) -> None:
            notices.append(f"{message} (of {holder.pid})")
            threading.Timer(0.5, holder.kill).start()  # after another look

        monkeypatch.setattr(sweep_run, "notice", said)
        plan = plan_grid({}, TINY, seeds=2).runs
        outcomes = list(run_plan(plan, tmp_path, Execution(executor="here")))
    assert [each.run.name for each in outcomes] == ["seed-1", "seed-0"]
    (notice,) = notices
    assert notice.startswith(
        f"waiting for seed-0: {tmp_path / 'seed-0'} is in use by process {holder.pid} on "
    )
    assert here.submitted == {"seed-0": 1, "seed-1": 1}


@contextmanager
def holding(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process that locks a folder, and kill it in the end."""
    script = (
        "import sys, pathlib\nfrom fastsam.files import locked\n"
        f"with locked(pathlib.Path({str(folder)!r})):\n    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_run_that_another_process_finishes_meanwhile_is_not_failed(
    tmp_path: Path, here: type[Here], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(Trainer):
        """Another process ends the run between the set-up of this one and its first step."""

        def fit(self) -> Result:
            assert self.folder is not None
            document = {"settings": self.config.as_dict()}
            here.usual(SweepTask(str(tmp_path), self.folder.path.name, document))
            return super().fit()

    monkeypatch.setattr("fastsam.longtail.training.stages.Trainer", Late)
    here.instead = {"seed-0": SweepTask.run}
    plan = plan_grid({}, TINY).runs
    (outcome,) = run_plan(plan, tmp_path, Execution(executor="here"))
    assert (outcome.state, outcome.trained, outcome.error) == ("finished", False, "")
    assert here.submitted == {"seed-0": 1}
    assert SweepTask.of(plan[0], tmp_path).error() == ""


def test_files_that_another_process_removes_meanwhile_are_not_damaged(
    tmp_path: Path, here: type[Here], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "seed-0" / "checkpoint.pt"
    path.parent.mkdir()
    path.write_text("not an archive")
    (run,) = plan_grid({}, TINY).runs
    is_file = Path.is_file

    def then_removed(self: Path) -> bool:
        found = is_file(self)
        if self == path and found:
            self.unlink()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_file", then_removed)
        assert stored_result(replace(run, needs=("checkpoint.pt",)), tmp_path) is None
    # While another process trains the run, its files are not renamed.
    path.write_text("not an archive")
    needing = replace(run, needs=("checkpoint.pt",))
    with holding(path.parent):
        assert stored_result(needing, tmp_path) is None
        assert path.is_file()
    assert stored_result(needing, tmp_path) is None
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint.pt.damaged"]


def test_a_task_tells_who_holds_its_folder(tmp_path: Path) -> None:
    (run,) = plan_grid({}, TINY).runs
    task = SweepTask.of(run, tmp_path)
    assert SweepTask.from_json(task.to_json()) == task
    with holding(tmp_path / run.name):
        assert task.run() == TaskExit.BUSY
        assert task.error() == ""
    with locked(tmp_path / run.name):
        pass


def test_a_process_imports_from_the_folders_of_its_parent(tmp_path: Path) -> None:
    """Not from the current folder, which may be a checkout whose native module is not built."""
    (run,) = plan_grid({}, TINY).runs
    broken = tmp_path / "fastsam" / "__init__.py"
    broken.parent.mkdir()
    broken.write_text("raise ImportError('the fastsam of the current folder')")
    task = SweepTask.of(run, tmp_path / "runs")
    done = subprocess.run(
        task.command, cwd=tmp_path, input=task.to_json(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = Result.load(Path(task.out, task.name, "result.json"))
    assert result.origin is not None
    assert result.origin.command == f"fastsam train --config {run.name}/run.yaml"


def test_signals_stop_a_sweep(tmp_path: Path, here: type[Here]) -> None:
    here.instead = {"seed-1": lambda task: signal.raise_signal(signal.SIGTERM) or TaskExit.STOPPED}
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(
        Stopped, match=r"stopped by SIGTERM, 3 runs are left\. The same command continues"
    ):
        list(run_plan(plan_grid({}, TINY, seeds=4).runs, tmp_path, Execution(executor="here")))
    assert signal.getsignal(signal.SIGTERM) is before
    assert here.submitted == {"seed-0": 1, "seed-1": 1}


def test_systems_without_sigusr1_can_import_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(signal, "SIGUSR1")
    for module, expected in (
        (stopping, {"STOP_SIGNALS": (signal.SIGTERM, signal.SIGINT)}),
        (sweep_run, {}),
    ):
        spec = importlib.util.spec_from_file_location("imported_again", module.__file__)
        assert spec is not None
        assert spec.loader is not None
        again = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "imported_again", again)
        spec.loader.exec_module(again)
        assert {name: getattr(again, name) for name in expected} == expected


def test_executions_are_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert Execution().in_process
    assert not Execution(jobs=2).in_process
    with pytest.raises(UsageError, match="jobs must be at least 1"):
        Execution(jobs=0)
    with pytest.raises(UsageError, match="unknown executor 'loca', did you mean 'local'"):
        Execution(executor="loca")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="torchrun started 2; run it without torchrun"):
        list(run_plan(plan_grid({}, TINY).runs, tmp_path))
    assert list(tmp_path.iterdir()) == []


class _Recorded:
    """A process that only records its standard input."""

    def __init__(self, inputs: list[bytes]) -> None:
        self._inputs = inputs

    def communicate(self, text: bytes) -> None:
        self._inputs.append(text)

    def wait(self) -> int:
        return 0


def test_local_processes_share_cores_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("fastsam.longtail.sweeps.executors.local.cores_of_rank", lambda: 7)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    executor = LocalExecutor(3)
    environment = executor._environment("1")
    assert environment["OMP_NUM_THREADS"] == "2"
    assert environment["CUDA_VISIBLE_DEVICES"] == "1"
    assert list(executor._gpus) == ["0", "1", "0"]
    executor.close()
    # Data loader processes share the cores, too, unless their number is given.
    files = {**TINY, "data": "imagenet-lt", "device": "cpu"}
    submitted: list[bytes] = []
    monkeypatch.setattr(
        "fastsam.longtail.sweeps.executors.local.subprocess.Popen",
        lambda command, **options: _Recorded(submitted),
    )
    for given, expected in (({}, 2), ({"workers": 5}, 5)):
        (run,) = plan_grid({}, {**files, **given}).runs
        executor = LocalExecutor(2)
        assert executor.submit(SweepTask.of(run, "runs")).result() == 0
        executor.close()
        task = SweepTask.from_json(submitted.pop().decode())
        assert task.document["settings"]["workers"] == expected
        assert PlannedRun.from_dict(task.name, task.document).config.workers == expected
    (run,) = plan_grid({}, TINY).runs  # digits have no workers
    task = SweepTask.of(run, "runs")
    assert task.on_cores(2) == task
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert visible_gpus() == ["4", "6"]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert executor._environment(None)["OMP_NUM_THREADS"] == "5"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert visible_gpus() == []


def test_the_table_has_every_combination(
    tmp_path: Path, here: type[Here], trained: Result, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "sweep",
        *FLAGS,
        "--grid",
        "optimizer=sgd,sam",
        "--grid",
        "rho=0.1",
        "--executor",
        "here",
    ]
    assert main([*command, "--seeds", "2", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("note: rho requires optimizer")
    assert lines[1] == f"runs: 4 in {tmp_path}, 1 at a time"
    assert [line.split(": ")[0] for line in lines[2:6]] == [
        f"[{n}/4] {name}/seed-{seed}"
        for n, (name, seed) in enumerate(
            (
                (name, seed)
                for name in ("optimizer=sgd", "optimizer=sam,rho=0.1")
                for seed in (0, 1)
            ),
            1,
        )
    ]
    mean = trained.test.accuracy
    assert re.split(r" {2,}", lines[7])[:2] == ["ce sgd, 2 seeds", f"{mean:.1f} +- 0.0"]
    assert len(lines) == 9
