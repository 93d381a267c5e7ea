"""Another dtype of the weights, the counter of skipped steps, and copies of a part of the optimizer."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from fastsam import SAM


def test_a_trained_model_may_change_its_dtype(seed: int) -> None:
    """As in torch.optim, whose momentum follows the weights."""
    torch.manual_seed(seed)
    model = nn.Linear(4, 3)
    twin = copy.deepcopy(model)
    options = {"lr": 0.1, "momentum": 0.9}
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.0, **options)
    plain = torch.optim.SGD(twin.parameters(), **options)
    for convert in (nn.Module.float, nn.Module.double):
        for each in (model, twin):
            convert(each)
            for p in each.parameters():
                p.grad = torch.ones_like(p)
        optimizer.second_step()
        plain.step()
    for p, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.dtype == torch.float64
        torch.testing.assert_close(p, other, rtol=1e-7, atol=1e-7)


def test_skipped_steps_are_a_snapshot() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = SAM([weight], torch.optim.SGD, rho=0.0, lr=0.1)
    counts = []
    for value in (1.0, math.nan, math.nan):
        weight.grad = torch.full((3,), value)
        optimizer.second_step()
        counts.append(optimizer.skipped_steps)
    counts[0].fill_(7)
    assert [int(count) for count in (*counts[1:], optimizer.skipped_steps)] == [1, 2, 2]


def test_a_copy_of_the_ascent_ascends_for_a_copy_of_its_optimizer() -> None:
    weight = nn.Parameter(torch.ones(4))
    ascent = copy.deepcopy(SAM([weight], torch.optim.SGD, rho=2.0, lr=0.1).ascent)
    (copied,) = ascent.param_groups[0]["params"]
    copied.grad = torch.ones(4)
    ascent.step()
    assert copied.tolist() == [2.0] * 4
    assert weight.tolist() == [1.0] * 4
