"""The step at which a late SAM phase begins, derived from a learning-rate schedule."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    SequentialLR,
    StepLR,
)

from fastsam.optim._engine.settings import check_number

_ROUNDING = 1e-9


def late_start(scheduler: LRScheduler, steps_per_epoch: int = 1) -> int:
    """Return the step of the first learning-rate drop, as ``start`` for SAM in the phase after it.

    Zhou et al., ICLR 2025 (arXiv 2410.10373): SAM in the last epochs nearly matches SAM in all of them.
    The drop is the first decrease from the highest learning rate, so a warm-up does not count.

    Args:
        scheduler: a ``MultiStepLR`` or a ``StepLR``; or a ``SequentialLR`` or ``ChainedScheduler`` that
            combines them with warm-ups, which are a ``ConstantLR`` or a rising ``LinearLR``. It may have been
            stepped before.
        steps_per_epoch: number of optimizer steps between two calls of ``scheduler.step()``. Default 1.

    Returns:
        The number of optimizer steps before the drop.

    Raises:
        ValueError: the scheduler is of another type, for example one that decays continuously, or its
            learning rate never drops.

    Example:
        >>> import torch
        >>> from fastsam.optim import late_start
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
        >>> scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [160, 180], gamma=0.01)
        >>> late_start(scheduler, steps_per_epoch=98)
        15680
    """
    check_number("steps_per_epoch", steps_per_epoch, low=1, whole=True)
    factors = [_factor(scheduler, epoch) for epoch in range(_constant_from(scheduler) + 1)]
    highest = factors.index(max(factors))
    for epoch in range(highest + 1, len(factors)):
        if factors[epoch] < factors[epoch - 1] * (1 - _ROUNDING):
            return epoch * steps_per_epoch
    raise ValueError(
        f"the learning rate of this {type(scheduler).__name__} never drops; {_EXPLICIT_SHARE}"
    )


_EXPLICIT_SHARE = (
    "set the start of the late phase explicitly, for example start=int(0.8 * total_steps)"
)


def _factor(scheduler: LRScheduler, epoch: int) -> float:
    """Return the learning rate in an epoch, counted from 0, as a multiple of the base learning rate."""
    kind = type(scheduler)
    if isinstance(scheduler, MultiStepLR) and kind is MultiStepLR:
        return float(scheduler.gamma ** bisect_right(_milestones(scheduler), epoch))
    if isinstance(scheduler, StepLR) and kind is StepLR:
        return float(scheduler.gamma ** (epoch // scheduler.step_size))
    if isinstance(scheduler, ConstantLR) and kind is ConstantLR:
        return float(scheduler.factor) if epoch < scheduler.total_iters else 1.0
    if isinstance(scheduler, LinearLR) and _rises(scheduler):
        share = min(epoch / max(scheduler.total_iters, 1), 1.0)
        return float(scheduler.start_factor * (1 - share) + scheduler.end_factor * share)
    if isinstance(scheduler, SequentialLR) and kind is SequentialLR:
        index = bisect_right(scheduler._milestones, epoch)
        begin = scheduler._milestones[index - 1] if index else 0
        return _factor(scheduler._schedulers[index], epoch - begin)
    if isinstance(scheduler, ChainedScheduler) and kind is ChainedScheduler:
        # A sequence inside a chain sets the learning rate and overwrites the factors of the others.
        _refuse_sequences(scheduler._schedulers)
        return math.prod(_factor(part, epoch) for part in scheduler._schedulers)
    raise _unknown(scheduler)


def _constant_from(scheduler: LRScheduler) -> int:
    """Return an epoch by which the first drop has happened, if there is one."""
    if isinstance(scheduler, MultiStepLR):
        return max(_milestones(scheduler), default=0)
    if isinstance(scheduler, StepLR):
        return int(scheduler.step_size)
    if isinstance(scheduler, (ConstantLR, LinearLR)):
        return int(scheduler.total_iters)
    if isinstance(scheduler, SequentialLR):
        last = scheduler._schedulers[-1]
        return int(max(scheduler._milestones, default=0)) + _constant_from(last)
    if isinstance(scheduler, ChainedScheduler):
        return sum(map(_constant_from, scheduler._schedulers))
    raise _unknown(scheduler)


def _milestones(scheduler: MultiStepLR) -> list[int]:
    return sorted(scheduler.milestones.elements())


def _rises(scheduler: LinearLR) -> bool:
    return type(scheduler) is LinearLR and scheduler.end_factor >= scheduler.start_factor


def _refuse_sequences(schedulers: Sequence[LRScheduler]) -> None:
    for part in schedulers:
        if isinstance(part, SequentialLR):
            raise _unknown(part)


def _unknown(scheduler: object) -> ValueError:
    return ValueError(
        f"late_start does not know where {type(scheduler).__name__} first lowers the learning rate; "
        "expected MultiStepLR or StepLR, alone or in SequentialLR or ChainedScheduler with a LinearLR or "
        f"ConstantLR warm-up. For other schedules {_EXPLICIT_SHARE}"
    )
