"""An executor of sweeps as a plug-in: every run is a task of a Ray cluster.

``fastsam sweep --executor ray`` connects to the cluster in ``RAY_ADDRESS``. Without it, Ray starts on this
machine and listens on the loopback interface. All nodes need the same folder ``--out``, data and packages.
"""

from __future__ import annotations

import os
from concurrent.futures import Future

import ray

from fastsam.longtail.sweeps import ExecutorPart, SweepTask, register_executor


# A worker process of its own for each run. fastsam itself decides whether a lost run is started again.
@ray.remote(max_calls=1, max_retries=0)
def train(task: SweepTask) -> int:
    """Train a run on a worker of the cluster."""
    return int(task.run())


class RayExecutor:
    """Submits the runs of a sweep to a Ray cluster, with one GPU for each run with ``--device cuda``.

    Args:
        jobs: largest number of runs at a time.
    """

    def __init__(self, jobs: int) -> None:
        self._starts_ray = not ray.is_initialized()
        self._running: list[ray.ObjectRef[int]] = []
        if not self._starts_ray:
            return
        if "RAY_ADDRESS" in os.environ:
            ray.init(log_to_driver=False)
        else:
            loopback = {"_node_ip_address": "127.0.0.1", "include_dashboard": False}
            ray.init("local", log_to_driver=False, **loopback)

    def submit(self, task: SweepTask) -> Future[int]:
        """Submit a run; the cluster starts it when a worker is free."""
        gpus = int(task.document["settings"]["device"].startswith("cuda"))
        running = train.options(num_gpus=gpus).remote(task)
        self._running.append(running)
        return running.future()

    def stop(self) -> None:
        """Interrupt all runs; those that have ended are not affected."""
        for running in self._running:
            ray.cancel(running)

    def close(self) -> None:
        """Disconnect from Ray."""
        if self._starts_ray:
            ray.shutdown()


register_executor(
    ExecutorPart(name="ray", build=RayExecutor, summary="tasks of a Ray cluster, or of a local Ray")
)
