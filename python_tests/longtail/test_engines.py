"""Gradients shared by several ranks: the steps are those of one process on the whole batch."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from fastsam import SAM
from fastsam.distributed import World
from fastsam.longtail import recipe
from fastsam.longtail.build import build_network, build_objective
from fastsam.longtail.data import Batch, load_digits_lt
from fastsam.longtail.training import Engine, Stepper

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")

SLOW = pytest.mark.slow
DIGITS = load_digits_lt()
METHODS = {"ce": 5e-3, "ldam-drw": 5e-3, "lade": 5e-3, "paco": 2e-4}
"""Methods and their learning rates. At 5e-3, 100 steps of PaCo amplify a rounding error to 3e-4."""
BATCH = 25
"""An odd size, so that the ranks' parts are uneven."""
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6}
"""Largest difference from one process, relative to the largest value."""
AMPLIFIED = {"weights": 1, "losses": 1, "momentum": 10}
"""Gradients amplify differences of the weights."""


def take_steps(world: World, method: str, dtype: torch.dtype, steps: int) -> dict[str, Any]:
    """Take steps of SGD, and of SAM in the second half, with frozen statistics of BatchNorm."""
    config = recipe("digits-lt", method, "sgd").config()
    network = build_network(config, 10, 1).to(dtype).eval()
    options = {"lr": METHODS[method], "momentum": 0.9, "weight_decay": 1e-3, "start": steps // 2}
    optimizer = SAM(network.parameters(), torch.optim.SGD, rho=0.05, **options)
    objective = build_objective(config, DIGITS.counts)
    stepper = Stepper(Engine(network, world), optimizer, objective, seed=0)
    images = DIGITS.train.images.to(dtype) / 16
    targets = torch.from_numpy(DIGITS.train.targets)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in range(steps):
        rows = torch.randperm(len(targets), generator=generator)[:BATCH]
        rows = rows[world.rank :: world.world_size]
        late = config.epochs if step >= steps // 4 else 1
        views = images[rows], images[rows].flip(-1)
        (seen,) = next(stepper.steps([Batch(views, targets[rows], rows)], epoch=late))
        losses.append(seen.loss)
    momentum = [
        state["momentum_buffer"]
        for state in optimizer.base_optimizer.state_dict()["state"].values()
    ]
    parameters = [p.detach() for p in network.parameters()]
    return {"weights": flat(parameters), "momentum": flat(momentum), "losses": torch.stack(losses)}


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _rank(rank: int, size: int, steps: dict[torch.dtype, int], folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store-{size}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    found = {
        (method, str(dtype)): take_steps(World(rank, size), method, dtype, count)
        for method, (dtype, count) in itertools.product(METHODS, steps.items())
    }
    torch.save(found, f"{folder}/{size}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("size", "long"), [(2, 12), pytest.param(2, 100, marks=SLOW), pytest.param(4, 100, marks=SLOW)]
)
def test_ranks_take_the_steps_of_one_process(size: int, long: int, tmp_path: Path) -> None:
    steps = {torch.float64: long, torch.float32: 5}
    torch.multiprocessing.spawn(  # type: ignore[no-untyped-call]
        _rank, args=(size, steps, str(tmp_path)), nprocs=size
    )
    ranks = [torch.load(tmp_path / f"{size}-{rank}.pt") for rank in range(size)]
    for method, (dtype, count) in itertools.product(METHODS, steps.items()):
        key = method, str(dtype)
        for name, value in take_steps(World(), method, dtype, count).items():
            for other in ranks:
                assert torch.equal(other[key][name], ranks[0][key][name]), (key, name)
            difference = float((ranks[0][key][name] - value).abs().max() / value.abs().max())
            assert difference <= AMPLIFIED[name] * TOLERANCES[dtype], (key, name)
