"""Schedules of rho, and the scheduler that follows one."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastsam.optim._engine.settings import check_rho
from fastsam.optim.sam import SAM


@dataclass(frozen=True)
class ConstantRho:
    """The same rho in every epoch.

    Args:
        rho: radius of the perturbation.
    """

    rho: float

    def __call__(self, epoch: int) -> float:
        """Rho of an epoch, counted from 0."""
        return self.rho


@dataclass(frozen=True)
class StepRho:
    """One rho per phase, as in Rangwani et al. 2022 (rho .05 .1 .5 .5 from epochs 0, 5, 60 and 75).

    Args:
        milestones: first epoch (counted from 0) of every phase but the first, rising.
        values: one per phase, one more than there are milestones.
    """

    milestones: Sequence[int]
    values: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.values) != len(self.milestones) + 1:
            raise ValueError(
                f"{len(self.milestones)} milestones make {len(self.milestones) + 1} phases, "
                f"but there are {len(self.values)} values"
            )
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones must rise, got {tuple(self.milestones)}")

    def __call__(self, epoch: int) -> float:
        """Rho of an epoch, counted from 0."""
        return self.values[bisect_right(self.milestones, epoch)]


@dataclass(frozen=True)
class LinearRho:
    """From ``start`` in epoch 0 to ``end`` in epoch ``epochs - 1``, and ``end`` from then on."""

    start: float
    end: float
    epochs: int

    def __post_init__(self) -> None:
        _check_epochs(self.epochs)

    def __call__(self, epoch: int) -> float:
        """Rho of an epoch, counted from 0."""
        share = _share(epoch, self.epochs)
        return (1 - share) * self.start + share * self.end


@dataclass(frozen=True)
class CosineRho:
    """Half a cosine from ``start`` in epoch 0 to ``end`` in epoch ``epochs - 1``, then ``end``."""

    start: float
    end: float
    epochs: int

    def __post_init__(self) -> None:
        _check_epochs(self.epochs)

    def __call__(self, epoch: int) -> float:
        """Rho of an epoch, counted from 0."""
        share = (1 - math.cos(math.pi * _share(epoch, self.epochs))) / 2
        return (1 - share) * self.start + share * self.end


class RhoScheduler:
    """Sets rho in the parameter groups of a SAM optimizer, epoch after epoch.

    Args:
        optimizer: the optimizer to drive. Its rho is set to that of epoch 0 at once. A rho that is a tensor
            keeps its place and is filled, so that a captured step sees it.
        schedule: rho of an epoch counted from 0, for all groups: :class:`ConstantRho`, :class:`StepRho`,
            :class:`LinearRho`, :class:`CosineRho` or any function; or a sequence of them, one per group.

    Raises:
        ValueError: there are not as many schedules as groups, or one gives a rho that is negative or not
            finite. The groups then keep the rho they had.

    Example:
        >>> import torch
        >>> from fastsam import SAM
        >>> from fastsam.optim import LinearRho, RhoScheduler
        >>> optimizer = SAM([torch.nn.Parameter(torch.ones(2))], torch.optim.SGD, lr=0.1)
        >>> scheduler = RhoScheduler(optimizer, LinearRho(0.05, 0.25, epochs=3))
        >>> for _ in range(2):
        ...     scheduler.step()
        >>> scheduler.get_last_rho()
        [0.25]
    """

    def __init__(
        self,
        optimizer: SAM,
        schedule: Callable[[int], float] | Sequence[Callable[[int], float]],
    ) -> None:
        self.optimizer = optimizer
        self.schedule = schedule
        self.last_epoch = 0
        self._apply(0)

    def step(self) -> None:
        """Goes on to the next epoch."""
        self._apply(self.last_epoch + 1)

    def get_last_rho(self) -> list[float]:
        """Rho of every group in this epoch."""
        return self._rhos(self.last_epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where the scheduler is; the schedule itself belongs to the program."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes to the epoch of a state dict and sets its rho."""
        self._apply(int(state_dict["last_epoch"]))

    def _rhos(self, epoch: int) -> list[float]:
        groups = len(self.optimizer.param_groups)
        schedules = [self.schedule] * groups if callable(self.schedule) else list(self.schedule)
        if len(schedules) != groups:
            raise ValueError(
                f"there are {len(schedules)} schedules of rho for {groups} parameter groups; pass one "
                "schedule for all of them or one for each"
            )
        rhos = [schedule(epoch) for schedule in schedules]
        for rho in rhos:
            try:
                check_rho(rho)
            except ValueError as error:
                raise ValueError(f"the schedule of rho in epoch {epoch}: {error}") from None
        return [float(rho) for rho in rhos]

    def _apply(self, epoch: int) -> None:
        rhos = self._rhos(epoch)
        for group, rho in zip(self.optimizer.param_groups, rhos, strict=True):
            if isinstance(group["rho"], Tensor):
                group["rho"].fill_(rho)
            else:
                group["rho"] = rho
        self.last_epoch = epoch


def _check_epochs(epochs: int) -> None:
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")


def _share(epoch: int, epochs: int) -> float:
    return min(epoch / max(epochs - 1, 1), 1.0)
