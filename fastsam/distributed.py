"""The processes of one run: who this process is, all-reduce, gather and barrier over torch.distributed."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_Value = TypeVar("_Value")

_LAUNCHED_WITH = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What ``torchrun`` sets besides ``WORLD_SIZE``; other launchers leave some of it out."""


class LaunchError(ValueError):
    """Processes were started in a way in which they cannot train together."""


@dataclass(frozen=True)
class World:
    """This process among the processes of a run; the default is a run of one process.

    Every method is a no-op, or returns this process's own value, where ``world_size`` is 1. Otherwise
    all ranks must call it, in the same order.

    Attributes:
        rank: number of this process; rank 0 writes and prints.
        world_size: number of processes.
        local_rank: number of this process on its machine, which is the index of the GPU it uses.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def from_process_group(cls) -> World:
        """Return this process's place in the default process group.

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
        """Return ``name``; plain ``cuda`` becomes the GPU of this process where there are several."""
        return f"cuda:{self.local_rank}" if name == "cuda" and self.world_size > 1 else name

    def all_reduce(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over all ranks, with the same bits on each of them.

        Tensors of one device and dtype are reduced together, in one exchange.
        """
        if self.world_size == 1:
            return
        alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for tensor in tensors:
            alike.setdefault((tensor.device, tensor.dtype), []).append(tensor)
        for members in alike.values():
            if len(members) == 1 and members[0].is_contiguous():
                dist.all_reduce(members[0])  # in place: a block of vectors may be large
                continue
            flat = torch.cat([member.reshape(-1) for member in members])
            dist.all_reduce(flat)
            parts = torch.split(flat, [member.numel() for member in members])
            for member, part in zip(members, parts, strict=True):
                member.copy_(part.view_as(member))

    def all_gather(self, value: _Value) -> list[_Value]:
        """Return the values of all ranks, in the order of the ranks; they must be picklable."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def agree(self, value: Hashable) -> bool:
        """Return whether all ranks passed the same value."""
        return len(set(self.all_gather(value))) == 1

    def barrier(self) -> None:
        """Wait until every rank has come this far."""
        if self.world_size > 1:
            dist.barrier()


def launched_world_size() -> int:
    """Return the number of processes that ``torchrun`` started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def torchrun_world(device: str) -> Iterator[World]:
    """Connect the processes that ``torchrun`` started, as long as the context lasts.

    Without ``torchrun`` the world is this process alone, and no process group is made.

    Args:
        device: ``cpu`` (gloo) or ``cuda`` (nccl).

    Raises:
        LaunchError: another launcher started several processes without what torchrun tells them, they
            share one named GPU, or there are fewer GPUs than processes.
    """
    world_size = launched_world_size()
    if world_size == 1:
        yield World()
        return
    missing = [name for name in _LAUNCHED_WITH if name not in os.environ]
    if missing:
        raise LaunchError(
            f"WORLD_SIZE is {world_size}, but {', '.join(missing)} of torchrun is not set: start the "
            "processes with torchrun, or set it for each of them"
        )
    local_rank = int(os.environ["LOCAL_RANK"])
    if device not in ("cpu", "cuda"):
        raise LaunchError(f"{world_size} processes need --device cpu or cuda, not {device}")
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise LaunchError(
                f"process {local_rank} has no GPU: there are {torch.cuda.device_count()}; start fewer"
            )
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), world_size, local_rank)
    finally:
        dist.destroy_process_group()
