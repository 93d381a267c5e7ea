"""A plug-in that logs every epoch of training, for tests that count what the processes of a sweep train."""

from __future__ import annotations

import signal
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil

from fastsam.longtail.registry import PLUGINS

EPOCHS, RUNS = 6, 8
FLAGS = (
    *("--data", "digits-lt", "--method", "ce", "--optimizer", "sgd"),
    *("--epochs", str(EPOCHS), "--batch-size", "69", "--warmup-epochs", "0"),
    *("--lr-schedule", "logged", "--jobs", "2"),
)
"""Options of ``fastsam sweep`` for short runs, two at a time."""
_MODULE = """
    import os
    from fastsam.longtail.schedules import LR_SCHEDULES, LearningRateSchedule
    from fastsam.longtail.training import saving
    from fastsam.optim import FunctionSchedule

    saving.EPOCH_SECONDS = 0.0

    def build(settings, run):
        def lr(epoch):
            with open({log!r}, "a") as file:
                file.write(f"{{run['seed']}} {{epoch}} {{os.getpid()}}\\n")
            return run["lr"]

        return FunctionSchedule(lr)

    LR_SCHEDULES.add(LearningRateSchedule(name="logged", summary="", build=build))
"""


def install_log(site: Path, log: Path) -> None:
    """Create a folder for ``PYTHONPATH`` with a learning-rate schedule that logs seed, epoch and process.

    With it, every epoch ends with a checkpoint.
    """
    site.mkdir()
    (site / "logged_schedule.py").write_text(textwrap.dedent(_MODULE.format(log=str(log))))
    info = site / "logged-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: logged\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{PLUGINS}]\nlogged = logged_schedule\n")


def logged(log: Path) -> list[tuple[int, int, int]]:
    """Return seed, epoch and process of each epoch that any process began to train."""
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return [(int(seed), int(epoch), int(process)) for seed, epoch, process in map(str.split, lines)]


def wait_for(condition: Callable[[], object], seconds: float = 240.0) -> None:
    """Wait until a condition is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def kill_trainer(log: Path, seed: int, epoch: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to the process that trains a run when it begins an epoch."""
    wait_for(lambda: any(line[:2] == (seed, epoch) for line in logged(log)))
    (process,) = {process for found, _, process in logged(log) if found == seed}
    psutil.Process(process).send_signal(number)


def check_epochs(log: Path, killed: int) -> None:
    """Check that every epoch of every run was trained once, but for the one that a kill cut short."""
    count = Counter((seed, epoch) for seed, epoch, _ in logged(log))
    assert set(count) == {(seed, epoch) for seed in range(RUNS) for epoch in range(1, EPOCHS + 1)}
    repeated = {key: times for key, times in count.items() if times > 1}
    # The checkpoint of the epoch before may have been in the making when the process was killed.
    assert len(repeated) <= 2, repeated
    assert all(seed == killed and times == 2 for (seed, _), times in repeated.items()), repeated
