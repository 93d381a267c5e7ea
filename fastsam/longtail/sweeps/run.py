"""Runs a plan: skips finished runs, trains the others by an executor, and starts lost ones again."""

from __future__ import annotations

import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastsam.distributed import launched_world_size
from fastsam.longtail.build import load_configured
from fastsam.longtail.data import LongTailData
from fastsam.longtail.errors import TrainingError, UsageError
from fastsam.longtail.results import Result
from fastsam.longtail.sweeps.executors import EXECUTORS, SweepExecutor
from fastsam.longtail.sweeps.plan import PlannedRun, Shard, check_plan, store_plan
from fastsam.longtail.sweeps.task import SweepTask, TaskExit
from fastsam.longtail.sweeps.training import busy_reason, check_unfinished, stored_result
from fastsam.stopping import STOP_SIGNALS, Stopped, StopRequest, stop_signals
from fastsam.text import notice

State = Literal["finished", "failed", "stopped"]
_STOPS = tuple(-number for number in STOP_SIGNALS)
"""Exit codes of processes that a signal stopped before they could handle it."""
_RESTARTS = {"lost": 1, "stopped": 3}
"""How often a run is started again, by how its process ended: it was lost, or a signal stopped it alone.
A lost one may run out of memory each time; a stopped one has saved its progress."""
_POLL_SECONDS = 0.5
"""Seconds between two looks at signals."""
_BUSY_SECONDS = 2.0
"""Seconds between two looks at a run that another process trains."""


@dataclass(frozen=True)
class RunOutcome:
    """What became of a planned run.

    Attributes:
        run: the run.
        state: finished, failed, or stopped by a signal: the same command continues it.
        result: its result if it is finished, else None.
        error: why it failed, in one line that begins with the name of an exception; else empty.
        trained: whether this sweep trained it, or a part of it; False if it was finished before.
    """

    run: PlannedRun
    state: State
    result: Result | None = None
    error: str = ""
    trained: bool = True


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How the runs of a plan are executed.

    Attributes:
        jobs: number of runs at a time.
        executor: one of :data:`fastsam.longtail.sweeps.EXECUTORS`.
        shard: the part of the plan that is executed.
    """

    jobs: int = 1
    executor: str = "local"
    shard: Shard = Shard()  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        if not 1 <= self.jobs <= 10_000:
            raise UsageError(f"jobs must be at least 1 and at most 10000, got {self.jobs}")
        EXECUTORS[self.executor]  # raises: unknown

    @property
    def in_process(self) -> bool:
        """Whether runs may be trained in the process of the caller, because no executor was asked for."""
        return self.jobs == 1 and self.executor == "local"


def run_plan(
    runs: Sequence[PlannedRun],
    out: str | Path,
    execution: Execution = Execution(),
    *,
    check: Callable[[PlannedRun, LongTailData], None] = lambda run, data: None,
    failed_before: Callable[[PlannedRun], str] = lambda run: "",
) -> Iterator[RunOutcome]:
    """Store a plan, execute it, and yield what became of each run when it ended.

    Finished runs are loaded, and interrupted ones are resumed. A run whose process was lost is started
    again once, and one whose process alone was stopped by a signal up to three times. A run that another
    process trains is looked at again after all others.

    Args:
        runs: all runs of the plan.
        out: folder of the sweep.
        execution: how the runs are executed, and which of them.
        check: called before anything is trained, with each data set and the first run that uses it.
        failed_before: returns why a run failed for good, in an earlier call; empty to train it.

    Raises:
        UsageError: if two runs have the same name, or torchrun started this process.
        CheckpointError: if a folder contains a run with other settings, before anything is trained.
        DataError: if a data set cannot be loaded, before anything is trained.
        Stopped: after a signal, when all processes have stopped.
    """
    if launched_world_size() > 1:
        raise UsageError(
            f"a sweep starts its own processes, but torchrun started {launched_world_size()}; run it "
            "without torchrun"
        )
    check_plan(runs, out)
    out = Path(out)
    own = execution.shard.of(runs)
    found = {run.name: stored_result(run, out) for run in own}
    failed = {run.name: failed_before(run) for run in own if found[run.name] is None}
    pending = [run for run in own if failed.get(run.name) == ""]
    check_unfinished(pending, out)
    _load_data(pending, check)
    store_plan(out, runs)
    for run in own:
        result = found[run.name]
        if result is not None:
            yield RunOutcome(run, "finished", result, trained=False)
        elif failed[run.name]:
            yield RunOutcome(run, "failed", error=failed[run.name], trained=False)
    if pending:
        # Before signals are handled here: an executor may start a library that handles them, too.
        executor = EXECUTORS[execution.executor].build(execution.jobs)
        with closing(executor), stop_signals() as stop, stop.deferred():
            yield from _Sweep(pending, out, executor, execution.jobs, stop).outcomes()


def _load_data(
    runs: Iterable[PlannedRun], check: Callable[[PlannedRun, LongTailData], None]
) -> None:
    """Load each data set once, so that it is downloaded and cached before processes use it in parallel."""
    seen = []
    for run in runs:
        key = (run.config.data, run.config.parts["data"])
        if key not in seen:
            seen.append(key)
            check(run, load_configured(run.config))


def check_outcomes(outcomes: Sequence[RunOutcome]) -> None:
    """Raise an error unless all runs are finished.

    Raises:
        TrainingError: if a run failed.
        Stopped: if a run was stopped by a signal, and none failed.
    """
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    if failed:
        which = "; ".join(f"{outcome.run.name}: {outcome.error}" for outcome in failed[:3])
        more = f"; and {len(failed) - 3} more" if len(failed) > 3 else ""
        raise TrainingError(
            f"{len(failed)} of {len(outcomes)} runs failed. {which}{more}. The same command tries them again"
        )
    stopped = sum(outcome.state == "stopped" for outcome in outcomes)
    if stopped:
        raise Stopped(
            f"{stopped} of {len(outcomes)} runs were stopped by a signal. The same command continues them"
        )


class _Sweep:
    """The runs of a plan while they are executed.

    Args:
        runs: the runs that are not finished.
        out: folder of the sweep.
        executor: starts them.
        jobs: number of runs at a time.
        stop: request to stop.
    """

    def __init__(
        self,
        runs: Sequence[PlannedRun],
        out: Path,
        executor: SweepExecutor,
        jobs: int,
        stop: StopRequest,
    ) -> None:
        self._out = out
        self._executor = executor
        self._jobs = jobs
        self._stop = stop
        self._waiting = deque(runs)
        self._busy: list[PlannedRun] = []
        self._running: dict[Future[int], tuple[PlannedRun, SweepTask]] = {}
        self._restarts: Counter[tuple[str, str]] = Counter()
        self._said_busy: set[str] = set()
        self._left = len(runs)

    def outcomes(self) -> Iterator[RunOutcome]:
        """Execute the runs, and yield what became of each."""
        try:
            while (self._waiting or self._busy or self._running) and not self._stop:
                yield from self._submit()
                yield from self._ended()
        finally:
            if self._running:  # after a signal, an error, or if the caller takes no more outcomes
                self._executor.stop()
                wait(self._running)
        if self._stop:
            raise Stopped(
                f"stopped by {self._stop.signal}, {self._left} runs are left. The same command continues"
            )

    def _submit(self) -> Iterator[RunOutcome]:
        """Start runs until enough are running."""
        while self._waiting and len(self._running) < self._jobs and not self._stop:
            run = self._waiting.popleft()
            result = stored_result(run, self._out, quiet=True)
            if result is not None:  # another process has finished it
                yield self._finish(RunOutcome(run, "finished", result, trained=False))
            elif busy_reason(run, self._out) is not None:
                self._busy.append(run)
            else:
                task = SweepTask.of(run, self._out)
                self._running[self._executor.submit(task)] = (run, task)

    def _ended(self) -> Iterator[RunOutcome]:
        """Wait until a run ends, and yield what became of it, unless it is to be started again."""
        if not self._running:
            if self._busy and not self._waiting:
                self._wait_for_others()
            return
        ended, _ = wait(self._running, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
        for future in ended:
            run, task = self._running.pop(future)
            outcome = self._judge(run, task, future)
            if outcome is not None:
                yield self._finish(outcome)

    def _judge(self, run: PlannedRun, task: SweepTask, future: Future[int]) -> RunOutcome | None:
        """Return what became of a run whose task has ended; None if the run has to be looked at again."""
        end, why = "lost", ""
        try:
            code = future.result()
            if code == TaskExit.BUSY:
                self._busy.append(run)
                return None
            if code == TaskExit.FAILED:
                return RunOutcome(run, "failed", error=task.error())
            why = (
                f"its process was killed by {_signal_name(-code)}"
                if code < 0
                else f"exit code {code}"
            )
            if code in (TaskExit.STOPPED, *_STOPS):
                end, why = "stopped", "a signal stopped its process"
        except Exception as error:
            why = f"its process was lost ({type(error).__name__}: {_last_line(error)})"
        result = stored_result(run, self._out, quiet=True)
        if result is not None:
            return RunOutcome(run, "finished", result)
        if not self._stop and self._restarts[run.name, end] < _RESTARTS[end]:
            self._restarts[run.name, end] += 1
            self._waiting.append(run)
            notice(f"{run.name}: {why}; starting it again")
            return None
        if end == "stopped" or self._stop:
            return RunOutcome(run, "stopped")
        return RunOutcome(run, "failed", error=f"LostProcess: {why}, twice")

    def _finish(self, outcome: RunOutcome) -> RunOutcome:
        self._left -= outcome.state == "finished"
        return outcome

    def _wait_for_others(self) -> None:
        """Wait a moment if other processes train all that is left, and look at these runs again."""
        reasons = {run.name: busy_reason(run, self._out) for run in self._busy}
        for name, reason in reasons.items():
            if reason is not None and name not in self._said_busy:
                notice(f"waiting for {name}: {reason}")
                self._said_busy.add(name)
        end = time.monotonic() + (_BUSY_SECONDS if None not in reasons.values() else 0.0)
        while time.monotonic() < end and not self._stop:
            time.sleep(0.1)
        self._waiting.extend(self._busy)
        self._busy.clear()


def _last_line(error: Exception) -> str:
    """Return the line of an error that names the cause, if other programs put a traceback before it."""
    return f"{(str(error).strip().splitlines() or [''])[-1]:.200}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
