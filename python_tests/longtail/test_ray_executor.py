"""The Ray executor of ``examples/plugins`` trains a sweep on this machine, also if a worker is killed."""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest

from fastsam.longtail.errors import UsageError
from fastsam.longtail.registry import load_plugins
from fastsam.longtail.schedules import LR_SCHEDULES
from fastsam.longtail.sweeps import EXECUTORS, Execution, SweepTask, plan_grid, run_plan
from python_tests.longtail.sweep_log import (
    EPOCHS,
    RUNS,
    check_epochs,
    install_log,
    kill_trainer,
    logged,
    wait_for,
)
from python_tests.ranks import free_port

ROOT = Path(__file__).parents[2]
PLAIN = {"data": "digits-lt", "method": "ce", "optimizer": "sgd"}
SETTINGS = {
    **PLAIN,
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


class FakeRay(ModuleType):
    """What the plug-in uses of Ray, without processes."""

    def __init__(self, *, node: str = "127.0.0.1", resources: dict[str, float]) -> None:
        super().__init__("ray")
        self.inits: list[dict[str, Any]] = []
        self.util = SimpleNamespace(get_node_ip_address=lambda: node)
        self.cluster_resources = lambda: resources
        self.tasks: list[tuple[int, SweepTask]] = []

    def is_initialized(self) -> bool:
        return False

    def init(self, **options: Any) -> None:
        self.inits.append(options)
        if options["address"] == "damaged":
            raise ValueError("Invalid address format\nor so")

    def remote(self, **_: Any) -> Any:
        def submit(gpus: int, task: SweepTask) -> Any:
            self.tasks.append((gpus, task))
            return SimpleNamespace(future=Future)

        def options(num_gpus: int) -> Any:
            return SimpleNamespace(remote=partial(submit, num_gpus))

        return lambda train: SimpleNamespace(options=options)


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "plugins"))
    yield importlib.import_module("ray_executor")
    EXECUTORS._parts.pop("ray")
    sys.modules.pop("ray_executor", None)


def test_addresses_of_the_cluster(
    plugin: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    closed = f"127.0.0.1:{free_port()}"
    listening = socket.create_server(("127.0.0.1", 0))
    there = f"127.0.0.1:{listening.getsockname()[1]}"
    for given, expected in (
        (None, "local"),
        ("", "local"),
        ("local", "local"),
        ("auto", "auto"),
        (there, there),
        (f"ray://{there}", f"ray://{there}"),
    ):
        ray = FakeRay(resources={})
        monkeypatch.setitem(sys.modules, "ray", ray)
        if given is not None:
            monkeypatch.setenv("RAY_ADDRESS", given)
        plugin.RayExecutor(2)
        assert [options["address"] for options in ray.inits] == [expected]
        assert ray.inits[0].get("include_dashboard") == (False if expected == "local" else None)
    assert capsys.readouterr().err == ""
    listening.close()
    for wrong, message in (
        (closed, "Connection refused"),
        (f"ray://{closed}", "Connection refused"),
        ("damaged", r"Invalid address format or so\. Start one with"),
    ):
        monkeypatch.setenv("RAY_ADDRESS", wrong)
        with pytest.raises(UsageError, match=rf"no Ray cluster at RAY_ADDRESS={wrong}.*{message}"):
            plugin.RayExecutor(2)
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setitem(sys.modules, "ray", FakeRay(node="10.0.0.7", resources={}))
    plugin.RayExecutor(2)
    assert "Ray listens at 10.0.0.7" in capsys.readouterr().err


def test_gpus_are_those_that_ray_reserves(
    plugin: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def submit(ray: FakeRay, **settings: Any) -> None:
        monkeypatch.setitem(sys.modules, "ray", ray)
        (run,) = plan_grid({}, {**PLAIN, **settings}).runs
        plugin.RayExecutor(2).submit(SweepTask.of(run, tmp_path))

    ray = FakeRay(resources={"CPU": 8.0, "GPU": 2.0})
    for device in ("cpu", "cuda"):
        submit(ray, device=device, data="imagenet-lt")
    assert [gpus for gpus, _ in ray.tasks] == [0, 1]
    # A task has one CPU.
    assert [task.document["settings"]["workers"] for _, task in ray.tasks] == [1, 1]
    with pytest.raises(UsageError, match="must be cpu or cuda, got 'cuda:1'; pass --device cuda"):
        submit(ray, device="cuda:1")
    with pytest.raises(UsageError, match="has no GPU, so runs with --device cuda would wait"):
        submit(FakeRay(resources={"CPU": 8.0}), device="cuda")
    assert len(ray.tasks) == 2


def addresses() -> set[str]:
    """Return the addresses at which this process and those that it started listen."""
    own = psutil.Process()
    found = set()
    for process in (own, *own.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            connections = process.net_connections(kind="inet")
            found |= {each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN}
    return found


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
