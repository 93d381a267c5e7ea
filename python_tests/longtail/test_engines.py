"""Gradients shared by several ranks: the steps are those of one process on the whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fastsam import SAM
from fastsam.distributed import World
from fastsam.longtail import recipe
from fastsam.longtail.build import build_network, build_objective
from fastsam.longtail.data import Batch, load_digits_lt
from fastsam.longtail.sharding import Parallel, gathered
from fastsam.longtail.training import Engine, Stepper
from fastsam.optim import m_sam_step
from python_tests.ranks import run_ranks

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
SEPARABLE = ("ce", "ldam-drw")
"""Methods whose loss of an image does not depend on other images, so that batches may be split."""


class Case(NamedTuple):
    """A training: its engine, micro-batches per rank, method, precision and number of steps."""

    parallel: Parallel
    accumulate: int
    method: str
    dtype: torch.dtype
    steps: int

    def alone(self) -> Case:
        """Return the same training in one process and in whole batches."""
        return self._replace(parallel="ddp", accumulate=1)


def cases(methods: Sequence[str], steps: int) -> list[Case]:
    """Return all engines with these methods: ``steps`` steps in float64, and 5 in float32."""
    ways: list[tuple[Parallel, int]] = [("ddp", 1), ("fsdp2", 1), ("ddp", 3), ("fsdp2", 3)]
    return [
        Case(parallel, accumulate, method, dtype, count)
        for parallel, accumulate in ways
        for method in methods
        for dtype, count in ((torch.float64, steps), (torch.float32, 5))
        if accumulate == 1 or method in SEPARABLE
    ]


FEW = [
    Case("ddp", 1, "paco", torch.float64, 8),
    Case("fsdp2", 1, "paco", torch.float64, 8),
    Case("ddp", 3, "ldam-drw", torch.float64, 8),
    Case("fsdp2", 3, "ldam-drw", torch.float64, 8),
]


def take_steps(case: Case, world: World) -> dict[str, Tensor]:
    """Take steps of SGD, and of SAM in the second half, with frozen statistics of BatchNorm."""
    method, dtype, steps = case.method, case.dtype, case.steps
    config = recipe("digits-lt", method, "sgd").config()
    network = build_network(config, 10, 1).to(dtype).eval()
    engine = Engine(network, world, parallel=case.parallel)
    options = {"lr": METHODS[method], "momentum": 0.9, "weight_decay": 1e-3, "start": steps // 2}
    optimizer = SAM(network.parameters(), torch.optim.SGD, rho=0.05, **options)
    objective = build_objective(config, DIGITS.counts)
    stepper = Stepper(engine, optimizer, objective, seed=0, accumulate=case.accumulate)
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
    states = gathered(optimizer.base_optimizer.state_dict())["state"].values()
    momentum = [state["momentum_buffer"] for state in states]
    parameters = [gathered(p.detach()) for p in network.parameters()]
    return {"weights": flat(parameters), "momentum": flat(momentum), "losses": torch.stack(losses)}


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _rank(rank: int, size: int, trained: list[Case], folder: str) -> None:
    torch.save([take_steps(case, World(rank, size)) for case in trained], f"{folder}/{rank}.pt")


@pytest.mark.parametrize(
    ("size", "trained"),
    [
        (2, FEW),
        pytest.param(2, cases(list(METHODS), 100), marks=SLOW),
        pytest.param(4, cases(list(METHODS), 100), marks=SLOW),
    ],
    ids=["2 ranks, 8 steps", "2 ranks, 100 steps", "4 ranks, 100 steps"],
)
def test_ranks_take_the_steps_of_one_process(
    size: int, trained: list[Case], tmp_path: Path
) -> None:
    run_ranks(_rank, size, size, trained, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(size)]
    expected = {case.alone(): take_steps(case.alone(), World()) for case in trained}
    for case, *found in zip(trained, *ranks, strict=True):
        for name, value in expected[case.alone()].items():
            for other in found:
                assert torch.equal(other[name], found[0][name]), (case, name)
            difference = float((found[0][name] - value).abs().max() / value.abs().max())
            assert difference <= AMPLIFIED[name] * TOLERANCES[case.dtype], (case, name)


def local_steps(world: World, closures: int) -> Tensor:
    """Take SAM steps in which each part of a batch has its own ascent, and return the weights.

    Args:
        world: several ranks take local ascents.
        closures: parts of a batch in one process, which takes :func:`fastsam.optim.m_sam_step`.
    """
    config = recipe("digits-lt", "ce", "sgd").config()
    network = build_network(config, 10, 1).double().eval()
    engine = Engine(network, world)
    options = {"lr": 0.05, "momentum": 0.9, "process_group": world.process_group}
    optimizer = SAM(network.parameters(), torch.optim.SGD, rho=0.2, **options)  # type: ignore[arg-type]
    stepper = Stepper(engine, optimizer, build_objective(config, DIGITS.counts), seed=0)
    images = DIGITS.train.images.double() / 16  # type: ignore[attr-defined]
    targets = torch.from_numpy(DIGITS.train.targets)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        rows = torch.randperm(len(targets), generator=generator)[:24]
        if world.world_size > 1:
            own = rows[world.rank :: world.world_size]
            next(stepper.steps([Batch((images[own],), targets[own], own)], epoch=1))
            continue

        def closure(part: Tensor) -> Tensor:
            loss = torch.nn.functional.cross_entropy(network(images[part]), targets[part])
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        m_sam_step(optimizer, [partial(closure, rows[i::closures]) for i in range(closures)])
    return flat([parameter.detach() for parameter in network.parameters()])


def _local_rank(rank: int, size: int, folder: str) -> None:
    torch.save(local_steps(World(rank, size), 0), f"{folder}/{rank}.pt")


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=SLOW)])
def test_local_ascents_are_those_of_m_sam_step(size: int, tmp_path: Path) -> None:
    run_ranks(_local_rank, size, size, str(tmp_path))
    expected = local_steps(World(), size)
    for rank in range(size):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert float((found - expected).abs().max()) <= 1e-12 * float(expected.abs().max())
