"""An executor of sweeps as a plug-in: every run is a task of a Ray cluster.

``fastsam sweep --executor ray`` connects to the cluster in ``RAY_ADDRESS``. Without this variable, Ray starts
on this machine and listens on the loopback interface only. All nodes need the same packages, and a file
system that they share for the data and ``--out``.
"""

from __future__ import annotations

import os
from concurrent.futures import Future
from typing import Any

from fastsam.longtail.sweeps import ExecutorPart, SweepTask, register_executor


def train(task: SweepTask) -> int:
    """Train a run on a worker of the cluster, and return the exit code of the task."""
    return int(task.run())


class RayExecutor:
    """Submits the runs of a sweep to a Ray cluster; a run with ``--device cuda`` reserves one GPU.

    Args:
        jobs: largest number of runs at a time.
    """

    def __init__(self, jobs: int) -> None:
        if "RAY_ADDRESS" not in os.environ:
            # Read when ray is imported: without it, Ray on Linux listens on all interfaces.
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        import ray

        self._ray = ray
        self._starts_ray = not ray.is_initialized()
        if self._starts_ray:
            local = {} if "RAY_ADDRESS" in os.environ else {"include_dashboard": False}
            ray.init(log_to_driver=False, **local)
        # Each run has a worker process of its own. The sweep decides whether a lost run is started again.
        self._train = ray.remote(max_calls=1, max_retries=0)(train)
        self._submitted: list[Any] = []

    def submit(self, task: SweepTask) -> Future[int]:
        """Submit a run, which the cluster starts when it has a free CPU."""
        gpus = int(task.document["settings"]["device"].startswith("cuda"))
        submitted = self._train.options(num_gpus=gpus).remote(task)
        self._submitted.append(submitted)
        return submitted.future()

    def stop(self) -> None:
        """Interrupt all runs. Those that have ended are not affected."""
        for submitted in self._submitted:
            self._ray.cancel(submitted)

    def close(self) -> None:
        """Disconnect from Ray, and end it if it runs on this machine only."""
        if self._starts_ray:
            self._ray.shutdown()


register_executor(
    ExecutorPart(name="ray", build=RayExecutor, summary="tasks of a Ray cluster, or of a local Ray")
)
