"""Schedules of rho."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from fastsam import SAM
from fastsam.optim import ConstantRho, CosineRho, LinearRho, RhoScheduler, StepRho


def build(groups: int = 1, rho=0.05) -> SAM:
    return SAM(
        [{"params": [nn.Parameter(torch.ones(2))]} for _ in range(groups)],
        torch.optim.SGD,
        rho=rho,
        lr=0.1,
    )


def run(schedule, epochs: int) -> list[float]:
    optimizer = build()
    scheduler = RhoScheduler(optimizer, schedule)
    seen = []
    for _ in range(epochs):
        seen.append(optimizer.param_groups[0]["rho"])
        assert scheduler.get_last_rho() == [seen[-1]]
        scheduler.step()
    return seen


def test_constant():
    assert run(ConstantRho(0.3), 3) == [0.3] * 3


def test_steps():
    """The first epoch of a phase has the phase's value."""
    assert run(StepRho((2, 3), (0.05, 0.1, 0.5)), 5) == [0.05, 0.05, 0.1, 0.5, 0.5]


def test_linear():
    assert run(LinearRho(0.1, 0.5, epochs=5), 7) == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5]
    )
    assert run(LinearRho(0.1, 0.5, epochs=1), 2) == [0.1, 0.5]


def test_cosine():
    found = run(CosineRho(0.5, 0.1, epochs=5), 6)
    assert found == pytest.approx([0.5, 0.3 + 0.2 * 0.5**0.5, 0.3, 0.3 - 0.2 * 0.5**0.5, 0.1, 0.1])


def test_a_function_and_one_schedule_per_group():
    optimizer = build(groups=2)
    scheduler = RhoScheduler(optimizer, [lambda epoch: epoch / 4, ConstantRho(0.2)])
    scheduler.step()
    assert [group["rho"] for group in optimizer.param_groups] == [0.25, 0.2]
    assert scheduler.get_last_rho() == [0.25, 0.2]


def test_the_optimizer_climbs_by_the_scheduled_rho():
    optimizer = build()
    parameter = optimizer.param_groups[0]["params"][0]
    scheduler = RhoScheduler(optimizer, LinearRho(0.5, 2.0, epochs=2))
    for rho in (0.5, 2.0):
        parameter.grad = torch.tensor([0.0, 3.0])
        optimizer.first_step()
        assert parameter.tolist() == [1.0, 1.0 + rho]
        optimizer.restore()
        scheduler.step()


def test_a_tensor_is_filled_in_place():
    rho = torch.tensor(0.05)
    optimizer = build(rho=rho)
    kept = optimizer.param_groups[0]["rho"]
    RhoScheduler(optimizer, ConstantRho(0.25))
    assert optimizer.param_groups[0]["rho"] is kept
    assert float(kept) == 0.25


@pytest.mark.parametrize("schedule", [LinearRho(0.1, 0.9, 9), StepRho((4,), (0.1, 0.2))])
def test_resuming(schedule):
    scheduler = RhoScheduler(build(), schedule)
    for _ in range(5):
        scheduler.step()
    optimizer = build()
    resumed = RhoScheduler(optimizer, pickle.loads(pickle.dumps(schedule)))
    resumed.load_state_dict(pickle.loads(pickle.dumps(scheduler.state_dict())))
    assert optimizer.param_groups[0]["rho"] == scheduler.get_last_rho()[0]
    scheduler.step()
    resumed.step()
    assert resumed.get_last_rho() == scheduler.get_last_rho()
    assert resumed.last_epoch == 6


def test_bad_schedules():
    with pytest.raises(ValueError, match="2 phases, but there are 3 values"):
        StepRho((1,), (0.1, 0.2, 0.3))
    with pytest.raises(ValueError, match="rise"):
        StepRho((3, 2), (0.1, 0.2, 0.3))
    for kind in (LinearRho, CosineRho):
        with pytest.raises(ValueError, match="at least 1"):
            kind(0.1, 0.2, 0)
    with pytest.raises(ValueError, match="1 schedules of rho for 2"):
        RhoScheduler(build(groups=2), [ConstantRho(0.1)])


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_a_bad_rho_changes_nothing(bad):
    optimizer = build(groups=2)
    scheduler = RhoScheduler(optimizer, [ConstantRho(0.1), lambda epoch: bad if epoch else 0.2])
    with pytest.raises(ValueError, match="in epoch 1"):
        scheduler.step()
    assert [group["rho"] for group in optimizer.param_groups] == [0.1, 0.2]
    assert scheduler.last_epoch == 0
