"""Number of worker processes, from the CPU cores that a rank has."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from fastsam.longtail.settings import Settings, setting

MOST = 16
"""Largest default. At 2 ms per image, 16 workers read 8,000 images per second."""
_IN_FLIGHT = 8
"""Number of batches that few workers together keep ready."""
_LEAST_EACH = 2


def cores_of_rank(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of CPU cores that this process may use, divided among the ranks of this machine.

    torchrun sets the number of ranks as ``LOCAL_WORLD_SIZE``. If it restricted each rank to its own cores,
    these would be divided again; pass ``--workers`` then.

    Args:
        environment: environment variables.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    ranks = environment.get("LOCAL_WORLD_SIZE", "")
    return max(1, cores // max(1, int(ranks) if ranks.isdecimal() else 1))


def default_workers(cores: int) -> int:
    """Return the default number of workers: the cores of the process but one, from 1 to :data:`MOST`.

    One core is left to the process that trains.

    Args:
        cores: number of CPU cores that the process may use.
    """
    return min(max(1, cores - 1), MOST)


def prefetched(workers: int) -> int | None:
    """Return how many batches each worker reads ahead; None without workers.

    Args:
        workers: number of worker processes.
    """
    return max(_LEAST_EACH, _IN_FLIGHT // workers) if workers else None


@dataclass(frozen=True, kw_only=True)
class WorkerSettings(Settings):
    """Setting of parts that read or augment images in worker processes."""

    workers: int = setting(
        "number of worker processes that read images",
        default=default_workers(cores_of_rank()),
        default_text=f"CPU cores of this process less one, from 1 to {MOST}",
        low=0,
        high=1024,
        place=True,
    )
