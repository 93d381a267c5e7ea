"""Requests to save or to stop, which all ranks see after the same step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastsam.distributed import World


class Asked(NamedTuple):
    """What any rank asked for.

    Attributes:
        stop: whether to save and stop.
        save: whether to save.
    """

    stop: bool
    save: bool


class StepRequests:
    """Tells all ranks after the same step that one of them asks to stop or to save.

    Signals arrive at different times on different ranks, and clocks differ. The requests travel with an
    all-reduce that each step makes anyway. On a GPU they are read one step late, so that the host does not
    wait for the device.

    Args:
        stop: returns whether this rank asks to stop.
        save: returns whether this rank asks to save.
        world: the ranks of the run.
        device: device of the all-reduce.
    """

    def __init__(
        self,
        stop: Callable[[], bool],
        save: Callable[[], bool],
        world: World,
        device: torch.device,
    ) -> None:
        self._stop = stop
        self._save = save
        self._world = world
        self._device = device
        self._flags = torch.zeros(2, device=device)
        self._sent = False
        self._late = _Late() if device.type == "cuda" else None

    def carry(self, like: Tensor) -> list[Tensor]:
        """Return a tensor to all-reduce together with ``like``, of its dtype; nothing if it was sent already.

        Args:
            like: a tensor that this rank reduces in the step.
        """
        if self._world.world_size == 1 or self._sent:
            return []
        self._sent = True
        self._flags = self._flags.to(like.dtype).zero_()
        for place, asks in enumerate(Asked(self._stop(), self._save())):
            if asks:
                self._flags[place] = 1
        return [self._flags]

    def after_step(self) -> Asked:
        """Return what any rank asked for before the last all-reduce. All ranks must call this together."""
        if self._world.world_size == 1:
            return Asked(self._stop(), self._save())
        self._world.all_reduce(self.carry(self._flags))  # if no pass of the step reduced anything
        self._sent = False
        flags = self._flags if self._late is None else self._late.exchange(self._flags)
        return Asked(*(flags > 0).tolist())


class _Late:
    """Copies flags from a GPU without waiting, and returns those of the step before."""

    def __init__(self) -> None:
        self._buffers = [torch.zeros(2).pin_memory() for _ in range(2)]
        self._copied: torch.cuda.Event | None = None

    def exchange(self, flags: Tensor) -> Tensor:
        if self._copied is not None:
            self._copied.synchronize()
        self._buffers.reverse()
        self._buffers[0].copy_(flags, non_blocking=True)
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied.record()
        return self._buffers[1]
