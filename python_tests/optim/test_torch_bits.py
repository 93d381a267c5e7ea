"""Fused updates that round as torch does have equal bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastsam import SAM
from python_tests.optim.trajectories import assert_torch_bits

pytestmark = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="no fused multiply-add"
)

SIZES = [1, 1025, 65_537, 20_003]
SGD = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "weight_decay": 5e-4},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
    {"momentum": 0.7, "dampening": 0.3, "weight_decay": 5e-4},
    {"momentum": 0.9, "maximize": True, "weight_decay": 5e-4},
]


def text(options: Any) -> str:
    return str(options) if isinstance(options, (dict, torch.dtype, bool)) else options.__name__


def trained(optimizer: Any, parameters: list[Tensor], seed: int, steps: int) -> list[Tensor]:
    """Return weights and base optimizer state after ``steps`` steps on seeded gradients."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        if isinstance(optimizer, SAM):
            optimizer.first_step()
        optimizer.step()
    state = [
        value
        for p in parameters
        for value in optimizer.state[p].values()
        if isinstance(value, Tensor)
    ]
    return [*(p.detach() for p in parameters), *state]


def both(
    base: Any,
    foreach: bool,
    dtype: torch.dtype,
    seed: int,
    options: dict[str, Any],
    rho: float = 0.5,
) -> tuple[list[Tensor], list[Tensor]]:
    """Make the same steps with SAM, with gradients that ignore the ascent, and with torch's optimizer."""
    generator = torch.Generator().manual_seed(seed)
    start = [torch.randn(size, generator=generator, dtype=dtype) for size in SIZES]
    ours = [nn.Parameter(w.clone()) for w in start]
    theirs = [nn.Parameter(w.clone()) for w in start]
    found = trained(SAM(ours, base, rho=rho, lr=0.1, **options), ours, seed + 1, 20)
    expected = trained(base(theirs, lr=0.1, foreach=foreach, **options), theirs, seed + 1, 20)
    return found, expected


@pytest.mark.parametrize("foreach", [False, True], ids=["for-loop", "foreach"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=text)
@pytest.mark.parametrize("options", SGD, ids=text)
@pytest.mark.parametrize("rho", [0.5, 0.0], ids=["with an ascent", "without"])
def test_sgd_has_the_bits_of_torch(
    rho: float, options: dict[str, Any], dtype: torch.dtype, foreach: bool, seed: int
) -> None:
    found, expected = both(torch.optim.SGD, foreach, dtype, seed, options, rho)
    assert_torch_bits(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=text)
@pytest.mark.parametrize("base", [torch.optim.Adam, torch.optim.AdamW], ids=text)
def test_adam_s_moments_have_the_bits_of_torch(base: Any, dtype: torch.dtype, seed: int) -> None:
    """The weights need not, because torch's square root is not correctly rounded everywhere."""
    found, expected = both(base, False, dtype, seed, {"amsgrad": True, "maximize": True})
    state = slice(len(SIZES), None)
    assert_torch_bits(found[state], expected[state])
