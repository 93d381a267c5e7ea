"""Executor that starts a process on this machine for each run."""

from __future__ import annotations

import os
import signal
import subprocess
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import torch

from fastsam.longtail.data.worker_count import cores_of_rank
from fastsam.longtail.sweeps.executors.base import ExecutorPart, register_executor
from fastsam.longtail.sweeps.task import SweepTask


class LocalExecutor:
    """Starts a process for each task. Processes share the CPU cores equally, and take turns on the GPUs.

    A signal from the terminal, such as Ctrl-C, reaches only this process, which passes it on.

    Args:
        jobs: number of processes at a time.
    """

    def __init__(self, jobs: int) -> None:
        self._cores = max(1, cores_of_rank() // jobs)
        self._threads = ThreadPoolExecutor(jobs)
        self._processes: list[subprocess.Popen[bytes]] = []
        gpus = visible_gpus()
        self._gpus = deque(gpus[place % len(gpus)] for place in range(jobs) if gpus)

    def submit(self, task: SweepTask) -> Future[int]:
        """Start a process that runs the task."""
        task = task.on_cores(self._cores)
        self._processes = [process for process in self._processes if process.poll() is None]
        # A device such as cuda:1 is the user's own choice.
        shared = task.document["settings"]["device"] == "cuda" and self._gpus
        gpu = self._gpus.popleft() if shared else None
        process = subprocess.Popen(
            task.command,
            stdin=subprocess.PIPE,
            env=self._environment(gpu),
            start_new_session=True,
        )
        self._processes.append(process)
        return self._threads.submit(self._wait, process, task, gpu)

    def stop(self) -> None:
        """Send SIGTERM to all processes."""
        for process in self._processes:
            process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        """End the threads that wait for processes."""
        self._threads.shutdown()

    def _wait(self, process: subprocess.Popen[bytes], task: SweepTask, gpu: str | None) -> int:
        with suppress(BrokenPipeError):  # the process was killed before it read its task
            process.communicate(task.to_json().encode())
        if gpu is not None:
            self._gpus.append(gpu)
        return process.wait()

    def _environment(self, gpu: str | None) -> dict[str, str]:
        return {
            # For PyTorch's threads, unless the user or the settings of a run say otherwise.
            "OMP_NUM_THREADS": str(self._cores),
            **os.environ,
            **({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}),
        }


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as in ``CUDA_VISIBLE_DEVICES``; empty for fewer than two."""
    count = torch.cuda.device_count()
    if count < 2:
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",")[:count] if named else [str(index) for index in range(count)]


register_executor(
    ExecutorPart(
        name="local", build=LocalExecutor, summary="processes on this machine, --jobs at a time"
    )
)
