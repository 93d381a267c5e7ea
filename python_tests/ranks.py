"""Processes that work together in a test."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from fastsam.distributed import end_process

Work = Callable[..., None]


def run_ranks(
    work: Work, world_size: int, *arguments: Any, timeout: timedelta | None = None
) -> None:
    """Call ``work(rank, *arguments)`` in ``world_size`` new processes, which form a process group of gloo.

    Each process has one thread for kernels. An error of a process is raised here. A collective fails if a
    rank does not take part in it within ``timeout``, by default that of torch.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        run_processes(_join, world_size, world_size, store, timeout, work, arguments)


def run_launched(work: Work, world_size: int, *arguments: Any) -> None:
    """Call ``work(rank, *arguments)`` in ``world_size`` new processes with the variables of torchrun.

    The processes have no process group yet.
    """
    run_processes(_launch, world_size, world_size, free_port(), work, arguments)


def run_processes(work: Work, world_size: int, *arguments: Any) -> None:
    """Call ``work(rank, *arguments)`` in ``world_size`` new processes with one thread for kernels."""
    torch.multiprocessing.spawn(_run, args=(work, arguments), nprocs=world_size)  # type: ignore[no-untyped-call]


def free_port() -> int:
    """Return a free port of this machine."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def torchrun_variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return the environment variables that torchrun sets for a process."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _run(rank: int, work: Work, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    work(rank, *arguments)
    end_process(0)


def _join(
    rank: int,
    world_size: int,
    store: str,
    timeout: timedelta | None,
    work: Work,
    arguments: tuple[Any, ...],
) -> None:
    dist.init_process_group(
        "gloo", init_method=store, timeout=timeout, rank=rank, world_size=world_size
    )
    try:
        work(rank, *arguments)
    finally:
        dist.destroy_process_group()


def _launch(rank: int, world_size: int, port: int, work: Work, arguments: tuple[Any, ...]) -> None:
    os.environ |= torchrun_variables(rank, world_size, port)
    work(rank, *arguments)
