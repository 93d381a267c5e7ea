"""Sweeps: plans of many runs, trained in parallel, on one machine or several."""

from fastsam.longtail.sweeps.executors import (
    EXECUTORS,
    ExecutorPart,
    SweepExecutor,
    register_executor,
)
from fastsam.longtail.sweeps.grid import GridPlan, plan_combinations, plan_grid, sweep
from fastsam.longtail.sweeps.plan import PlannedRun, Shard, store_plan, stored_runs
from fastsam.longtail.sweeps.run import Execution, RunOutcome, check_outcomes, run_plan
from fastsam.longtail.sweeps.task import SweepTask, TaskExit
from fastsam.longtail.sweeps.training import check_unfinished, complete, stored_result
from fastsam.longtail.training.run_folder import PLAN_FILE

__all__ = [
    "EXECUTORS",
    "PLAN_FILE",
    "Execution",
    "ExecutorPart",
    "GridPlan",
    "PlannedRun",
    "RunOutcome",
    "Shard",
    "SweepExecutor",
    "SweepTask",
    "TaskExit",
    "check_outcomes",
    "check_unfinished",
    "complete",
    "plan_combinations",
    "plan_grid",
    "register_executor",
    "run_plan",
    "store_plan",
    "stored_result",
    "stored_runs",
    "sweep",
]
