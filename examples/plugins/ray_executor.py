"""An executor of sweeps as a plug-in: every run is a task of a Ray cluster.

``fastsam sweep --executor ray`` connects to the cluster in ``RAY_ADDRESS``. Without this variable, or with
the value ``local``, Ray starts on this machine and listens on the loopback interface only. All nodes need the
same packages, and a file system that they share for the data and ``--out``.
"""

from __future__ import annotations

import os
import socket
from concurrent.futures import Future
from ipaddress import ip_address
from typing import Any

from fastsam.longtail.errors import UsageError
from fastsam.longtail.sweeps import ExecutorPart, SweepTask, register_executor
from fastsam.text import notice, one_line


def train(task: SweepTask) -> int:
    """Train a run on a worker of the cluster, and return the exit code of the task."""
    return int(task.run())


class RayExecutor:
    """Submits the runs of a sweep to a Ray cluster; a run with ``--device cuda`` reserves one GPU.

    Args:
        jobs: largest number of runs at a time.

    Raises:
        UsageError: if there is no cluster at ``RAY_ADDRESS``.
    """

    def __init__(self, jobs: int) -> None:
        address = os.environ.get("RAY_ADDRESS") or "local"
        if address == "local":
            # Read when ray is imported: without it, Ray on Linux listens on all interfaces.
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        import ray

        self._ray = ray
        self._starts_ray = not ray.is_initialized()
        if self._starts_ray:
            # Not without an address: that would connect to any cluster that someone started here.
            options = {"include_dashboard": False} if address == "local" else {}
            try:
                _check_reachable(address)
                ray.init(address=address, log_to_driver=False, **options)
            except (OSError, RuntimeError, ValueError) as error:
                raise UsageError(
                    f"there is no Ray cluster at RAY_ADDRESS={address}: {one_line(error)}. Start one with "
                    "`ray start --head`, correct the address, or unset RAY_ADDRESS to start Ray here"
                ) from error
            node = ray.util.get_node_ip_address()
            if address == "local" and not ip_address(node).is_loopback:
                notice(
                    f"Ray listens at {node}, where other machines may reach it; set "
                    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 before ray is imported"
                )
        # Each run has a worker process of its own. The sweep decides whether a lost run is started again.
        self._train = ray.remote(max_calls=1, max_retries=0)(train)
        self._submitted: list[Any] = []

    def submit(self, task: SweepTask) -> Future[int]:
        """Submit a run, which the cluster starts when it has a free CPU.

        Raises:
            UsageError: if the device is one GPU of several, or there is no GPU.
        """
        device = task.document["settings"]["device"]
        if device not in ("cpu", "cuda"):
            # A worker sees only the GPU that Ray reserves for it, as number 0.
            raise UsageError(
                f"--executor ray chooses the GPU of each run, so device must be cpu or cuda, got {device!r}; "
                "pass --device cuda"
            )
        gpus = int(device == "cuda")
        if gpus and not self._ray.cluster_resources().get("GPU"):
            raise UsageError(
                "the Ray cluster has no GPU, so runs with --device cuda would wait forever; pass --device "
                "cpu, or set RAY_ADDRESS to a cluster with GPUs"
            )
        # Ray reserves one CPU for a task.
        submitted = self._train.options(num_gpus=gpus).remote(task.on_cores(1))
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


def _check_reachable(address: str) -> None:
    """Connect to ``HOST:PORT`` or ``ray://HOST:PORT``. Ray itself tries it for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


register_executor(
    ExecutorPart(name="ray", build=RayExecutor, summary="tasks of a Ray cluster, or of a local Ray")
)
