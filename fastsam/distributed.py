"""The ranks of a run: world size, all-reduce, gather and barrier, and the parts of sharded tensors."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastsam.rank_errors import reported_errors
from fastsam.stopping import StopRequest

_Value = TypeVar("_Value")

TIMEOUT = 1800.0
"""Seconds after which a collective fails by default: as long as gloo waits, time to prepare a data set."""

_LAUNCHED_WITH = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables that ``torchrun`` sets besides ``WORLD_SIZE``; other launchers may not set all of them."""


class LaunchError(ValueError):
    """Raised if processes were started such that they cannot train together."""


@dataclass(frozen=True)
class World:
    """The rank of this process and collectives over all ranks. The default is a run of one process.

    If ``world_size`` is 1, every method does nothing or returns the value of this process. Otherwise
    all ranks must call the methods in the same order.

    Attributes:
        rank: rank of this process; rank 0 writes and prints.
        world_size: number of processes.
        local_rank: rank of this process on its machine, which is the index of its GPU.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def from_process_group(cls) -> World:
        """Return the ranks of this process in the default process group.

        Raises:
            ValueError: there is no process group.
        """
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError(
                "there is no process group: start the program with torchrun and call "
                "torch.distributed.init_process_group() first"
            )
        return cls(
            dist.get_rank(), dist.get_world_size(), dist.get_node_local_rank(fallback_rank=0)
        )

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The process group of all ranks; None in a run of one process."""
        return dist.group.WORLD if self.world_size > 1 else None

    def device(self, name: str) -> str:
        """Return ``name``, with plain ``cuda`` replaced by this rank's GPU if there are several ranks."""
        return f"cuda:{self.local_rank}" if name == "cuda" and self.world_size > 1 else name

    def all_reduce(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over all ranks, which is bitwise equal on all of them.

        Tensors of one device and dtype share one all-reduce.
        """
        if self.world_size > 1:
            all_reduce_flat(tensors)

    def all_gather_rows(self, rows: Tensor) -> Tensor:
        """Return the rows of all ranks: the first row of each rank in rank order, then the second ones, ...

        This is the order of a batch whose part on rank r is ``batch[r::world_size]``. Gradients reach only
        the rows of this rank: if all ranks compute the same loss of all rows, the gradients by their own
        rows add up to that of the loss. The numbers of rows are read on the host, which
        synchronizes with the device.

        Args:
            rows: tensor whose first dimension may differ between ranks.
        """
        if self.world_size == 1:
            return rows
        count = torch.tensor([len(rows)], device=rows.device)
        counts = [torch.empty_like(count) for _ in range(self.world_size)]
        dist.all_gather(counts, count)
        sizes = torch.cat(counts).tolist()
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows.detach()
        pieces = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(pieces, padded)
        pieces = [piece[:size] for piece, size in zip(pieces, sizes, strict=True)]
        pieces[self.rank] = rows
        places = torch.cat(
            [torch.arange(size, device="cpu") * self.world_size + r for r, size in enumerate(sizes)]
        )
        return torch.cat(pieces)[places.argsort().to(rows.device)]

    def all_gather(self, value: _Value) -> list[_Value]:
        """Return the values of all ranks in rank order; they must be picklable."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def agree(self, value: Hashable) -> bool:
        """Return whether all ranks passed the same value."""
        return len(set(self.all_gather(value))) == 1

    @contextmanager
    def rank_0_first(self) -> Iterator[None]:
        """Run the block on rank 0, and then on all other ranks."""
        if self.rank != 0:
            self.barrier()
        yield
        if self.rank == 0:
            self.barrier()

    def barrier(self) -> None:
        """Wait until all ranks have reached this call."""
        if self.world_size > 1:
            dist.barrier()


def all_reduce_flat(tensors: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Replace each tensor by its sum over the ranks, with one all-reduce per device and dtype.

    Args:
        tensors: tensors of any strides.
        group: the ranks; None for the default process group.
    """
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        alike.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for members in alike.values():
        if len(members) == 1 and members[0].is_contiguous():
            # Without a copy: a block of vectors may be large.
            dist.all_reduce(members[0], group=group)
            continue
        flat = torch.cat([member.reshape(-1) for member in members])
        dist.all_reduce(flat, group=group)
        parts = torch.split(flat, [member.numel() for member in members])
        for member, part in zip(members, parts, strict=True):
            member.copy_(part.view_as(member))


def is_sharded(tensor: Tensor) -> bool:
    """Return whether ``tensor`` is a DTensor."""
    # Importing torch.distributed.tensor takes half as long as importing torch. Until another module has
    # imported it, or in a torch build without distributed support, no tensor can be a DTensor.
    dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return dtensor is not None and isinstance(tensor, dtensor)


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor; any other tensor is returned unchanged."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def launched_world_size() -> int:
    """Return the number of processes that ``torchrun`` started, or 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def torchrun_world(
    device: str,
    *,
    timeout: float = TIMEOUT,
    errors: Path | None = None,
    stop: StopRequest | None = None,
) -> Iterator[World]:
    """Initialize the process group of the processes that ``torchrun`` started, inside the context.

    Without ``torchrun`` the world is this process alone, and no process group is created.

    Args:
        device: ``cpu`` (gloo) or ``cuda`` (nccl).
        timeout: seconds after which a collective fails in which a rank does not take part.
        errors: folder for a file with the error of each rank that fails; see
            :func:`fastsam.rank_errors.reported_errors`.
        stop: request to stop by a signal; then a rank does not wait for others that are gone.

    Raises:
        RankError: a collective failed; the message names the ranks that failed or are missing.
        LaunchError: another launcher started several processes without setting torchrun's variables,
            ``device`` is neither ``cpu`` nor ``cuda``, or there are fewer GPUs than processes.
    """
    world_size = launched_world_size()
    if world_size == 1:
        yield World()
        return
    missing = [name for name in _LAUNCHED_WITH if name not in os.environ]
    if missing:
        raise LaunchError(
            f"WORLD_SIZE is {world_size}, but {', '.join(missing)} of torchrun is not set: start the "
            "processes with torchrun, or set these variables for each process"
        )
    local_rank = int(os.environ["LOCAL_RANK"])
    if device not in ("cpu", "cuda"):
        raise LaunchError(
            f"{world_size} processes require --device cpu or --device cuda, got {device}"
        )
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise LaunchError(
                f"process {local_rank} has no GPU: this machine has {torch.cuda.device_count()}; start at "
                "most one process per GPU"
            )
        torch.cuda.set_device(local_rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    rank = dist.get_rank()
    try:
        with reported_errors(rank, world_size, timeout=timeout, folder=errors, stop=stop):
            yield World(rank, world_size, local_rank)
    finally:
        dist.destroy_process_group()


def end_process(code: int) -> NoReturn:
    """End this process with an exit code, without finalizing the interpreter.

    Without it, a rank of gloo may abort after its work is done ("terminate called without an active
    exception"), and torchrun reports a finished run as failed. The reason: a thread of gloo releases the
    tensors of a collective shortly after the collective. If the interpreter is finalized first, the thread
    does not get the GIL any more. ``destroy_process_group`` leaves the thread alive while a model refers to
    the group.

    Exit handlers run, and standard output and error are flushed. Threads are not waited for.

    Args:
        code: exit code.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
