"""A process group of one rank, on gloo and on NCCL: the steps are those without a process group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fastsam import SAM
from fastsam.distributed import World
from fastsam.optim import LookSAM, local_sam_step
from fastsam.optim._engine import sharding
from fastsam.optim.obstacles import obstacle
from python_tests.optim.trajectories import assert_close, assert_same_bits

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The first argument of a barrier"),
]
STEPS = 4


@pytest.fixture(params=["gloo", pytest.param("nccl", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    device = torch.device("cuda", 0) if request.param == "nccl" else torch.device("cpu")
    dist.init_process_group(
        request.param,
        store=dist.HashStore(),
        rank=0,
        world_size=1,
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield device
    finally:
        dist.destroy_process_group()


@contextmanager
def nothing_waits(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def network(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1))
    return nn.Sequential(*layers).to(device)


def batches(device: torch.device) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(12, 4, generator=generator).to(device),
            torch.randn(12, 1, generator=generator).to(device),
        )
        for _ in range(STEPS)
    ]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def sam(model: nn.Module, **options: object) -> SAM:
    return SAM(model.parameters(), torch.optim.SGD, rho=0.3, lr=0.2, momentum=0.9, **options)


def looksam(model: nn.Module, **options: Any) -> LookSAM:
    base = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    return LookSAM(base, every=2, **options)


def train(model: nn.Module, optimizer: SAM, data: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    for batch in data:
        for finish in (optimizer.first_step, optimizer.second_step):
            loss_of(model, batch).backward()
            finish(zero_grad=True)
    return weights(model)


def weights(model: nn.Module) -> list[Tensor]:
    return [
        (p.full_tensor() if isinstance(p, DTensor) else p).detach().cpu().clone()
        for p in model.parameters()
    ]


def alone(device: torch.device) -> list[Tensor]:
    model = network(device)
    return train(model, sam(model), batches(device))


def test_ddp_takes_the_same_steps(device: torch.device) -> None:
    model = DistributedDataParallel(network(device))
    found = train(model, sam(model), batches(device))
    assert_same_bits(found, alone(device))


def test_a_local_ascent_takes_the_same_steps_and_does_not_wait(device: torch.device) -> None:
    model = DistributedDataParallel(network(device))
    optimizer = sam(model, process_group=dist.group.WORLD)
    for number, batch in enumerate(batches(device)):
        # In its second forward pass, DDP rebuilds its buckets, and waits.
        with nothing_waits(device) if number > 1 else nullcontext():
            local_sam_step(model, optimizer, lambda batch=batch: loss_of(model, batch))
            optimizer.zero_grad()
    assert_same_bits(weights(model), alone(device))


def refuse(*arguments: object) -> None:
    raise AssertionError("a rank that is alone communicates")


@pytest.mark.parametrize("kind", [sam, looksam])
def test_a_group_of_one_rank_costs_nothing(
    device: torch.device, kind: Callable[..., SAM | LookSAM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding, "all_reduce", refuse)
    monkeypatch.setattr(sharding, "all_reduce_flat", refuse)
    model = network(device)
    optimizer = kind(model, process_group=dist.group.WORLD)
    for batch in batches(device):
        for need in optimizer.passes():
            assert not need.local
            optimizer.zero_grad()
            loss_of(model, batch).backward()
    expected = network(device)
    reference = kind(expected)
    for batch in batches(device):
        for _ in reference.passes():
            reference.zero_grad()
            loss_of(expected, batch).backward()
    assert_same_bits(weights(model), weights(expected))
    optimizer.zero_grad()
    if isinstance(optimizer, SAM):
        assert obstacle(model, optimizer) is None


def test_fsdp_takes_the_same_steps(device: torch.device) -> None:
    model = network(device)
    mesh = init_device_mesh(device.type, (1,))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert_close(train(model, sam(model), batches(device)), alone(device), 1e-6)


def test_the_world_of_one_rank(device: torch.device) -> None:
    world = World.from_process_group()
    tensor = torch.arange(3.0, device=device)
    world.all_reduce([tensor])
    assert tensor.tolist() == [0, 1, 2]
    assert world.all_gather("one") == ["one"]
