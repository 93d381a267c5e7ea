"""The share of 16-bit weights that an ascent was too small to change."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from fastsam import SAM


def ascent(rho: float, parameters: list[nn.Parameter], **options) -> SAM:
    optimizer = SAM(parameters, torch.optim.SGD, rho=rho, lr=0.1, **options)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.first_step()
    return optimizer


def half_and_half() -> nn.Parameter:
    """Sixteen weights of 1, whose neighbours are 2^-8 away, and sixteen of 2^-10."""
    return nn.Parameter(torch.cat([torch.ones(16), torch.full((16,), 2.0**-10)]).bfloat16())


@pytest.mark.parametrize(
    ("dtype", "resolution"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)]
)
def test_the_share_is_counted(dtype, resolution):
    p = nn.Parameter(torch.cat([torch.ones(3), torch.full((5,), 2.0**-12)]).to(dtype))
    optimizer = ascent(resolution / 4 * 8**0.5, [p])  # each element moves by resolution / 4
    assert float(optimizer.unchanged_share) == 3 / 8
    assert bool((p[:3] == 1).all())
    assert bool((p[3:] > 2.0**-12).all())


def test_the_share_is_that_of_the_last_ascent():
    p = half_and_half()
    optimizer = ascent(0.001 * 32**0.5, [p])
    assert float(optimizer.unchanged_share) == 0.5
    optimizer.restore()
    optimizer.param_groups[0]["rho"] = 1.0
    optimizer.first_step()
    assert float(optimizer.unchanged_share) == 0.0


def test_only_16_bit_elements_with_a_gradient_count():
    wide, narrow, idle = nn.Parameter(torch.ones(100)), half_and_half(), half_and_half()
    optimizer = SAM([wide, narrow, idle], torch.optim.SGD, rho=1e-3, lr=0.1)
    wide.grad, narrow.grad = torch.zeros_like(wide), torch.ones_like(narrow)
    optimizer.first_step()
    assert float(optimizer.unchanged_share) == 0.5


def test_without_16_bit_weights_there_is_nothing_to_lose():
    assert float(ascent(1e-30, [nn.Parameter(torch.ones(4))]).unchanged_share) == 0.0


def test_more_than_one_half_is_warned_of_once():
    p = nn.Parameter(torch.ones(33, dtype=torch.bfloat16))
    with pytest.warns(UserWarning, match="left 100% .* 16-bit"):
        optimizer = ascent(1e-4, [p])
    for _ in range(8):
        optimizer.restore()
        optimizer.first_step()


def test_one_half_is_not_warned_of():
    ascent(0.001 * 32**0.5, [half_and_half()])


def test_rho_zero_is_not_warned_of():
    ascent(0.0, [nn.Parameter(torch.ones(33, dtype=torch.bfloat16))])


def test_a_warning_made_an_error_leaves_a_step_that_can_be_given_up():
    p = nn.Parameter(torch.ones(33, dtype=torch.bfloat16))
    optimizer = SAM([p], torch.optim.SGD, rho=1e-4, lr=0.1)
    p.grad = torch.ones_like(p)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="16-bit"):
            optimizer.first_step()
    optimizer.restore()
    optimizer.first_step()
