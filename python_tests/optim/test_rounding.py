"""16-bit weights: the fraction that an ascent is too small to change, and stochastic rounding."""

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
    """Return sixteen weights of 1, whose neighbors are 2^-8 away, and sixteen of 2^-10."""
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


def test_the_share_covers_only_the_last_ascent():
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


def test_more_than_one_half_warns_once():
    p = nn.Parameter(torch.ones(33, dtype=torch.bfloat16))
    with pytest.warns(UserWarning, match="left 100% .* 16-bit"):
        optimizer = ascent(1e-4, [p])
    for _ in range(8):
        optimizer.restore()
        optimizer.first_step()


def test_one_half_does_not_warn():
    ascent(0.001 * 32**0.5, [half_and_half()])


def test_rho_zero_does_not_warn():
    ascent(0.0, [nn.Parameter(torch.ones(33, dtype=torch.bfloat16))])


def test_a_warning_turned_into_an_error_abandons_the_step():
    p = nn.Parameter(torch.ones(33, dtype=torch.bfloat16))
    optimizer = SAM([p], torch.optim.SGD, rho=1e-4, lr=0.1)
    p.grad = torch.ones_like(p)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="16-bit"):
            optimizer.first_step()
    assert bool((p == 1).all())
    optimizer.param_groups[0]["rho"] = 33**0.5
    optimizer.first_step()
    assert bool((p == 2).all())


# --- stochastic rounding ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_lets_a_small_ascent_through_on_average(dtype):
    """Rounded to nearest, weights of 1 would not move; the mean of the moves must be rho / sqrt(n)."""
    count = 100_000
    p = nn.Parameter(torch.ones(count, dtype=dtype))
    step = torch.finfo(dtype).eps / 10
    optimizer = ascent(step * count**0.5, [p], stochastic_rounding=True)  # no warning either
    moved = p.detach().double() - 1
    assert set((moved / torch.finfo(dtype).eps).unique().tolist()) == {0.0, 1.0}
    error = torch.finfo(dtype).eps * (0.1 * 0.9 / count) ** 0.5
    assert abs(float(moved.mean()) - step) < 5 * error
    assert float(optimizer.unchanged_share) == pytest.approx(0.9, abs=0.01)
    optimizer.restore()
    assert bool((p == 1).all())


def test_stochastic_rounding_is_the_same_in_every_run_and_new_in_every_step():
    tops = []
    for _ in range(2):
        p, q = (nn.Parameter(torch.ones(5000, dtype=torch.bfloat16)) for _ in range(2))
        optimizer = SAM([p, q], torch.optim.SGD, rho=0.02, lr=0.0, stochastic_rounding=True)
        for scale in (1.0, 1.5):  # the direction stays, the norm does not
            p.grad, q.grad = (torch.full_like(w, scale) for w in (p, q))
            optimizer.first_step()
            tops.append((p.detach().clone(), q.detach().clone()))
            optimizer.restore()
    assert torch.equal(tops[0][0], tops[2][0])
    assert torch.equal(tops[1][0], tops[3][0])
    assert not torch.equal(tops[0][0], tops[1][0])
    assert not torch.equal(tops[0][0], tops[0][1])  # each parameter has its own random stream


@pytest.mark.filterwarnings("ignore:the ascent left")
def test_stochastic_rounding_is_a_setting_of_a_group():
    exact, nearest, wide = half_and_half(), half_and_half(), nn.Parameter(torch.ones(32))
    exact.data.fill_(1.0)
    nearest.data.fill_(1.0)
    optimizer = SAM(
        [{"params": [exact, wide], "stochastic_rounding": True}, {"params": [nearest]}],
        torch.optim.SGD,
        rho=0.01,
        lr=0.1,
    )
    for p in (exact, nearest, wide):
        p.grad = torch.ones_like(p)
    optimizer.first_step()
    assert bool((exact != 1).any())
    assert bool((nearest == 1).all())
    assert torch.allclose(wide.detach(), torch.full((32,), 1 + 0.01 / 96**0.5))
    optimizer.restore()
    optimizer.param_groups[0]["stochastic_rounding"] = False  # may change between steps
    optimizer.first_step()
    assert bool((exact == 1).all())


def test_a_checkpoint_from_before_the_option_loads():
    p = half_and_half()
    optimizer = SAM([p], torch.optim.SGD, stochastic_rounding=True, lr=0.1)
    state = optimizer.state_dict()
    del state["param_groups"][0]["stochastic_rounding"]
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["stochastic_rounding"] is True
