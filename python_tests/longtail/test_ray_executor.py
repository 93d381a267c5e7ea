"""The Ray executor of ``examples/plugins`` trains a sweep on this machine, also if a worker is killed."""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fastsam.longtail.registry import load_plugins
from fastsam.longtail.schedules import LR_SCHEDULES
from fastsam.longtail.sweeps import EXECUTORS, Execution, plan_grid, run_plan
from python_tests.longtail.sweep_log import (
    EPOCHS,
    RUNS,
    check_epochs,
    install_log,
    kill_trainer,
    logged,
    wait_for,
)

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "data": "digits-lt",
    "method": "ce",
    "optimizer": "sgd",
    "epochs": EPOCHS,
    "batch_size": 69,
    "warmup_epochs": 0,
    "lr_schedule": "logged",
}


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Install the plug-ins for this process and for the workers of Ray."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # As the plug-in sets it, which is too late if another test has imported ray.
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    pytest.importorskip("ray")
    install_log(tmp_path / "site", tmp_path / "log")
    folders = [str(ROOT), str(ROOT / "examples" / "plugins"), str(tmp_path / "site")]
    path = [*folders, *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray stores a token there
    for folder in folders:
        monkeypatch.syspath_prepend(folder)
    load_plugins.cache_clear()
    importlib.invalidate_caches()
    importlib.import_module("ray_executor")
    yield tmp_path / "log"
    load_plugins.cache_clear()
    EXECUTORS._parts.pop("ray")
    LR_SCHEDULES._parts.pop("logged", None)
    for module in ("ray_executor", "logged_schedule"):
        sys.modules.pop(module, None)


def addresses() -> set[str]:
    """Return the addresses at which this process and those that it started listen."""
    own = psutil.Process()
    return {
        connection.laddr.ip
        for process in (own, *own.children(recursive=True))
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_killed_ray_worker_is_replaced_and_nothing_is_trained_twice(
    tmp_path: Path, log: Path
) -> None:
    plan = plan_grid({}, SETTINGS, seeds=RUNS).runs
    killer = threading.Thread(target=kill_trainer, args=(log, 3, 4))
    killer.start()
    outcomes = []
    listening: set[str] = set()
    for outcome in run_plan(plan, tmp_path / "runs", Execution(jobs=2, executor="ray")):
        outcomes.append(outcome)
        listening |= addresses()
    killer.join()
    assert listening
    assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}
    assert sorted(each.run.name for each in outcomes) == [run.name for run in plan]
    assert {each.state for each in outcomes} == {"finished"}
    check_epochs(log, killed=3)
    histories = [each.result.history for each in outcomes if each.result is not None]
    assert [len(history) for history in histories] == [EPOCHS] * RUNS
    assert len({process for _, _, process in logged(log)}) == RUNS + 1
    wait_for(lambda: not any(is_running(process) for _, _, process in logged(log)), seconds=30)


def is_running(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
