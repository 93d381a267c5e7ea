"""Engines with float16, recomputed blocks and micro-batches: each pair trains like plain replicas."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastsam import SAM
from fastsam.distributed import World
from fastsam.longtail import recipe
from fastsam.longtail.build import build_objective
from fastsam.longtail.data import Batch
from fastsam.longtail.models.classifier import Classifier
from fastsam.longtail.sharding import Parallel, gathered
from fastsam.longtail.training import Engine, Stepper
from fastsam.longtail.training.loss_scale import LossScale
from fastsam.longtail.training.recomputation import recomputed_blocks
from python_tests.ranks import run_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo"),
]

RANKS, STEPS, OVERFLOW = 2, 8, 5
CPU = torch.device("cpu")
ENGINES: tuple[Parallel, ...] = ("ddp", "fsdp2")


class LinearBlock(nn.Module):
    """A residual block of linear layers, because convolutions in float16 are slow on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)
        self.norm = nn.BatchNorm1d(32)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + torch.relu(self.norm(self.linear(inputs)))


def train(world: World, parallel: Parallel, *, half: bool, recomputes: bool) -> dict[str, Tensor]:
    """Take steps of SAM; in float16 one of them overflows."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), LinearBlock(), LinearBlock())
    network = Classifier(layers, nn.Linear(32, 10), 32)
    scale = LossScale(CPU, world) if half else None
    blocks = recomputed_blocks(network, "test") if recomputes else ()
    engine = Engine(network, world, parallel=parallel, loss_scale=scale, recomputes=blocks)
    optimizer = SAM(network.parameters(), torch.optim.SGD, rho=0.05, lr=0.05, momentum=0.9)
    objective = build_objective(recipe("digits-lt", "ce", "sgd").config(), np.full(10, 100))
    stepper = Stepper(
        engine, optimizer, objective, seed=0, precision="float16" if half else "float32"
    )
    inputs, targets = torch.rand(64, 1, 8, 8), torch.randint(10, (64,))
    rows = torch.arange(64)[world.rank :: world.world_size]
    for step in range(STEPS):
        factor = 1e6 if half and step == OVERFLOW else 1.0
        batch = Batch((factor * inputs[rows],), targets[rows], rows)
        next(stepper.steps([batch], epoch=1))
    found = {"weights": torch.cat([gathered(p.detach()).flatten() for p in network.parameters()])}
    found["statistics"] = torch.cat([value.flatten().double() for value in network.buffers()])
    if scale is not None:
        found["scale"] = torch.tensor([scale.get_scale(), int(scale.skipped_steps)])
    return found


def _rank(rank: int, folder: str) -> None:
    found = {
        key: train(World(rank, RANKS), key[0], half=key[1], recomputes=key[2])
        for key in itertools.product(ENGINES, (False, True), (False, True))
    }
    torch.save(found, f"{folder}/{rank}.pt")


def test_engines_agree_in_float16_and_with_recomputed_blocks(tmp_path: Path) -> None:
    run_ranks(_rank, RANKS, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    for rank in ranks:
        for (engine, half, recomputes), found in rank.items():
            plain = rank["ddp", half, False]
            assert torch.equal(found["weights"], ranks[0][engine, half, recomputes]["weights"])
            torch.testing.assert_close(found["weights"], plain["weights"], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(
                found["statistics"], plain["statistics"], rtol=1e-5, atol=1e-6
            )
            if half:
                assert found["scale"].tolist() == [2**15, 1]
