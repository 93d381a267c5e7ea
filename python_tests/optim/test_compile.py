"""A whole training step under torch.compile has no warnings, and the bits of the eager step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer, RMSprop

from fastsam import SAM
from fastsam.optim import LPFSGD, PGD, EntropySGD, LookSAM, capture_step
from python_tests.optim.trajectories import assert_same_bits

STEPS = 10
"""More steps than the 8 recompilations of a function after which Dynamo warns."""

Step = Callable[[], Any]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def _batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 4, generator=generator), torch.randn(16, 1, generator=generator)


BATCH = _batch()
"""Made once: torch 2.9's Dynamo warns of a generator inside the compiled step."""


def backward(model: nn.Module) -> Tensor:
    inputs, targets = BATCH
    loss = nn.functional.mse_loss(model(inputs), targets)
    loss.backward()
    return loss


def two_calls(model: nn.Module, optimizer: Any) -> Step:
    def step() -> None:
        for half in (optimizer.first_step, optimizer.second_step):
            backward(model)
            half(zero_grad=True)

    return step


def two_optimizers(model: nn.Module, optimizer: Any) -> Step:
    def step() -> None:
        for half in (optimizer.ascent, optimizer):
            backward(model)
            half.step()
            optimizer.zero_grad()

    return step


def given_up(model: nn.Module, optimizer: Any) -> Step:
    def step() -> None:
        backward(model)
        optimizer.first_step(zero_grad=True)
        optimizer.restore()
        two_calls(model, optimizer)()

    return step


def second_pass(model: nn.Module, optimizer: Any) -> Step:
    def step() -> None:
        optimizer.zero_grad()
        backward(model)
        optimizer.step(lambda: backward(model))

    return step


def all_passes(model: nn.Module, optimizer: Any) -> Step:
    def closure() -> Tensor:
        optimizer.zero_grad()
        return backward(model)

    return lambda: optimizer.step(closure)


def captured(model: nn.Module, optimizer: Any) -> Step:
    step = capture_step(model, nn.functional.mse_loss, optimizer, BATCH)
    return lambda: step(BATCH)


def sam(base: type[Optimizer], **options: Any) -> Callable[[nn.Module], Optimizer]:
    return lambda model: SAM(model.parameters(), base, lr=0.05, **options)


def around_sgd(kind: Callable[..., Optimizer], **options: Any) -> Callable[[nn.Module], Optimizer]:
    return lambda model: kind(SGD(model.parameters(), lr=0.1, momentum=0.9), **options)


CASES = {
    "SGD": (two_calls, sam(SGD, momentum=0.9)),
    "AdamW": (two_calls, sam(AdamW)),
    "RMSprop": (two_calls, sam(RMSprop)),
    "ascent": (two_optimizers, sam(SGD)),
    "restore": (given_up, sam(SGD)),
    "closure": (second_pass, sam(SGD)),
    "both passes": (all_passes, sam(SGD, closure="both_passes")),
    "LookSAM": (all_passes, around_sgd(LookSAM, every=2)),
    "PGD": (all_passes, around_sgd(PGD, sigma=0.01)),
    "PGD on weights": (all_passes, around_sgd(PGD, sigma=0.01, noise_on="weights")),
    "LPFSGD": (all_passes, around_sgd(LPFSGD, parts=2)),
    "EntropySGD": (all_passes, around_sgd(EntropySGD, steps=2)),
    "capture_step": (captured, sam(SGD)),
}


def run(case: str, compiled: Callable[[Step], Step]) -> list[Tensor]:
    """Return the weights after some steps with a changing learning rate."""
    torch.compiler.reset()
    step_of, make = CASES[case]
    model = network()
    optimizer = make(model)
    step = compiled(step_of(model, optimizer))
    for _ in range(STEPS):
        step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("case", CASES)
def test_a_compiled_step_warns_of_nothing_and_has_the_same_bits(case):
    compiled = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        compiled.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    expected = run(case, lambda step: step)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = run(case, lambda step: torch.compile(step, backend=backend))
    assert not [str(warning.message) for warning in caught]
    assert_same_bits(found, expected)
    # The two passes of SAM are compiled; optimizers that run all passes themselves run them eagerly.
    is_opaque = CASES[case][0] is captured or (
        CASES[case][0] is all_passes and case != "both passes"
    )
    assert any("mse_loss" in target for target in compiled) is not is_opaque
