"""Concurrent tasks in processes of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context


def in_processes(task: Callable[..., None], items: Iterable[tuple[object, ...]], jobs: int) -> None:
    """Run a task for each item in spawned processes, because torch's threads do not survive a fork.

    Args:
        task: function of a module.
        items: arguments of each call.
        jobs: number of concurrent processes.
    """
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(task, *item) for item in items]
        for future in as_completed(futures):
            future.result()
