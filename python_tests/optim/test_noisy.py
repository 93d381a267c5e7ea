"""What PGD, LPF-SGD and Entropy-SGD share: parameters that they refuse, autocast and memory layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim import SGD, Optimizer

from fastsam.kernels.table import TensorTable
from fastsam.optim import LPFSGD, PGD, EntropySGD
from fastsam.optim._engine.noise import add_normal

BUILDERS: dict[str, Callable[[Optimizer], Any]] = {
    "PGD gradient": lambda sgd: PGD(sgd, sigma=0.1, seed=3),
    "PGD weights": lambda sgd: PGD(sgd, sigma=0.1, noise_on="weights", seed=3),
    "LPFSGD": lambda sgd: LPFSGD(sgd, gamma=0.1, parts=3, seed=3),
    "EntropySGD": lambda sgd: EntropySGD(sgd, steps=4, noise=0.1, seed=3),
}

needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")


@pytest.fixture
def shard() -> Iterator[Callable[[Tensor], nn.Parameter]]:
    """Return a function that makes a DTensor parameter on a mesh of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        yield lambda tensor: nn.Parameter(distribute_tensor(tensor, mesh, [Shard(0)]))
    finally:
        dist.destroy_process_group()


@needs_gloo
@pytest.mark.parametrize("name", BUILDERS)
def test_sharded_parameters_are_refused(name: str, shard: Callable[[Tensor], nn.Parameter]) -> None:
    """At construction, and before the first pass of a step if the model was sharded later."""
    message = rf"{name.split()[0]} got a DTensor parameter of shape \(4, 3\)"
    base = SGD([shard(torch.ones(4, 3))], lr=0.1)
    keys = set(base.param_groups[0])
    with pytest.raises(ValueError, match=message):
        BUILDERS[name](base)
    assert set(base.param_groups[0]) == keys
    optimizer = BUILDERS[name](SGD([nn.Parameter(torch.ones(4, 3))], lr=0.1))
    optimizer.param_groups[0]["params"] = [shard(torch.ones(4, 3))]
    with pytest.raises(ValueError, match=message):
        next(optimizer.passes())


@needs_gloo
def test_a_table_refuses_a_tensor_without_an_address(
    shard: Callable[[Tensor], nn.Parameter],
) -> None:
    with pytest.raises(ValueError, match=r"a DTensor of shape \(4, 3\) has no address"):
        TensorTable([shard(torch.ones(4, 3)).data], groups=[0], adaptive=[False])
    TensorTable([torch.ones(0, 3)], groups=[0], adaptive=[False])


@pytest.mark.parametrize("name", BUILDERS)
def test_every_pass_in_one_autocast_context_uses_the_current_weights(name: str) -> None:
    """As with one context per pass. Autocast caches 16-bit copies of weights until its context ends."""
    losses: dict[bool, list[float]] = {True: [], False: []}
    for shared in losses:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 1))
        x, y = torch.randn(32, 5), torch.randn(32, 1)
        optimizer = BUILDERS[name](SGD(model.parameters(), lr=1.0))
        each = nullcontext() if shared else torch.autocast("cpu", torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16) if shared else nullcontext():
            for _ in range(2):
                for _ in optimizer.passes():
                    optimizer.zero_grad()
                    with each:
                        loss = (model(x) - y).square().mean()
                    loss.backward()
                    losses[shared].append(loss.item())
            abandoned = optimizer.passes()
            next(abandoned)
            with each:
                model(x)
            abandoned.close()
            with each:
                losses[shared].append((model(x) - y).square().mean().item())
    assert losses[True] == losses[False]
    assert len(set(losses[False])) == len(losses[False])


def columns_outermost(weight: Tensor) -> Tensor:
    return weight.transpose(0, 1).contiguous().transpose(0, 1)


def channels_last(weight: Tensor) -> Tensor:
    return weight.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", [torch.clone, columns_outermost, channels_last])
def test_filter_noise_reaches_its_filter_in_every_layout(
    layout: Callable[[Tensor], Tensor],
) -> None:
    weight = torch.ones(3, 50, 20, 2)
    weight[1] = 0.0
    parameter = nn.Parameter(layout(weight))
    strides = parameter.stride()
    optimizer = LPFSGD(SGD([parameter], lr=0.1), gamma=0.1, seed=1)
    for _ in optimizer.passes():
        moved = (parameter - weight).detach()
        parameter.grad = torch.zeros_like(parameter)
    assert parameter.stride() == strides
    assert torch.equal(parameter, weight)
    for noisy in (moved[0], moved[2]):
        assert noisy.std() == pytest.approx(0.1 * 2000**0.5, rel=0.1)
    assert not moved[1].any()


def test_deviations_may_have_any_strides() -> None:
    """An expanded tensor has one element in memory, a slice has others between its elements."""
    expected, tensor = torch.zeros(2, 3, 50).unbind()
    deviations = torch.tensor([1.0, 9.0, 0.0, 9.0, 5.0])[::2]
    add_normal([expected], [deviations.clone()], seed=1, position=0)
    add_normal([tensor], [deviations], seed=1, position=0)
    assert torch.equal(tensor, expected)
    assert not tensor[1].any()


def test_entropy_sgd_moves_a_layer_that_the_last_pass_left_out() -> None:
    always, sometimes, never = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = EntropySGD(
        SGD([always, sometimes, never], lr=1.0), steps=3, inner_lr=0.5, gamma=0.0, noise=0.0
    )
    for turn, _ in enumerate(optimizer.passes()):
        optimizer.zero_grad()
        (always.sum() + (sometimes.sum() if turn < 2 else 0.0)).backward()
    # x' = 0.5, 0, -0.5, and for the other 0.5, 0, 0; mu = 0.75 mu + 0.25 x'.
    assert torch.allclose(always, torch.tensor(0.75 * (0.75 * 0.875) + 0.25 * -0.5))
    assert torch.allclose(sometimes, torch.tensor(0.75 * (0.75 * 0.875)))
    assert torch.equal(never, torch.ones(2))


@pytest.mark.parametrize("name", BUILDERS)
def test_views_with_gaps_train(name: str) -> None:
    results = []
    for weight in (torch.ones(5), torch.ones(10)[::2]):
        parameter = nn.Parameter(weight)
        optimizer = BUILDERS[name](SGD([parameter], lr=0.1))
        for _ in range(2):
            for _ in optimizer.passes():
                optimizer.zero_grad()
                parameter.square().sum().backward()
        results.append(parameter.detach().clone())
    assert torch.equal(*results)
    assert not torch.equal(results[0], torch.ones(5))
