"""Runs whose ascents begin late on two ranks over gloo: DDP, FSDP2 and ZeRO-1."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fastsam import SAM
from fastsam.optim import local_sam_step
from python_tests.optim.late_phase import (
    BATCH,
    RHO,
    SGD,
    STEPS,
    Task,
    assert_equals_base_until,
    climbed,
    reference,
)
from python_tests.optim.trajectories import assert_close, assert_same_bits
from python_tests.ranks import run_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo"),
]

RANKS = 2
START = 5
POLICY = {"start": START, "interval": 2}
DUE = range(START, STEPS, 2)
DTYPES = {"float32": torch.float32, "float64": torch.float64}
RESUMED_AT = (3, 8)
"""On both sides of ``start``."""

History = list[list[Tensor]]


def _rank_main(rank: int, folder: str) -> None:
    results: dict[str, History | str] = {}
    for name, scenario in SCENARIOS.items():
        for dtype in DTYPES:
            try:
                results[f"{name} {dtype}"] = scenario(rank, Task(dtype=DTYPES[dtype]))
            except (Exception, pytest.fail.Exception):  # the other scenarios have their own tests
                results[f"{name} {dtype}"] = traceback.format_exc()
    torch.save(results, Path(folder) / str(rank))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Run all scenarios in one start of the processes; return their results on every rank."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(_rank_main, RANKS, str(folder), timeout=timedelta(seconds=60))
    return [torch.load(folder / str(rank)) for rank in range(RANKS)]


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def equal_on_all(outcomes: list[dict[str, Any]], scenario: str) -> History:
    for outcome in outcomes:
        if isinstance(outcome[scenario], str):
            pytest.fail(outcome[scenario], pytrace=False)
    first: History = outcomes[0][scenario]
    for other in outcomes[1:]:
        for f, e in zip(other[scenario], first, strict=True):
            assert_same_bits(f, e)
    return first


def whole(model: nn.Module) -> list[Tensor]:
    return [
        (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for p in model.parameters()
    ]


def share(rank: int) -> slice:
    size = BATCH // RANKS
    return slice(rank * size, (rank + 1) * size)


# --- a run: a model, an optimizer, a way to step ------------------------------------------------

Wrap = Callable[[nn.Module], nn.Module]
StepOf = Callable[[Task, nn.Module, Any, int, slice], None]


def _sharded(model: nn.Module) -> nn.Module:
    for layer in model:  # type: ignore[attr-defined]
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    return fully_shard(model)


def _base_step(task: Task, model: nn.Module, optimizer: Any, n: int, part: slice) -> None:
    task.loss(model, n, part).backward()
    optimizer.step()
    optimizer.zero_grad()


def _asks(task: Task, model: nn.Module, optimizer: Any, n: int, part: slice) -> None:
    task.loss(model, n, part).backward()
    if optimizer.ascent_due:
        optimizer.first_step(zero_grad=True)
        task.loss(model, n, part).backward()
    optimizer.step()
    optimizer.zero_grad()


def _does_not_ask(task: Task, model: nn.Module, optimizer: Any, n: int, part: slice) -> None:
    for finish in (optimizer.first_step, optimizer.second_step):
        task.loss(model, n, part).backward()
        finish(zero_grad=True)


def _both_passes(task: Task, model: nn.Module, optimizer: Any, n: int, part: slice) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = task.loss(model, n, part)
        loss.backward()
        return loss

    optimizer.step(closure)


def _accumulates(task: Task, model: Any, optimizer: Any, n: int, part: slice) -> None:
    middle = (part.start + part.stop) // 2

    def backward() -> None:
        with model.no_sync():
            (task.loss(model, n, slice(part.start, middle)) / 2).backward()
        (task.loss(model, n, slice(middle, part.stop)) / 2).backward()

    backward()
    if getattr(optimizer, "ascent_due", False):
        optimizer.first_step(zero_grad=True)
        backward()
    optimizer.step()
    optimizer.zero_grad()


def _local(task: Task, model: Any, optimizer: Any, n: int, part: slice) -> None:
    local_sam_step(model, optimizer, lambda: task.loss(model, n, part))
    optimizer.zero_grad()


def _train(
    rank: int,
    task: Task,
    wrap: Wrap,
    make: Callable[[nn.Module], Any],
    step: StepOf,
    resume: Callable[..., tuple[nn.Module, Any]] | None = None,
) -> History:
    model = wrap(task.network())
    optimizer = make(model)
    history = []
    for n in range(STEPS):
        if resume is not None and n in RESUMED_AT:
            model, optimizer = resume(task, model, optimizer, wrap, make)
        step(task, model, optimizer, n, share(rank))
        history.append(whole(model))
    return history


def _sam(model: nn.Module, **options: Any) -> SAM:
    return SAM(model.parameters(), torch.optim.SGD, rho=RHO, **POLICY, **options, **SGD)


def _zero_base(model: nn.Module) -> ZeroRedundancyOptimizer:
    return ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, foreach=False, **SGD)


def _torch_sgd(foreach: bool) -> Callable[[nn.Module], torch.optim.SGD]:
    return lambda model: torch.optim.SGD(model.parameters(), foreach=foreach, **SGD)


def _from_state_dicts(
    task: Task, model: nn.Module, optimizer: Any, wrap: Wrap, make: Callable[[nn.Module], Any]
) -> tuple[nn.Module, Any]:
    other = wrap(task.network())
    other.load_state_dict(model.state_dict())
    resumed = make(other)
    resumed.load_state_dict(optimizer.state_dict())
    return other, resumed


def _from_distributed_state_dicts(
    task: Task, model: nn.Module, optimizer: Any, wrap: Wrap, make: Callable[[nn.Module], Any]
) -> tuple[nn.Module, Any]:
    """Load by torch.distributed.checkpoint, whose blank step must not count."""
    saved = dcp.get_state_dict(model, optimizer)
    other = wrap(task.network())
    resumed = make(other)
    dcp.set_state_dict(other, resumed, model_state_dict=saved[0], optim_state_dict=saved[1])
    assert resumed.attempted_steps == optimizer.attempted_steps
    return other, resumed


def _disagreement(rank: int, task: Task, wrap: Wrap) -> History:
    """Ranks that disagree raise before they wait for each other, and nothing moves."""
    model = wrap(task.network())
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=RHO, start=rank, **SGD)
    with pytest.raises((ValueError, RuntimeError), match="rank"):
        _asks(task, model, optimizer, 0, share(rank))
    return [whole(model)]


def _nan_in_a_plain_step(rank: int, task: Task, wrap: Wrap, step: StepOf) -> History:
    """NaN only in one rank's part of the gradient: all ranks must skip."""
    model = wrap(task.network())
    optimizer = _sam(model)
    history = []
    for n in range(STEPS):
        if n == 3:
            task.loss(model, n, share(rank)).backward()
            if rank == RANKS - 1:
                gradient = next(model.parameters()).grad
                assert gradient is not None
                local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
                local.fill_(float("nan"))
            optimizer.step()
            optimizer.zero_grad()
        else:
            step(task, model, optimizer, n, share(rank))
        history.append(whole(model))
    assert int(optimizer.skipped_steps) == 1
    return history


def _local_ascent_of_shards(rank: int, task: Task) -> History:
    model = _sharded(task.network())
    optimizer = _sam(model, process_group=dist.group.WORLD)
    with pytest.raises(ValueError, match="process_group"):
        _asks(task, model, optimizer, 0, share(rank))
    return [whole(model)]


_ddp: Wrap = DistributedDataParallel
SCENARIOS: dict[str, Callable[[int, Task], History]] = {
    "DDP base, for-loop": lambda *of: _train(*of, _ddp, _torch_sgd(False), _base_step),
    "DDP base, foreach": lambda *of: _train(*of, _ddp, _torch_sgd(True), _base_step),
    "DDP base, accumulates": lambda *of: _train(*of, _ddp, _torch_sgd(False), _accumulates),
    "DDP, asks": lambda *of: _train(*of, _ddp, _sam, _asks),
    "DDP, does not ask": lambda *of: _train(*of, _ddp, _sam, _does_not_ask),
    "DDP, both passes": lambda *of: _train(
        *of, _ddp, lambda model: _sam(model, closure="both_passes"), _both_passes
    ),
    "DDP, accumulates": lambda *of: _train(*of, _ddp, _sam, _accumulates),
    "DDP, resumed": lambda *of: _train(*of, _ddp, _sam, _asks, _from_state_dicts),
    "DDP, bucket views": lambda *of: _train(
        *of,
        lambda model: DistributedDataParallel(model, gradient_as_bucket_view=True),
        _sam,
        _asks,
    ),
    "DDP, local ascent": lambda *of: _train(
        *of, _ddp, lambda model: _sam(model, process_group=dist.group.WORLD), _local
    ),
    "FSDP2 base, for-loop": lambda *of: _train(*of, _sharded, _torch_sgd(False), _base_step),
    "FSDP2 base, foreach": lambda *of: _train(*of, _sharded, _torch_sgd(True), _base_step),
    "FSDP2, asks": lambda *of: _train(*of, _sharded, _sam, _asks),
    "FSDP2, does not ask": lambda *of: _train(*of, _sharded, _sam, _does_not_ask),
    "FSDP2, both passes": lambda *of: _train(
        *of, _sharded, lambda model: _sam(model, closure="both_passes"), _both_passes
    ),
    "FSDP2, resumed": lambda *of: _train(*of, _sharded, _sam, _asks, _from_distributed_state_dicts),
    "FSDP2, NaN on one rank": lambda *of: _nan_in_a_plain_step(*of, _sharded, _asks),
    "FSDP2, local ascent": _local_ascent_of_shards,
    "ZeRO base": lambda *of: _train(*of, _ddp, _zero_base, _base_step),
    "ZeRO, asks": lambda *of: _train(
        *of, _ddp, lambda model: SAM(optimizer=_zero_base(model), rho=RHO, **POLICY), _asks
    ),
    "ZeRO, does not ask": lambda *of: _train(
        *of, _ddp, lambda model: SAM(optimizer=_zero_base(model), rho=RHO, **POLICY), _does_not_ask
    ),
    # Last, because ranks whose disagreement is not detected would wait for each other forever.
    "DDP, disagreement": lambda *of: _disagreement(*of, _ddp),
    "FSDP2, disagreement": lambda *of: _disagreement(*of, _sharded),
}


# --- reference runs -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scenario", "base"),
    [
        *(
            (f"DDP, {form}", f"DDP base, {kind}")
            for form in ("asks", "does not ask", "both passes", "resumed", "bucket views")
            for kind in ("for-loop", "foreach")
        ),
        ("DDP, accumulates", "DDP base, accumulates"),
        *(
            (f"FSDP2, {form}", f"FSDP2 base, {kind}")
            for form in ("asks", "does not ask", "both passes", "resumed")
            for kind in ("for-loop", "foreach")
        ),
        ("ZeRO, asks", "ZeRO base"),
        ("ZeRO, does not ask", "ZeRO base"),
    ],
)
def test_ranks_have_the_base_s_bits_until_the_first_ascent_and_sam_s_run_after(
    outcomes: list[dict[str, Any]], scenario: str, base: str, dtype: str
) -> None:
    """The base's reference runs on the same ranks, SAM's in one process on the whole batch."""
    found = equal_on_all(outcomes, f"{scenario} {dtype}")
    expected = equal_on_all(outcomes, f"{base} {dtype}")
    for n in range(START):
        assert_same_bits(found[n], expected[n])
    assert_equals_base_until(0, found, reference(Task(dtype=DTYPES[dtype]), DUE))


def test_a_nan_in_one_shard_skips_a_plain_step_on_all_ranks(
    outcomes: list[dict[str, Any]], dtype: str
) -> None:
    found = equal_on_all(outcomes, f"FSDP2, NaN on one rank {dtype}")
    assert_equals_base_until(0, found, reference(Task(dtype=DTYPES[dtype]), DUE, skip={3}))


@pytest.mark.parametrize(
    "kind", ["DDP, disagreement", "FSDP2, disagreement", "FSDP2, local ascent"]
)
def test_refused_steps_move_nothing(outcomes: list[dict[str, Any]], kind: str, dtype: str) -> None:
    (found,) = equal_on_all(outcomes, f"{kind} {dtype}")
    assert_same_bits(found, whole(Task(dtype=DTYPES[dtype]).network()))


def test_a_local_ascent_that_begins_late(outcomes: list[dict[str, Any]], dtype: str) -> None:
    """Every rank ascends on its own gradient; gradients at the perturbed weights are averaged.

    A step without an ascent needs the mean gradient of all ranks from its only pass.
    """
    found = equal_on_all(outcomes, f"DDP, local ascent {dtype}")
    base = equal_on_all(outcomes, f"DDP base, for-loop {dtype}")
    for n in range(START):
        assert_same_bits(found[n], base[n])
    task = Task(dtype=DTYPES[dtype])
    model = task.network()
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    for n in range(STEPS):
        total = [torch.zeros_like(p) for p in model.parameters()]
        for rank in range(RANKS):
            model.zero_grad()
            task.loss(model, n, share(rank)).backward()
            if n in DUE:
                with climbed(model):
                    model.zero_grad()
                    task.loss(model, n, share(rank)).backward()
            for t, p in zip(total, model.parameters(), strict=True):
                t += p.grad / RANKS
        for t, p in zip(total, model.parameters(), strict=True):
            p.grad = t
        optimizer.step()
        assert_close(found[n], whole(model), 1e-5 if dtype == "float32" else 1e-12)
