"""Schedules of the learning rate, rho or any other number by epoch, and the scheduler that sets rho."""

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
    """A number that depends on the epoch alone, so that a resumed run needs no state.

    Call it with an epoch, counted from 1. Subclasses define :meth:`value_at`.
    """

    def __call__(self, epoch: int) -> float:
        """Return the value in an epoch.

        Args:
            epoch: counted from 1.

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
    """One value for each phase of the training.

    Rangwani et al. 2022 use a rho of 0.05, 0.1, 0.5 and 0.5 from epochs 1, 6, 61 and 76 on:
    ``StepSchedule((5, 60, 75), (0.05, 0.1, 0.5, 0.5))``.

    Args:
        milestones: last epoch of each phase but the final one, in order. Between two equal ones there is a
            phase without an epoch.
        values: one for each phase, one more than there are milestones.

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
                f"{len(self.milestones)} milestones make {len(self.milestones) + 1} phases, "
                f"but there are {len(self.values)} values"
            )
        if list(self.milestones) != sorted(self.milestones):
            raise ValueError(f"milestones must not fall, got {tuple(self.milestones)}")

    def value_at(self, epoch: int) -> float:
        """Return the value of the phase that holds the epoch."""
        return self.values[bisect_left(self.milestones, epoch)]


@dataclass(frozen=True)
class _Ramp(Schedule):
    """From ``start`` in epoch 1 to ``end`` in epoch ``epochs``."""

    start: float
    end: float
    epochs: int

    def __post_init__(self) -> None:
        _check_epochs(self.epochs)


@dataclass(frozen=True)
class LinearSchedule(_Ramp):
    """A straight line from ``start`` in epoch 1 to ``end`` in epoch ``epochs``, and ``end`` after that.

    With one epoch it is ``start`` in that epoch.
    """

    def value_at(self, epoch: int) -> float:
        """Return the value on the line."""
        return self.start + _progress(epoch, self.epochs) * (self.end - self.start)


@dataclass(frozen=True)
class CosineSchedule(_Ramp):
    """Half a cosine from ``start`` in epoch 1 to ``end`` in epoch ``epochs``, and ``end`` after that.

    With one epoch it is ``start`` in that epoch.
    """

    def value_at(self, epoch: int) -> float:
        """Return the value on the cosine."""
        share = (1 - math.cos(math.pi * _progress(epoch, self.epochs))) / 2
        return (1 - share) * self.start + share * self.end


@dataclass(frozen=True)
class CosineAnnealing(Schedule):
    """Cosine annealing without restarts, which would reach 0 one epoch after the last.

    ``value * (1 + cos(pi * (epoch - 1) / epochs)) / 2``, as ``torch.optim.lr_scheduler.CosineAnnealingLR``
    stepped once an epoch; or ``value * (1 + cos(pi * (epoch - warmup) / (epochs - warmup + 1))) / 2``, as the
    code of Cui et al. 2021 (``paco_lt.py``). It is 0 after the last epoch.

    Args:
        value: value in the epoch that the cosine starts at.
        epochs: epochs of the training, warm-up included.
        warmup: epochs of a warm-up that the cosine follows; it is ``value`` until then. None: the cosine
            starts in epoch 1.
    """

    value: float
    epochs: int
    warmup: int | None = None

    def __post_init__(self) -> None:
        _check_epochs(self.epochs)
        if self.warmup is not None:
            check_number("warmup", self.warmup, high=self.epochs, whole=True)

    def value_at(self, epoch: int) -> float:
        """Return the value on the cosine."""
        # Each form rounds in the order of its source.
        if self.warmup is None:
            angle = math.pi * (epoch - 1) / self.epochs
        else:
            angle = math.pi * ((epoch - self.warmup) / (self.epochs - self.warmup + 1))
        return self.value * (1 + math.cos(min(max(angle, 0.0), math.pi))) / 2


@dataclass(frozen=True)
class WarmUp(Schedule):
    """A linear warm-up, ``value * epoch / epochs``, and then another schedule.

    Args:
        schedule: what follows. It counts its epochs from 1 all the same, so that its first ``epochs`` values
            are not used.
        value: value in the last epoch of the warm-up.
        epochs: epochs of the warm-up; 0 for none.
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
    """Any function of the epoch.

    Args:
        function: called with the epoch, counted from 1.
    """

    function: Callable[[int], float]

    def value_at(self, epoch: int) -> float:
        """Return what the function returns."""
        return self.function(epoch)


class RhoScheduler:
    """Sets rho in the parameter groups of an optimizer that has it, epoch after epoch.

    Args:
        optimizer: SAM or LookSAM. Its rho is set to that of epoch 1 at once. A rho that is a tensor is
            filled in place, so that a captured step sees it.
        schedule: rho by epoch for all groups, or a sequence with one schedule for each group.

    Attributes:
        epoch: the current epoch, counted from 1.

    Raises:
        TypeError: a schedule is a plain function, which may count epochs from 0 as earlier versions did.
        ValueError: there are not as many schedules as groups, or one gives a rho that is negative or not
            finite. The groups then keep the rho they had.

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
        self.optimizer = optimizer
        self.schedule = schedule
        self.epoch = 1
        self._apply(1)

    def step(self) -> None:
        """Go on to the next epoch."""
        self._apply(self.epoch + 1)

    def get_last_rho(self) -> list[float]:
        """Return rho of every group in this epoch."""
        return self._rhos(self.epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the current epoch; the schedule itself belongs to the program."""
        return {"epoch": self.epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to the epoch of a state dict and set its rho.

        Raises:
            ValueError: the state dict has no epoch, or one that an earlier version counted from 0. Nothing
                was changed.
        """
        if "last_epoch" in state_dict:
            last = state_dict["last_epoch"]
            raise ValueError(
                f"this state of RhoScheduler has last_epoch={last!r}, which an earlier version counted from "
                "0; epochs now count from 1. Check that the schedule counts from 1 too, and load "
                '{"epoch": last_epoch + 1}'
            )
        if "epoch" not in state_dict:
            raise ValueError(
                f"a state of RhoScheduler has an 'epoch', got the keys {sorted(state_dict)}; load what "
                "state_dict() returned"
            )
        self._apply(state_dict["epoch"])

    def _rhos(self, epoch: int) -> list[float]:
        groups = len(self.optimizer.param_groups)
        schedules = (
            [self.schedule] * groups if isinstance(self.schedule, Schedule) else list(self.schedule)
        )
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
        self.epoch = epoch


def _check_schedule(schedule: object) -> None:
    if not isinstance(schedule, Schedule):
        raise TypeError(
            f"a schedule must be a fastsam.optim.Schedule, got {schedule!r}. Wrap a function in "
            "FunctionSchedule(function); it is called with epochs that count from 1, not from 0"
        )


def _check_epochs(epochs: int) -> None:
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")


def _progress(epoch: int, epochs: int) -> float:
    """Return 0 in epoch 1, 1 from the last epoch on."""
    return min((epoch - 1) / max(epochs - 1, 1), 1.0)
