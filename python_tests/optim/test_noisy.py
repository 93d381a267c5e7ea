"""What PGD, LPF-SGD and Entropy-SGD share: parameters that they refuse, autocast and memory layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    with pytest.raises(ValueError, match=r"a DTensor of shape \(4, 3\) has no memory"):
        TensorTable([shard(torch.ones(4, 3)).data], groups=[0], adaptive=[False])
    TensorTable([torch.ones(0, 3)], groups=[0], adaptive=[False])
