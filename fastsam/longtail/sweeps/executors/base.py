"""Interface of the executors, and their registry."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from fastsam.longtail.registry import Registry, RunPart
from fastsam.longtail.sweeps.task import SweepTask


class SweepExecutor(Protocol):
    """Runs the tasks of a sweep, each in a process of its own.

    The sweep has at most ``jobs`` tasks submitted at a time, and decides what is submitted again.
    """

    def submit(self, task: SweepTask) -> Future[int]:
        """Start a task, without waiting for it.

        A process that may use only a part of its machine runs ``task.on_cores(N)``.

        The process either calls ``task.run()`` or is started from ``task.command``. The future returns its
        exit code, or minus the number of the signal that killed it; an exception also means that the
        process was lost.
        """

    def stop(self) -> None:
        """Ask all running tasks to stop. Their futures end when they have."""

    def close(self) -> None:
        """Free what the executor uses. No task is running."""


@dataclass(frozen=True, kw_only=True)
class ExecutorPart(RunPart):
    """An executor. Once registered, ``fastsam sweep --executor NAME`` uses it.

    Attributes:
        build: ``build(jobs)`` creates the executor; ``jobs`` is the largest number of tasks at a time.
    """

    build: Callable[[int], SweepExecutor]


EXECUTORS: Registry[ExecutorPart] = Registry("executor", "fastsam.longtail.sweeps.executors")
register_executor = EXECUTORS.add
