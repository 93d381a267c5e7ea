"""Schedules of the learning rate, rho or other numbers by epoch, and a scheduler that sets rho."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from fastsam.optim._engine.settings import check_number, check_rho


class Schedule(ABC):
    """Base class of schedules: a number as a function of the epoch, so a resumed run needs no state.

    Call a schedule with an epoch, counted from 1. Subclasses define :meth:`value_at`.
    """

    def __call__(self, epoch: int) -> float:
        """Return the value in an epoch.

        Args:
            epoch: epoch, counted from 1.

        Raises:
            ValueError: ``epoch`` is not an integer >= 1.
        """
        check_number("epoch (counted from 1)", epoch, low=1, whole=True)
        return self.value_at(epoch)

    @abstractmethod
    def value_at(self, epoch: int) -> float:
        """Return the value in an epoch >= 1."""


@dataclass(frozen=True)
class StepSchedule(Schedule):
    """A constant value in each phase of the training.

    Rangwani et al. 2022 use a rho of 0.05, 0.1, 0.5 and 0.5 from epochs 1, 6, 61 and 76 on:
    ``StepSchedule((5, 60, 75), (0.05, 0.1, 0.5, 0.5))``.

    Args:
        milestones: last epoch of every phase except the final one, in ascending order. Two equal milestones
            make an empty phase.
        values: value of each phase; one more than there are milestones.

    Raises:
        ValueError: the number of values is wrong, or the milestones are not in order.

    Example:
        >>> schedule = StepSchedule((160, 180), (0.1, 0.001, 0.00001))
        >>> [schedule(epoch) for epoch in (160, 161, 181)]
        [0.1, 0.001, 1e-05]
    """

    milestones: Sequence[int]
    values: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.values) != len(self.milestones) + 1:
            raise ValueError(
                f"{len(self.milestones)} milestones make {len(self.milestones) + 1} phases, but got "
                f"{len(self.values)} values; pass one value per phase"
            )
        if list(self.milestones) != sorted(self.milestones):
            raise ValueError(f"milestones must be in ascending order, got {tuple(self.milestones)}")

    def value_at(self, epoch: int) -> float:
        """Return the value of the phase that contains the epoch."""
        return self.values[bisect_left(self.milestones, epoch)]


@dataclass(frozen=True)
class _Ramp(Schedule):
    """A schedule from ``start`` in epoch 1 to ``end`` in epoch ``epochs``."""

    start: float
    end: float
    epochs: int

    def __post_init__(self) -> None:
        check_number("epochs", self.epochs, low=1, whole=True)


@dataclass(frozen=True)
class LinearSchedule(_Ramp):
    """A line from ``start`` in epoch 1 to ``end`` in epoch ``epochs``, and ``end`` afterwards.

    If ``epochs`` is 1, the value in epoch 1 is ``start``.

    Example:
        >>> [LinearSchedule(0.0, 1.0, epochs=3)(epoch) for epoch in (1, 2, 3, 4)]
        [0.0, 0.5, 1.0, 1.0]
    """

    def value_at(self, epoch: int) -> float:
        """Return the value on the line."""
        return self.start + _progress(epoch, self.epochs) * (self.end - self.start)


@dataclass(frozen=True)
class CosineSchedule(_Ramp):
    """Half a cosine from ``start`` in epoch 1 to ``end`` in epoch ``epochs``, and ``end`` afterwards.

    If ``epochs`` is 1, the value in epoch 1 is ``start``.

    Example:
        >>> [round(CosineSchedule(0.0, 1.0, epochs=5)(epoch), 3) for epoch in (1, 2, 3, 5)]
        [0.0, 0.146, 0.5, 1.0]
    """

    def value_at(self, epoch: int) -> float:
        """Return the value on the cosine."""
        share = (1 - math.cos(math.pi * _progress(epoch, self.epochs))) / 2
        return (1 - share) * self.start + share * self.end


@dataclass(frozen=True)
class CosineAnnealing(Schedule):
    """Cosine annealing without restarts to 0 in epoch ``epochs + 1``, one epoch after the last.

    Without a warm-up, ``value * (1 + cos(pi * (epoch - 1) / epochs)) / 2``, which is
    ``torch.optim.lr_scheduler.CosineAnnealingLR`` stepped once per epoch. With a warm-up,
    ``value * (1 + cos(pi * (epoch - warmup) / (epochs - warmup + 1))) / 2``, from the code of Cui et al. 2021
    (``paco_lt.py``). After the last epoch it is 0.

    Args:
        value: value in the first epoch of the cosine.
        epochs: number of epochs of the training, including the warm-up.
        warmup: number of warm-up epochs before the cosine; the value is ``value`` during the warm-up.
            Default None: the cosine starts in epoch 1.

    Raises:
        ValueError: ``epochs`` is not an integer >= 1, or ``warmup`` is not an integer from 0 to ``epochs``.

    Example:
        >>> [round(CosineAnnealing(0.1, epochs=4)(epoch), 4) for epoch in (1, 3, 5)]
        [0.1, 0.05, 0.0]
    """

    value: float
    epochs: int
    warmup: int | None = None

    def __post_init__(self) -> None:
        check_number("epochs", self.epochs, low=1, whole=True)
        if self.warmup is not None:
            check_number("warmup", self.warmup, high=self.epochs, whole=True)

    def value_at(self, epoch: int) -> float:
        """Return the value on the cosine."""
        # Each formula multiplies in the order of its source, so that it rounds alike.
        if self.warmup is None:
            angle = math.pi * (epoch - 1) / self.epochs
        else:
            angle = math.pi * ((epoch - self.warmup) / (self.epochs - self.warmup + 1))
        return self.value * (1 + math.cos(min(max(angle, 0.0), math.pi))) / 2


@dataclass(frozen=True)
class WarmUp(Schedule):
    """A linear warm-up, ``value * epoch / epochs``, followed by another schedule.

    Args:
        schedule: schedule after the warm-up. It is called with the epoch of the training, so its first
            ``epochs`` values are not used.
        value: value in the last epoch of the warm-up.
        epochs: number of warm-up epochs; 0 for no warm-up.

    Raises:
        TypeError: ``schedule`` is not a :class:`Schedule`.
        ValueError: ``epochs`` is not an integer >= 0.

    Example:
        >>> schedule = WarmUp(StepSchedule((160,), (0.1, 0.01)), value=0.1, epochs=5)
        >>> [schedule(epoch) for epoch in (1, 5, 161)]
        [0.02, 0.1, 0.01]
    """

    schedule: Schedule
    value: float
    epochs: int

    def __post_init__(self) -> None:
        _check_schedule(self.schedule)
        check_number("epochs", self.epochs, whole=True)

    def value_at(self, epoch: int) -> float:
        """Return the value of the warm-up or of the schedule that follows."""
        if epoch <= self.epochs:
            return self.value * epoch / self.epochs
        return self.schedule(epoch)


@dataclass(frozen=True)
class FunctionSchedule(Schedule):
    """A schedule that calls a function of the epoch.

    Args:
        function: called with the epoch, counted from 1; returns the value.

    Example:
        >>> FunctionSchedule(lambda epoch: 0.1 / epoch)(2)
        0.05
    """

    function: Callable[[int], float]

    def value_at(self, epoch: int) -> float:
        """Return the result of the function."""
        return self.function(epoch)


class RhoScheduler:
    """Sets rho in an optimizer's parameter groups, epoch by epoch.

    Args:
        optimizer: SAM, LookSAM, or another optimizer whose groups have SAM's ``rho`` and ``adaptive``. The
            constructor sets its rho to the value of epoch 1. A rho that is a tensor is filled in place, so
            that a captured step uses the new value.
        schedule: rho by epoch for all groups, or a sequence with one schedule per group.

    Attributes:
        epoch: the current epoch, counted from 1.

    Raises:
        TypeError: the optimizer has no rho, or a ``rho`` of another meaning (Adadelta's decay rate); or a
            schedule is not a :class:`Schedule`. Plain functions are not accepted, because those written for
            earlier versions count epochs from 0.
        ValueError: the number of schedules differs from the number of groups, or a schedule returns a rho
            that is negative or not finite. No rho was changed.

    Example:
        >>> import torch
        >>> from fastsam import SAM
        >>> from fastsam.optim import LinearSchedule, RhoScheduler
        >>> optimizer = SAM([torch.nn.Parameter(torch.ones(2))], torch.optim.SGD, lr=0.1)
        >>> scheduler = RhoScheduler(optimizer, LinearSchedule(0.05, 0.25, epochs=3))
        >>> for _ in range(2):
        ...     scheduler.step()
        >>> scheduler.epoch, scheduler.get_last_rho()
        (3, [0.25])
    """

    def __init__(self, optimizer: Optimizer, schedule: Schedule | Sequence[Schedule]) -> None:
        for each in schedule if isinstance(schedule, Sequence) else [schedule]:
            _check_schedule(each)
        _check_optimizer(optimizer)
        self.optimizer = optimizer
        self.schedule = schedule
        self.epoch = 1
        self._apply(1)

    def step(self) -> None:
        """Advance to the next epoch and set its rho."""
        self._apply(self.epoch + 1)

    def get_last_rho(self) -> list[float]:
        """Return the rho of every group in the current epoch."""
        return self._rhos(self.epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the current epoch. The schedule is not included."""
        return {"epoch": self.epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the epoch of a state dict and set its rho.

        Raises:
            ValueError: the state dict has no epoch, or comes from an earlier version, which counted epochs
                from 0. Nothing was changed.
        """
        if "last_epoch" in state_dict:
            last = state_dict["last_epoch"]
            raise ValueError(
                f"this state dict of RhoScheduler has last_epoch={last!r}, which an earlier version counted "
                "from 0; epochs now count from 1. Check that the schedule counts from 1 too, and load "
                '{"epoch": last_epoch + 1}'
            )
        if "epoch" not in state_dict:
            raise ValueError(
                f"a state dict of RhoScheduler must have the key 'epoch', got {sorted(state_dict)}; load the "
                "result of state_dict()"
            )
        self._apply(state_dict["epoch"])

    def _rhos(self, epoch: int) -> list[float]:
        groups = len(self.optimizer.param_groups)
        schedules = (
            [self.schedule] * groups if isinstance(self.schedule, Schedule) else list(self.schedule)
        )
        if len(schedules) != groups:
            raise ValueError(
                f"got {len(schedules)} schedules of rho for {groups} parameter groups; pass one schedule for "
                "all groups or one per group"
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
        written: set[int] = set()
        for group, rho in zip(self.optimizer.param_groups, rhos, strict=True):
            if isinstance(group["rho"], Tensor):
                if id(group["rho"]) in written:  # groups made from one tensor share it
                    group["rho"] = group["rho"].clone()
                written.add(id(group["rho"]))
                group["rho"].fill_(rho)
            else:
                group["rho"] = rho
        self.epoch = epoch


def _check_optimizer(optimizer: Optimizer) -> None:
    # The rho of Adadelta is a decay rate. Only that of SAM comes with "adaptive".
    if not all(group.keys() >= {"rho", "adaptive"} for group in optimizer.param_groups):
        raise TypeError(
            f"{type(optimizer).__name__} does not have SAM's rho: pass SAM or LookSAM to RhoScheduler"
        )


def _check_schedule(schedule: object) -> None:
    if not isinstance(schedule, Schedule):
        raise TypeError(
            f"a schedule must be a fastsam.optim.Schedule, got {schedule!r}. Wrap a function in "
            "FunctionSchedule(function), which calls it with epochs counted from 1, not from 0"
        )


def _progress(epoch: int, epochs: int) -> float:
    """Return 0 in epoch 1, 1 from the last epoch on."""
    return min((epoch - 1) / max(epochs - 1, 1), 1.0)
