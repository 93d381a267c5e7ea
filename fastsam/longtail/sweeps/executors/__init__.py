"""Executors of sweeps, one file each: they run the tasks of a sweep in processes, here or elsewhere."""

from fastsam.longtail.sweeps.executors.base import (
    EXECUTORS,
    ExecutorPart,
    SweepExecutor,
    register_executor,
)

__all__ = ["EXECUTORS", "ExecutorPart", "SweepExecutor", "register_executor"]
