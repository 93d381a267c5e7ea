"""The start of a late SAM phase, compared with the learning rates that torch's schedulers set."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from fastsam import SAM
from fastsam.optim import StepSchedule, late_start

Make = Callable[[Optimizer], LRScheduler]


def warm(optimizer: Optimizer, epochs: int = 5) -> LRScheduler:
    return LinearLR(optimizer, 0.1, total_iters=epochs)


def sequence(optimizer: Optimizer, *parts: Make, at: list[int]) -> LRScheduler:
    return SequentialLR(optimizer, [part(optimizer) for part in parts], at)


def chain(optimizer: Optimizer, *parts: Make) -> LRScheduler:
    return ChainedScheduler([part(optimizer) for part in parts], optimizer)


DROPS: dict[str, tuple[int, Make]] = {
    "milestones": (160, lambda o: MultiStepLR(o, [160, 180], 0.01)),
    "milestones out of order": (7, lambda o: MultiStepLR(o, [20, 7, 11])),
    "a milestone twice": (7, lambda o: MultiStepLR(o, [7, 7, 11])),
    "a milestone at the beginning": (9, lambda o: MultiStepLR(o, [0, 9])),
    "equal steps": (30, lambda o: StepLR(o, 30)),
    "every epoch": (1, lambda o: StepLR(o, 1, 0.9)),
    "a warm-up first": (5 + 12, lambda o: sequence(o, warm, lambda p: StepLR(p, 12), at=[5])),
    "a constant warm-up": (
        3 + 8,
        lambda o: sequence(
            o, lambda p: ConstantLR(p, 0.2, 3), lambda p: MultiStepLR(p, [8, 9]), at=[3]
        ),
    ),
    "a warm-up that is cut off": (
        4 + 2,
        lambda o: sequence(o, lambda p: warm(p, 9), lambda p: MultiStepLR(p, [2]), at=[4]),
    ),
    "a drop when one follows the other": (
        6,
        lambda o: sequence(o, warm, lambda p: MultiStepLR(p, [0, 40]), at=[6]),
    ),
    "three in a sequence": (
        5 + 7,
        lambda o: sequence(
            o, warm, lambda p: MultiStepLR(p, [7]), lambda p: StepLR(p, 3), at=[5, 50]
        ),
    ),
    "the second of two steps": (
        20 + 3,
        lambda o: sequence(o, lambda p: StepLR(p, 30), lambda p: StepLR(p, 3), at=[20]),
    ),
    "steps that begin again": (
        3,
        lambda o: sequence(o, lambda p: StepLR(p, 3), lambda p: StepLR(p, 30), at=[20]),
    ),
    "a chain": (15, lambda o: chain(o, warm, lambda p: MultiStepLR(p, [15, 17]))),
    "a chain the other way round": (15, lambda o: chain(o, lambda p: MultiStepLR(p, [15]), warm)),
    "a chain with a drop at the end of the warm-up": (
        5,
        lambda o: chain(o, warm, lambda p: StepLR(p, 5)),
    ),
    "a chain of two steps": (
        4,
        lambda o: chain(o, lambda p: StepLR(p, 6), lambda p: StepLR(p, 4, 0.5)),
    ),
    "a chain in a sequence": (
        9,
        lambda o: sequence(
            o, lambda p: chain(p, warm, lambda q: StepLR(q, 9)), lambda p: StepLR(p, 2), at=[30]
        ),
    ),
}


def optimizer() -> Optimizer:
    return SGD([nn.Parameter(torch.ones(1))], lr=0.4)


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize("name", DROPS)
def test_the_start_is_the_first_drop_from_the_highest_learning_rate(name):
    expected, make = DROPS[name]
    owner = optimizer()
    scheduler = make(owner)
    assert late_start(scheduler) == expected
    rates = []
    for _ in range(expected + 4):
        rates.append(owner.param_groups[0]["lr"])
        owner.step()
        scheduler.step()
    assert late_start(scheduler) == expected  # at any step of the scheduler
    highest = max(range(expected), key=lambda epoch: (rates[epoch], -epoch))
    assert rates[expected] < rates[expected - 1] * 0.999
    for epoch in range(highest + 1, expected):
        assert rates[epoch] >= rates[epoch - 1] * (1 - 1e-6)
    assert max(rates) == rates[highest]


def test_epochs_have_steps():
    scheduler = MultiStepLR(optimizer(), [160, 180])
    assert late_start(scheduler, steps_per_epoch=98) == 15680
    assert late_start(scheduler, 98) == 15680
    for wrong in (0, -1, 1.5, True, None):
        with pytest.raises(ValueError, match="steps_per_epoch"):
            late_start(scheduler, wrong)  # type: ignore[arg-type]


def test_the_scheduler_may_be_on_sam():
    owner = SAM([nn.Parameter(torch.ones(1))], SGD, lr=0.1)
    assert late_start(StepLR(owner, 7)) == 7


class OwnStep(StepLR):
    """A subclass with an unknown schedule."""


OTHERS: dict[str, Callable[[Optimizer], object]] = {
    "cosine": lambda o: CosineAnnealingLR(o, 10),
    "exponential": lambda o: ExponentialLR(o, 0.9),
    "function": lambda o: LambdaLR(o, lambda epoch: 0.9**epoch),
    "one cycle": lambda o: OneCycleLR(o, 0.1, 10),
    "plateau": lambda o: ReduceLROnPlateau(o),
    "falling line": lambda o: LinearLR(o, 1.0, 0.1),
    "subclass": lambda o: OwnStep(o, 3),
    "fastsam's schedule": lambda o: StepSchedule((3,), (0.1, 0.01)),
    "cosine in a sequence": lambda o: sequence(o, warm, lambda p: CosineAnnealingLR(p, 9), at=[5]),
    "cosine in a chain": lambda o: chain(o, lambda p: StepLR(p, 3), lambda p: ExponentialLR(p, 1)),
    "none": lambda o: None,
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_schedules_need_a_share(name):
    with pytest.raises(ValueError, match=r"start=int\(0\.8 \* total_steps\)"):
        late_start(OTHERS[name](optimizer()))  # type: ignore[arg-type]


def test_a_sequence_in_a_chain_is_refused():
    owner = optimizer()
    parts = [sequence(owner, warm, lambda p: StepLR(p, 3), at=[5]), StepLR(owner, 9)]
    with pytest.raises(ValueError, match="SequentialLR"):
        late_start(ChainedScheduler(parts, owner))


@pytest.mark.parametrize(
    "make",
    [
        lambda o: MultiStepLR(o, []),
        lambda o: MultiStepLR(o, [0]),
        lambda o: MultiStepLR(o, [5], gamma=1.0),
        lambda o: StepLR(o, 5, gamma=2.0),
        warm,
        lambda o: ConstantLR(o, 0.5, 3),
    ],
)
def test_a_learning_rate_that_never_drops(make):
    with pytest.raises(ValueError, match=r"never drops.*start=int"):
        late_start(make(optimizer()))
