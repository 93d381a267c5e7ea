"""One run on several processes, as started by ``torchrun``: who this process is, and sums over all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fastsam.longtail.errors import UsageError

_LAUNCHED_WITH = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What ``torchrun`` tells each process besides their number; other launchers leave some of it out."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run.

    Attributes:
        rank: this process, 0 for the one that writes and prints.
        size: number of processes.
        local: this process among those of its machine, which is the GPU that it uses.
    """

    rank: int = 0
    size: int = 1
    local: int = 0

    def device(self, name: str) -> str:
        """``name``, with the GPU of this process where ``cuda`` leaves it open."""
        return f"cuda:{self.local}" if name == "cuda" and self.size > 1 else name

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, the same bits on each of them.

        One exchange for each device and dtype.
        """
        if self.size == 1:
            return
        alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for tensor in tensors:
            alike.setdefault((tensor.device, tensor.dtype), []).append(tensor)
        for members in alike.values():
            flat = torch.cat([member.reshape(-1) for member in members])
            dist.all_reduce(flat)
            parts = torch.split(flat, [member.numel() for member in members])
            for member, part in zip(members, parts, strict=True):
                member.copy_(part.view_as(member))

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()


def launched_processes() -> int:
    """How many processes ``torchrun`` started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def ranks_of_torchrun(device: str) -> Iterator[Ranks]:
    """The processes that ``torchrun`` started, connected while the context lasts; else this one alone.

    Args:
        device: ``cpu`` (gloo) or ``cuda`` (nccl).

    Raises:
        UsageError: several processes that another launcher started and that do not know of each
            other, that share one named GPU, or that want more GPUs than there are.
    """
    size = launched_processes()
    if size == 1:
        yield Ranks()
        return
    missing = [name for name in _LAUNCHED_WITH if name not in os.environ]
    if missing:
        raise UsageError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} of torchrun is not set: start the "
            "processes with torchrun, or set it for each of them"
        )
    local = int(os.environ["LOCAL_RANK"])
    if device not in ("cpu", "cuda"):
        raise UsageError(f"{size} processes need --device cpu or cuda, not {device}")
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise UsageError(
                f"process {local} has no GPU: there are {torch.cuda.device_count()}; start fewer"
            )
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), size, local)
    finally:
        dist.destroy_process_group()
