"""Schedules by epoch, and the scheduler that sets rho."""

from __future__ import annotations

import dataclasses
import math
import pickle
from bisect import bisect_right
from typing import Any

import pytest
import torch
from torch import nn

import fastsam.optim
from fastsam import SAM
from fastsam.optim import (
    CosineAnnealing,
    CosineSchedule,
    FunctionSchedule,
    LinearSchedule,
    LookSAM,
    RhoScheduler,
    Schedule,
    StepSchedule,
    WarmUp,
)

ALL: dict[str, Schedule] = {
    "step": StepSchedule((2, 3), (0.05, 0.1, 0.5)),
    "linear": LinearSchedule(0.1, 0.5, epochs=5),
    "cosine": CosineSchedule(0.1, 0.5, epochs=5),
    "annealing": CosineAnnealing(0.1, 5),
    "annealing after a warm-up": CosineAnnealing(0.1, 5, warmup=2),
    "warm-up": WarmUp(StepSchedule((), (0.1,)), 0.1, 3),
    "function": FunctionSchedule(float),
}


def build(groups: int = 1, rho: Any = 0.05) -> SAM:
    return SAM(
        [{"params": [nn.Parameter(torch.ones(2))]} for _ in range(groups)],
        torch.optim.SGD,
        rho=rho,
        lr=0.1,
    )


def constant(rho: float) -> Schedule:
    return StepSchedule((), (rho,))


def values(schedule: Schedule, epochs: int) -> list[float]:
    return [schedule(epoch) for epoch in range(1, epochs + 1)]


def test_steps() -> None:
    """A milestone is the last epoch of its phase."""
    assert values(StepSchedule((2, 3), (0.05, 0.1, 0.5)), 5) == [0.05, 0.05, 0.1, 0.5, 0.5]
    assert values(StepSchedule((0, 1), (0.05, 0.1, 0.5)), 3) == [0.1, 0.5, 0.5]
    assert values(StepSchedule((2, 2), (0.05, 0.1, 0.5)), 3) == [0.05, 0.05, 0.5]


def test_step_schedule_uses_the_numbers_of_the_former_step_rho() -> None:
    """Its milestones were the first epochs of the phases, counted from 0."""
    milestones, rhos = (5, 60, 75), (0.05, 0.1, 0.5, 0.8)
    before = [rhos[bisect_right(milestones, epoch)] for epoch in range(100)]
    assert values(StepSchedule(milestones, rhos), 100) == before


def test_linear() -> None:
    found = values(LinearSchedule(0.1, 0.5, epochs=5), 7)
    assert found == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5])
    assert values(LinearSchedule(0.1, 0.5, epochs=1), 2) == [0.1, 0.5]


def test_cosine() -> None:
    """The bits of the earlier CosineRho, which counted from 0."""
    found = values(CosineSchedule(0.5, 0.1, epochs=5), 6)
    assert found == pytest.approx([0.5, 0.3 + 0.2 * 0.5**0.5, 0.3, 0.3 - 0.2 * 0.5**0.5, 0.1, 0.1])
    shares = [(1 - math.cos(math.pi * min(epoch / 12, 1.0))) / 2 for epoch in range(15)]
    before = [(1 - share) * 0.07 + share * 0.31 for share in shares]
    assert values(CosineSchedule(0.07, 0.31, epochs=13), 15) == before


def test_cosine_annealing() -> None:
    expected = [0.3 * (1 + math.cos(math.pi * epoch / 7)) / 2 for epoch in range(8)]
    assert values(CosineAnnealing(0.3, 7), 9) == [*expected, 0.0]
    after = [0.3] * 3 + [0.3 * (1 + math.cos(math.pi * (k / 5))) / 2 for k in range(1, 6)]
    assert values(CosineAnnealing(0.3, 7, warmup=3), 9) == [*after, 0.0]
    before = [0.3 * (1 + math.cos(math.pi * (k / 8))) / 2 for k in range(1, 9)]
    assert values(CosineAnnealing(0.3, 7, warmup=0), 8) == before


def test_warm_up() -> None:
    following = StepSchedule((4,), (0.9, 0.1))
    assert values(WarmUp(following, 0.6, 3), 6) == [0.6 / 3, 0.6 * 2 / 3, 0.6, 0.9, 0.1, 0.1]
    assert values(WarmUp(following, 0.6, 0), 6) == values(following, 6)


@pytest.mark.parametrize("epoch", [0, -1, 1.5, True, "1", float("nan")])
@pytest.mark.parametrize("name", ALL)
def test_epochs_count_from_one(name: str, epoch: Any) -> None:
    with pytest.raises(ValueError, match=r"epoch \(counted from 1\) must be an integer >= 1, got"):
        ALL[name](epoch)


@pytest.mark.parametrize("name", ALL)
def test_schedules_are_frozen_values(name: str) -> None:
    schedule = ALL[name]
    copy = pickle.loads(pickle.dumps(schedule))
    assert copy == schedule
    assert values(copy, 6) == values(schedule, 6)
    field = dataclasses.fields(schedule)[0].name  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(schedule, field, 1)


def test_bad_schedules() -> None:
    with pytest.raises(ValueError, match="2 phases, but got 3 values"):
        StepSchedule((1,), (0.1, 0.2, 0.3))
    with pytest.raises(ValueError, match=r"must be in ascending order, got \(3, 2\)"):
        StepSchedule((3, 2), (0.1, 0.2, 0.3))
    for kind in (LinearSchedule, CosineSchedule):
        for epochs in (0, 2.5, True):
            with pytest.raises(ValueError, match=f"epochs must be an integer >= 1, got {epochs}"):
                kind(0.1, 0.2, epochs)
    for epochs in (0, 2.5):
        with pytest.raises(ValueError, match=f"epochs must be an integer >= 1, got {epochs}"):
            CosineAnnealing(0.1, epochs)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="warmup must be an integer >= 0 and <= 5, got 6"):
        CosineAnnealing(0.1, 5, warmup=6)
    with pytest.raises(ValueError, match="epochs must be an integer"):
        WarmUp(constant(0.1), 0.1, -1)
    with pytest.raises(TypeError, match="FunctionSchedule"):
        WarmUp(lambda epoch: 0.1, 0.1, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1 schedules of rho for 2"):
        RhoScheduler(build(groups=2), [constant(0.1)])


# --- the scheduler ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_the_scheduler_begins_in_epoch_one(name: str) -> None:
    optimizer = build()
    scheduler = RhoScheduler(optimizer, ALL[name])
    seen = []
    for epoch in range(1, 7):
        assert scheduler.epoch == epoch
        seen.append(optimizer.param_groups[0]["rho"])
        assert scheduler.get_last_rho() == [seen[-1]]
        scheduler.step()
    assert seen == values(ALL[name], 6)


def test_one_schedule_per_group() -> None:
    optimizer = build(groups=2)
    scheduler = RhoScheduler(
        optimizer, [FunctionSchedule(lambda epoch: epoch / 4), StepSchedule((1,), (0.1, 0.2))]
    )
    scheduler.step()
    assert [group["rho"] for group in optimizer.param_groups] == [0.5, 0.2]
    assert scheduler.get_last_rho() == [0.5, 0.2]


def test_groups_made_from_one_tensor_get_their_own_rho() -> None:
    optimizer = build(groups=2, rho=torch.tensor(0.05))
    scheduler = RhoScheduler(optimizer, [constant(0.1), StepSchedule((1,), (0.7, 0.8))])
    for expected in ([0.1, 0.7], [0.1, 0.8]):
        rhos = [float(group["rho"]) for group in optimizer.param_groups]
        assert rhos == pytest.approx(expected) == scheduler.get_last_rho()
        scheduler.step()


def test_looksam_has_a_rho_too() -> None:
    optimizer = LookSAM(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1))
    RhoScheduler(optimizer, constant(0.3))
    assert optimizer.sam.param_groups[0]["rho"] == 0.3


def test_the_optimizer_uses_the_scheduled_rho() -> None:
    optimizer = build()
    parameter = optimizer.param_groups[0]["params"][0]
    scheduler = RhoScheduler(optimizer, LinearSchedule(0.5, 2.0, epochs=2))
    for rho in (0.5, 2.0):
        parameter.grad = torch.tensor([0.0, 3.0])
        optimizer.first_step()
        assert parameter.tolist() == [1.0, 1.0 + rho]
        optimizer.restore()
        scheduler.step()


def test_a_tensor_is_filled_in_place() -> None:
    rho = torch.tensor(0.05)
    optimizer = build(rho=rho)
    kept = optimizer.param_groups[0]["rho"]
    RhoScheduler(optimizer, constant(0.25))
    assert optimizer.param_groups[0]["rho"] is kept
    assert float(kept) == 0.25


@pytest.mark.parametrize("schedule", [LinearSchedule(0.1, 0.9, 9), StepSchedule((4,), (0.1, 0.2))])
def test_resuming(schedule: Schedule) -> None:
    scheduler = RhoScheduler(build(), schedule)
    for _ in range(5):
        scheduler.step()
    assert scheduler.state_dict() == {"epoch": 6}
    optimizer = build()
    resumed = RhoScheduler(optimizer, pickle.loads(pickle.dumps(schedule)))
    resumed.load_state_dict(pickle.loads(pickle.dumps(scheduler.state_dict())))
    assert optimizer.param_groups[0]["rho"] == scheduler.get_last_rho()[0]
    scheduler.step()
    resumed.step()
    assert resumed.get_last_rho() == scheduler.get_last_rho()
    assert resumed.epoch == 7


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adadelta])
def test_an_optimizer_without_the_rho_of_sam_is_refused(kind: type[torch.optim.Optimizer]) -> None:
    optimizer = kind([nn.Parameter(torch.ones(2))], lr=0.1)  # type: ignore[call-arg]
    before = dict(optimizer.param_groups[0])
    with pytest.raises(TypeError, match=rf"{kind.__name__} does not have SAM's rho"):
        RhoScheduler(optimizer, constant(0.25))
    assert optimizer.param_groups[0] == before


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_a_bad_rho_changes_nothing(bad: float) -> None:
    optimizer = build(groups=2)
    scheduler = RhoScheduler(
        optimizer, [constant(0.1), FunctionSchedule(lambda epoch: bad if epoch > 1 else 0.2)]
    )
    with pytest.raises(ValueError, match="in epoch 2"):
        scheduler.step()
    assert [group["rho"] for group in optimizer.param_groups] == [0.1, 0.2]
    assert scheduler.epoch == 1


# --- code of earlier versions, which counted from 0 ---------------------------------------------


@pytest.mark.parametrize("many", [False, True])
def test_a_plain_function_is_refused(many: bool) -> None:
    def function(epoch: int) -> float:
        return 0.3

    optimizer = build()
    with pytest.raises(
        TypeError, match=r"FunctionSchedule\(function\).*counted from 1, not from 0"
    ):
        RhoScheduler(optimizer, [function] if many else function)  # type: ignore[arg-type, list-item]
    assert optimizer.param_groups[0]["rho"] == 0.05


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"last_epoch": 4}, "last_epoch=4.*counted from 0.*epochs now count from 1"),
        ({"last_epoch": 4, "epoch": 5}, "counted from 0"),
        ({"step": 4}, r"must have the key 'epoch', got \['step'\]"),
        ({"epoch": 0}, "counted from 1"),
    ],
)
def test_invalid_state_dicts_are_refused(state: dict[str, Any], message: str) -> None:
    optimizer = build()
    scheduler = RhoScheduler(optimizer, LinearSchedule(0.1, 0.9, 9))
    with pytest.raises(ValueError, match=message):
        scheduler.load_state_dict(state)
    assert scheduler.epoch == 1
    assert optimizer.param_groups[0]["rho"] == 0.1


@pytest.mark.parametrize(
    ("name", "replacement"),
    [
        ("StepRho", "StepSchedule"),
        ("LinearRho", "LinearSchedule"),
        ("CosineRho", "CosineSchedule"),
        ("ConstantRho", "needs no schedule"),
    ],
)
def test_removed_names_raise_with_their_replacement(name: str, replacement: str) -> None:
    message = f"{name} was removed.*{replacement}.*from 1, not from 0"
    with pytest.raises(ImportError, match=message):
        exec(f"from fastsam.optim import {name}")
    with pytest.raises(ImportError, match=message):
        getattr(fastsam.optim, name)


def test_other_unknown_names_are_attribute_errors() -> None:
    assert not hasattr(fastsam.optim, "SquareSchedule")
