"""Sweeps whose runs are processes: kills, signals, and several sweeps in one folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fastsam.cli import main
from fastsam.longtail import recipe
from fastsam.longtail.reproduce import reproduce_table
from fastsam.longtail.results import Result
from fastsam.longtail.sweeps import Execution, Shard
from python_tests.longtail.sweep_log import (
    EPOCHS,
    FLAGS,
    RUNS,
    check_epochs,
    install_log,
    kill_trainer,
    logged,
    wait_for,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    install_log(tmp_path / "site", tmp_path / "log")
    return tmp_path / "log"


@contextmanager
def started(out: Path, runs: int) -> Iterator[subprocess.Popen[str]]:
    """Start a sweep, and kill it if the test fails."""
    path = os.pathsep.join([str(ROOT), str(out.parent / "site")])
    process = subprocess.Popen(
        [sys.executable, "-m", "fastsam", "sweep", *FLAGS, "--out", str(out), "--seeds", str(runs)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def results(out: Path, runs: int) -> list[Result]:
    return [Result.load(out / f"seed-{seed}" / "result.json") for seed in range(runs)]


@pytest.mark.slow
def test_a_killed_process_is_replaced_and_nothing_is_trained_twice(
    tmp_path: Path, log: Path
) -> None:
    out = tmp_path / "runs"
    with started(out, RUNS) as process:
        kill_trainer(log, seed=3, epoch=4)
        printed, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    assert "fastsam: seed-3: its process was killed by SIGKILL; starting it again" in errors
    check_epochs(log, killed=3)
    found = results(out, RUNS)
    assert [len(result.history) for result in found] == [EPOCHS] * RUNS
    assert [result.config["seed"] for result in found] == list(range(RUNS))
    lines = [line for line in printed.splitlines() if line.startswith("[")]
    assert sorted(line.split()[1] for line in lines) == [f"seed-{seed}:" for seed in range(RUNS)]
    assert len({process for _, _, process in logged(log)}) == RUNS + 1
    before = log.read_text()
    with started(out, RUNS) as process:
        printed, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    assert printed.count("finished before") == RUNS
    assert log.read_text() == before


@pytest.mark.slow
def test_a_process_that_is_stopped_alone_saves_and_is_continued(tmp_path: Path, log: Path) -> None:
    out = tmp_path / "runs"
    with started(out, 2) as process:
        kill_trainer(log, seed=0, epoch=3, number=signal.SIGTERM)
        _, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    assert "fastsam: seed-0: a signal stopped its process; starting it again" in errors
    assert [len(result.history) for result in results(out, 2)] == [EPOCHS] * 2
    assert len({process for _, _, process in logged(log)}) == 3
    # The epoch in which it was stopped is continued, not repeated from its begin.
    assert len(logged(log)) == 2 * EPOCHS + 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_processes_and_the_same_command_continues(
    number: signal.Signals, tmp_path: Path, log: Path
) -> None:
    out = tmp_path / "runs"
    with started(out, 3) as process:
        wait_for(lambda: any(epoch == 4 for _, epoch, _ in logged(log)))
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert f"stopped by {number.name}" in errors
    assert "The same command continues" in errors
    begun = logged(log)
    assert all(not Path(f"/proc/{process}").exists() for _, _, process in begun)
    assert len(begun) < EPOCHS * 3
    with started(out, 3) as process:
        _, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    assert [len(result.history) for result in results(out, 3)] == [EPOCHS] * 3
    assert len(logged(log)) <= EPOCHS * 3 + 2 * 2  # the epochs that were cut short


@pytest.mark.slow
def test_the_processes_of_a_killed_sweep_end_and_two_sweeps_share_the_rest(
    tmp_path: Path, log: Path
) -> None:
    out = tmp_path / "runs"
    with started(out, 3) as process:
        wait_for(lambda: any(epoch == 3 for _, epoch, _ in logged(log)))
        process.kill()
        process.communicate()
    with started(out, 3) as one, started(out, 3) as other:
        for process in (one, other):
            printed, errors = process.communicate(timeout=500)
            assert process.returncode == 0, errors
            lines = [line for line in printed.splitlines() if line.startswith("[")]
            assert sorted(line.split()[1] for line in lines) == [f"seed-{s}:" for s in range(3)]
    assert [len(result.history) for result in results(out, 3)] == [EPOCHS] * 3
    assert len(logged(log)) <= EPOCHS * 3 + 2 * 2


@pytest.mark.slow
def test_reproduce_in_parallel_and_in_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"epochs": 1, "batch_size": 138}
    options = ["--data", "digits-lt", "--seeds", "1", "--quiet"]
    flags = ["--epochs", "1", "--batch-size", "138"]

    def run(*more: str) -> tuple[int, list[str]]:
        code = main(["reproduce", "table4", *options, *flags, *more])
        return code, capsys.readouterr().out.splitlines()

    code, whole = run("--out", str(tmp_path / "whole"))
    assert code == 0
    code, first = run("--out", str(tmp_path / "parts"), "--shard", "1/2")
    assert code == 0
    rows = {line.split()[0] for line in whole if line.startswith("ce-drw")}
    assert {line.split()[0] for line in first if line.startswith("ce-drw")} == {
        "ce-drw-sgd",
        "ce-drw-lpf-sgd",
    }
    assert first[-1].startswith("part 1 of 2 is done, 2 of 4 rows are complete")
    code, second = run("--out", str(tmp_path / "parts"), "--shard", "2/2")
    assert {line.split()[0] for line in second if line.startswith("ce-drw")} == rows
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("parts/**/result.json")}
    assert len(times) == 4
    assert run("--out", str(tmp_path / "parts")) == (0, whole)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert run("--out", str(tmp_path / "parallel"), "--jobs", "2") == (0, whole)
    # Python: a shard yields what is complete.
    shard = Execution(shard=Shard(2, 2))
    found = list(
        reproduce_table(
            "table4",
            "digits-lt",
            tmp_path / "python",
            seeds=1,
            execution=shard,
            progress=False,
            **settings,
        )
    )
    assert [row.variant.name for row in found] == ["ce-drw-pgd", "ce-drw-sam"]
    expected = recipe("digits-lt", "ce-drw", "pgd", **settings).config()
    stored = Result.load(tmp_path / "python" / "ce-drw-pgd" / "seed-0" / "result.json")
    assert stored.config == expected.as_dict()
