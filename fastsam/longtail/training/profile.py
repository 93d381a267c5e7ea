"""Profile of a few training steps: a trace of PyTorch's profiler, and a table of where the time goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, record_function, schedule

from fastsam.distributed import World
from fastsam.longtail.training.step import Stepper

EVALUATION = "evaluation"
SECTIONS = ("data", "pass one", "ascent", "pass two", "further passes", "update")
"""Sections of a step, in the order of the table."""


class ProfileRow(NamedTuple):
    """Time of one section.

    Attributes:
        section: name of the section.
        calls: how often it occurred.
        seconds: time of all calls.
        share: share of the time of the recorded steps; None for the evaluation, which is not part of one.
    """

    section: str
    calls: int
    seconds: float
    share: float | None


class StepProfile:
    """Profiles steps of a run after a warm-up, and evaluations of the validation set.

    The evaluations are those between the recorded steps, and always the first one of the run. While the
    profile records, the device is synchronized at both ends of each section, so that no work of a section is
    counted in the next one. Profiled steps are therefore slower than others.

    Args:
        folder: folder of the trace, which is created if it does not exist.
        device: device of the run.
        warmup: steps before the first one that is recorded.
        steps: number of steps to record.

    Attributes:
        trace: path of the trace, for https://ui.perfetto.dev or chrome://tracing.

    Raises:
        OSError: if the folder cannot be created.
    """

    def __init__(
        self, folder: Path, device: torch.device, *, warmup: int = 5, steps: int = 20
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.trace = folder / "trace.json"
        self._device = device
        self._first, self._last = warmup, warmup + steps
        self._taken = 0
        self._seconds: dict[str, float] = {}
        self._calls: dict[str, int] = {}
        self._began = 0.0
        self._whole = 0.0
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(
            activities=activities,
            schedule=schedule(
                wait=max(warmup - 1, 0), warmup=min(warmup, 1), active=steps, repeat=1
            ),
            on_trace_ready=self._write,
        )

    @classmethod
    def of_run(
        cls, folder: str | Path | None, device: torch.device, world: World, stepper: Stepper
    ) -> StepProfile | None:
        """Create the profile of a run on rank 0; return None on other ranks, and if ``folder`` is None."""
        if folder is None or world.rank > 0:
            return None
        made = cls(Path(folder), device)
        stepper.section = made.section
        return made

    def __enter__(self) -> StepProfile:
        self._profiler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()
        self._profiler.stop()

    def finish(self) -> None:
        """End the recording after the last step of the run; do nothing if it has ended already."""
        if self._records:
            self._end()
            self._last = self._taken

    @property
    def steps(self) -> int:
        """Number of steps that were recorded."""
        return max(0, min(self._taken, self._last) - self._first)

    @property
    def _records(self) -> bool:
        return self._first <= self._taken < self._last

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Measure a part of a step, and label it in the trace."""
        evaluates = name == EVALUATION and name not in self._seconds
        if not (self._records or evaluates):
            with record_function(name):
                yield
            return
        self._wait()
        began = time.perf_counter()
        try:
            with record_function(name):
                yield
                self._wait()
        finally:
            seconds = time.perf_counter() - began
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds
            self._calls[name] = self._calls.get(name, 0) + 1
            if name == EVALUATION:
                self._began += seconds  # it is no part of the steps

    def step(self) -> None:
        """Advance to the next step."""
        self._taken += 1
        if self._taken == self._first:
            self._wait()
            self._began = time.perf_counter()
        if self._taken == self._last:
            self._end()
        if self._taken <= self._last:
            self._profiler.step()

    def rows(self) -> list[ProfileRow]:
        """Return the time of each section that occurred in the recorded steps, and of the evaluations.

        The row ``other`` is the rest of the steps: totals, averages of the weights, the profiler itself.
        """
        found = [
            ProfileRow(name, self._calls[name], seconds, seconds / self._whole)
            for name in SECTIONS
            if self._whole and (seconds := self._seconds.get(name)) is not None
        ]
        if found:
            other = max(0.0, self._whole - sum(row.seconds for row in found))
            found.append(ProfileRow("other", self.steps, other, other / self._whole))
        if EVALUATION in self._seconds:
            seconds = self._seconds[EVALUATION]
            found.append(ProfileRow(EVALUATION, self._calls[EVALUATION], seconds, None))
        return found

    def _end(self) -> None:
        self._wait()
        self._whole = time.perf_counter() - self._began

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _write(self, profiler: torch.profiler.profile) -> None:
        profiler.export_chrome_trace(str(self.trace))
