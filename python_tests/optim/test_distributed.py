"""Several ranks on gloo: DDP with a global and a local ascent, FSDP2, tensor parallel shards."""

from __future__ import annotations

import copy
import functools
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from fastsam import SAM
from fastsam.optim import local_sam_step
from python_tests.optim.trajectories import assert_close, assert_same_bits
from python_tests.ranks import run_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo"),
]

OPTIONS: dict[str, Any] = {"rho": 0.3, "lr": 0.2, "momentum": 0.9}
BATCH = 12


def _rank_main(rank: int, ranks: int, folder: str) -> None:
    results = {name: scenario(rank, ranks) for name, scenario in SCENARIOS.items()}
    torch.save(results, Path(folder) / str(rank))


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def outcomes(ranks) -> list[dict[str, Any]]:
    """Run all scenarios in one start of the processes; return their results on every rank."""
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(_rank_main, ranks, ranks, folder)
        return [torch.load(Path(folder) / str(rank)) for rank in range(ranks)]


def network(width: int = 5) -> nn.Module:
    """Return a network whose 5 and 3 rows are not multiples of the ranks, and whose last bias is smaller."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3), nn.Tanh(), nn.Linear(3, 1)
    )


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 4, generator=generator), torch.randn(BATCH, 1, generator=generator)


def share(step: int, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    x, y = batch(step)
    return x.chunk(ranks)[rank], y.chunk(ranks)[rank]


def loss_of(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(data[0]), data[1])


def train(model: nn.Module, optimizer: Any, steps: int, data: Callable[[int], Any]) -> None:
    for step in range(steps):
        for finish in (optimizer.first_step, optimizer.second_step):
            loss_of(model, data(step)).backward()
            finish(zero_grad=True)


def whole(model: nn.Module) -> list[Tensor]:
    return [
        (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for p in model.parameters()
    ]


def alone(
    steps: int = 4, base: Any = torch.optim.SGD, options: Any = OPTIONS, *, width: int = 5
) -> list[Tensor]:
    """Run the same training in one process."""
    model = network(width)
    train(model, SAM(model.parameters(), base, **options), steps, batch)
    return whole(model)


def equal_on_all(outcomes: list[dict[str, Any]], scenario: str) -> list[Tensor]:
    for other in outcomes[1:]:
        assert_same_bits(other[scenario], outcomes[0][scenario])
    return outcomes[0][scenario]


# --- DDP ----------------------------------------------------------------------------------------


def _ddp_global(rank: int, ranks: int) -> list[Tensor]:
    model = DistributedDataParallel(network())
    optimizer = SAM(model.parameters(), torch.optim.SGD, **OPTIONS)
    train(model, optimizer, 4, lambda step: share(step, rank, ranks))
    return whole(model)


def test_ddp_climbs_and_descends_on_the_mean_gradient(outcomes):
    assert_close(equal_on_all(outcomes, "ddp_global"), alone(), 1e-5)


def _local_train(model: nn.Module, optimizer: SAM, rank: int, ranks: int, spoil: int) -> None:
    for step in range(4):
        data = share(step, rank, ranks)
        if spoil < 0:
            local_sam_step(model, optimizer, lambda data=data: loss_of(model, data))
            continue
        with model.no_sync():
            loss_of(model, data).backward()
        if (rank, step) == (ranks - 1, spoil):
            next(model.parameters()).grad.fill_(float("nan"))
        optimizer.first_step(zero_grad=True)
        loss_of(model, data).backward()
        optimizer.second_step(zero_grad=True)


def _ddp_local(rank: int, ranks: int, spoil: int = -1) -> list[Tensor]:
    model = DistributedDataParallel(network())
    optimizer = SAM(model.parameters(), torch.optim.SGD, process_group=dist.group.WORLD, **OPTIONS)
    _local_train(model, optimizer, rank, ranks, spoil)
    return [*whole(model), optimizer.skipped_steps.clone()]


def _ddp_local_nan(rank: int, ranks: int) -> list[Tensor]:
    return _ddp_local(rank, ranks, spoil=2)


def m_sharpness(ranks: int, skip: int = -1) -> list[Tensor]:
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=OPTIONS["lr"], momentum=OPTIONS["momentum"])
    return m_sharpness_from(model, base, ranks, range(4), skip)


def m_sharpness_from(
    model: nn.Module, base: torch.optim.Optimizer, ranks: int, steps: range, skip: int = -1
) -> list[Tensor]:
    """Emulate m-sharpness: each part has its own ascent; gradients at the perturbed weights are averaged."""
    for step in steps:
        total = [torch.zeros_like(p) for p in model.parameters()]
        for rank in range(ranks):
            twin = network()
            twin.load_state_dict(model.state_dict())
            data = share(step, rank, ranks)
            gradients = torch.autograd.grad(loss_of(twin, data), list(twin.parameters()))
            norm = torch.stack([g.norm() for g in gradients]).norm()
            with torch.no_grad():
                for p, g in zip(twin.parameters(), gradients, strict=True):
                    p.add_(g * OPTIONS["rho"] / norm)
            for t, g in zip(
                total,
                torch.autograd.grad(loss_of(twin, data), list(twin.parameters())),
                strict=True,
            ):
                t.add_(g / ranks)
        if step != skip:
            for p, t in zip(model.parameters(), total, strict=True):
                p.grad = t
            base.step()
    return whole(model)


def test_ddp_local_is_m_sharpness(outcomes, ranks):
    *found, skipped = equal_on_all(outcomes, "ddp_local")
    assert_close(found, m_sharpness(ranks), 1e-5)
    assert int(skipped) == 0


def test_a_nan_on_one_rank_skips_the_step_on_all(outcomes, ranks):
    *found, skipped = equal_on_all(outcomes, "ddp_local_nan")
    assert_close(found, m_sharpness(ranks, skip=2), 1e-5)
    assert int(skipped) == 1


def _local_refused(rank: int, ranks: int) -> list[Tensor]:
    """A failing pass, an optimizer without process_group, and a model without DDP move nothing."""
    model = DistributedDataParallel(network())
    optimizer = SAM(model.parameters(), torch.optim.SGD, **OPTIONS)
    with pytest.raises(ValueError, match="process_group"):
        local_sam_step(model, optimizer, lambda: loss_of(model, batch(0)))
    optimizer.process_group = dist.group.WORLD
    with pytest.raises(TypeError, match="DistributedDataParallel"):
        local_sam_step(model.module, optimizer, lambda: loss_of(model, batch(0)))
    passes = iter((1.0,))
    with pytest.raises(StopIteration):
        local_sam_step(model, optimizer, lambda: loss_of(model, batch(0)) * next(passes))
    return whole(model)


def _copied(rank: int, ranks: int) -> list[Tensor]:
    """A copy of the optimizer shares the process group; pickling raises."""
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, process_group=dist.group.WORLD, **OPTIONS)
    twin_model, twin = copy.deepcopy((model, optimizer))
    assert twin.process_group is dist.group.WORLD
    with pytest.raises(TypeError, match="state_dict"):
        pickle.dumps(optimizer)
    train(twin_model, twin, 2, batch)
    return whole(twin_model)


def test_optimizers_with_ranks_can_be_copied(outcomes):
    assert_close(equal_on_all(outcomes, "copied"), alone(2), 1e-5)


def test_local_steps_that_are_refused_or_fail_move_nothing(outcomes):
    assert_same_bits(equal_on_all(outcomes, "local_refused"), whole(network()))


def _local_without_gradient(rank: int, ranks: int) -> list[Tensor]:
    """One rank made no first pass: only that rank raises, and no rank waits for another."""
    model = DistributedDataParallel(network())
    optimizer = SAM(model.parameters(), torch.optim.SGD, process_group=dist.group.WORLD, **OPTIONS)
    if rank == ranks - 1:
        with pytest.raises(RuntimeError, match="no parameter has a gradient"):
            optimizer.first_step()
    else:
        with model.no_sync():
            loss_of(model, share(0, rank, ranks)).backward()
        optimizer.first_step(zero_grad=True)
        assert not torch.equal(next(model.parameters()), next(network().parameters()))
    optimizer.restore()
    return whole(model)


def test_only_the_rank_without_a_gradient_raises(outcomes):
    assert_same_bits(equal_on_all(outcomes, "local_without_gradient"), whole(network()))


def _static_graph(rank: int, ranks: int) -> list[Tensor]:
    """The first iteration of DDP must be synchronized; after it a local ascent works."""
    model = DistributedDataParallel(network(), static_graph=True)
    optimizer = SAM(model.parameters(), torch.optim.SGD, process_group=dist.group.WORLD, **OPTIONS)
    with pytest.raises(ValueError, match="static_graph"):
        local_sam_step(model, optimizer, lambda: loss_of(model, batch(0)))
    assert_same_bits(whole(model), whole(network()))
    loss_of(model, share(0, rank, ranks)).backward()
    _local_train(model, optimizer, rank, ranks, spoil=-1)
    return whole(model)


def test_a_static_graph_begins_with_a_synchronized_pass(outcomes, ranks):
    assert_close(equal_on_all(outcomes, "static_graph"), m_sharpness(ranks), 1e-5)


def _static_graph_global(rank: int, ranks: int) -> list[Tensor]:
    model = DistributedDataParallel(network(), static_graph=True)
    optimizer = SAM(model.parameters(), torch.optim.SGD, **OPTIONS)
    train(model, optimizer, 4, lambda step: share(step, rank, ranks))
    return whole(model)


def test_a_static_graph_with_a_global_ascent(outcomes):
    assert_close(equal_on_all(outcomes, "static_graph_global"), alone(), 1e-5)


class _SubclassedSAM(SAM):
    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, torch.optim.SGD, **options)


def _zero_redundancy(rank: int, ranks: int) -> list[Tensor]:
    """ZeRO around SAM would pass one rank's parameters to SAM, so the norm would not be global."""
    model = DistributedDataParallel(network())
    makers = (
        (SAM, {"base_optimizer": torch.optim.SGD}),
        (functools.partial(SAM, base_optimizer=torch.optim.SGD), {}),
        (_SubclassedSAM, {}),
    )
    for inner, options in makers:
        with pytest.raises(ValueError, match=r"SAM\(optimizer=ZeroRedundancyOptimizer\("):
            ZeroRedundancyOptimizer(model.parameters(), inner, **options, **OPTIONS)
    base = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.2, momentum=0.9)
    optimizer = SAM(optimizer=base, rho=0.3)
    train(model, optimizer, 2, lambda step: share(step, rank, ranks))
    base.consolidate_state_dict(to=0)
    if rank == 0:  # a plain optimizer can load it
        assert len(optimizer.state_dict()["state"]) == len(list(model.parameters()))
    train(model, optimizer, 2, lambda step: share(step + 2, rank, ranks))
    return whole(model)


def test_zero_redundancy_inside_equals_one_process(outcomes):
    assert_close(equal_on_all(outcomes, "zero_redundancy"), alone(), 1e-5)


# --- the ascent policy --------------------------------------------------------------------------

POLICY = {"start": 1, "interval": 2}


def asking(model: nn.Module, optimizer: Any, steps: int, data: Callable[[int], Any]) -> list[int]:
    """Train with a second pass if an ascent is due; return the number of passes of each step."""
    passes = []
    for step in range(steps):
        loss_of(model, data(step)).backward()
        passes.append(1)
        if optimizer.ascent_due:
            optimizer.first_step(zero_grad=True)
            loss_of(model, data(step)).backward()
            passes[-1] = 2
        optimizer.step()
        optimizer.zero_grad()
    return passes


def alone_with_policy(steps: int = 5) -> list[Tensor]:
    model = network()
    asking(model, SAM(model.parameters(), torch.optim.SGD, **OPTIONS, **POLICY), steps, batch)
    return whole(model)


def _policy_ddp(rank: int, ranks: int) -> list[Tensor]:
    """With bucket views as gradients, whose memory moves after the first pass."""
    model = DistributedDataParallel(network(), gradient_as_bucket_view=True)
    optimizer = SAM(model.parameters(), torch.optim.SGD, **OPTIONS, **POLICY)
    passes = asking(model, optimizer, 5, lambda step: share(step, rank, ranks))
    assert passes == [1, 2, 1, 2, 1]
    return whole(model)


def _policy_zero_redundancy(rank: int, ranks: int) -> list[Tensor]:
    model = DistributedDataParallel(network())
    base = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.2, momentum=0.9)
    optimizer = SAM(optimizer=base, rho=0.3, **POLICY)
    asking(model, optimizer, 5, lambda step: share(step, rank, ranks))
    assert optimizer.attempted_steps == 5
    return whole(model)


def _policy_fsdp(rank: int, ranks: int) -> list[Tensor]:
    """Also saved and loaded before and after the first ascent."""
    model = network()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    optimizer = SAM(model.parameters(), torch.optim.SGD, **OPTIONS, **POLICY)
    for step in range(5):
        saved = dcp.get_optimizer_state_dict(model, optimizer)
        optimizer = SAM(model.parameters(), torch.optim.SGD, **OPTIONS)
        dcp.set_optimizer_state_dict(model, optimizer, saved)
        assert optimizer.attempted_steps == step
        asking(model, optimizer, 1, lambda _, step=step: share(step, rank, ranks))
    return whole(model)


@pytest.mark.parametrize("kind", ["policy_ddp", "policy_zero_redundancy", "policy_fsdp"])
def test_steps_with_and_without_an_ascent_equal_one_process(outcomes, kind):
    assert_close(equal_on_all(outcomes, kind), alone_with_policy(), 1e-5)


def _policy_fsdp_inf(rank: int, ranks: int) -> list[Tensor]:
    """In a step without an ascent one rank finds a non-finite gradient, and all skip."""
    model = network()
    fully_shard(model)
    optimizer = SAM(model.parameters(), torch.optim.SGD, start=9, **OPTIONS)
    for step in range(2):
        loss_of(model, share(step, rank, ranks)).backward()
        if step == 1 and rank == 0:
            next(model.parameters()).grad.to_local().fill_(float("inf"))
        optimizer.step()
        optimizer.zero_grad()
    return [*whole(model), optimizer.skipped_steps.clone()]


def test_fsdp_skips_steps_without_an_ascent_on_all_ranks(outcomes):
    *found, skipped = equal_on_all(outcomes, "policy_fsdp_inf")
    model = network()
    plain = torch.optim.SGD(model.parameters(), lr=OPTIONS["lr"], momentum=OPTIONS["momentum"])
    loss_of(model, batch(0)).backward()
    plain.step()
    assert_close(found, whole(model), 1e-5)
    assert int(skipped) == 1


def _policy_fsdp_local(rank: int, ranks: int) -> list[Tensor]:
    model = network()
    fully_shard(model)
    optimizer = SAM(
        model.parameters(), torch.optim.SGD, start=9, process_group=dist.group.WORLD, **OPTIONS
    )
    loss_of(model, share(0, rank, ranks)).backward()
    with pytest.raises(ValueError, match="requires whole parameters"):
        optimizer.step()
    return whole(model)


def test_fsdp_refuses_a_local_ascent_before_the_first(outcomes):
    assert_same_bits(equal_on_all(outcomes, "policy_fsdp_local"), whole(network()))


def _policy_local(rank: int, ranks: int) -> list[Tensor]:
    """DDP learns the static graph in the steps before the first local ascent."""
    model = DistributedDataParallel(network(), static_graph=True)
    optimizer = SAM(
        model.parameters(),
        torch.optim.SGD,
        process_group=dist.group.WORLD,
        start=4,
        first_attempt=3,
        **OPTIONS,
    )
    for step in range(3):
        data = share(step, rank, ranks)
        local_sam_step(model, optimizer, lambda data=data: loss_of(model, data))
    return whole(model)


def test_a_local_ascent_may_start_late(outcomes, ranks):
    model = network()
    plain = torch.optim.SGD(model.parameters(), lr=OPTIONS["lr"], momentum=OPTIONS["momentum"])
    loss_of(model, batch(0)).backward()
    plain.step()
    found = equal_on_all(outcomes, "policy_local")
    assert not torch.equal(found[0], whole(model)[0])
    assert_close(found, m_sharpness_from(model, plain, ranks, range(1, 3)), 1e-5)


DIFFERENT = {
    "start": {"start": 1},
    "interval": {"interval": 3},
    "stop": {"stop": 5},
    "attempted_steps": {"first_attempt": 2},
    "any rho": {"rho": 0.0},
}


def _policy_differs(rank: int, ranks: int) -> list[Tensor]:
    """All ranks raise in the first step, and in the first step after a change."""
    model = network()
    data = share(0, rank, ranks)
    for name, options in DIFFERENT.items():
        optimizer = SAM(
            model.parameters(), torch.optim.SGD, **{**OPTIONS, **(options if rank == 0 else {})}
        )
        loss_of(model, data).backward()
        with pytest.raises(ValueError, match=f"ranks must agree on the ascent policy, got {name}"):
            (optimizer.first_step if optimizer.ascent_due else optimizer.step)()
        with pytest.raises(ValueError, match=f"got {name}"):
            next(optimizer.passes())
        optimizer.zero_grad()
    optimizer = SAM(model.parameters(), torch.optim.SGD, start=9, **{**OPTIONS, "lr": 0.0})
    loss_of(model, data).backward()
    optimizer.step()
    optimizer.param_groups[0]["start"] = 10 + rank
    with pytest.raises(ValueError, match="got start"):
        optimizer.step()
    optimizer.param_groups[0]["start"] = 10
    optimizer.step()
    assert optimizer.attempted_steps == 2
    return whole(model)


def test_ranks_that_disagree_on_the_policy_are_refused(outcomes):
    assert_same_bits(equal_on_all(outcomes, "policy_differs"), whole(network()))


# --- FSDP2 and tensor parallel ------------------------------------------------------------------


def _sharded(rank: int, ranks: int, base: Any, options: Any, *, spoil: int = -1) -> Any:
    """Return the trained weights, and those of a run that was saved and loaded midway."""
    model = network()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    optimizer = SAM(model.parameters(), base, **options)
    for step in range(4):
        for which, finish in enumerate((optimizer.first_step, optimizer.second_step)):
            loss_of(model, share(step, rank, ranks)).backward()
            if step == spoil and which == 1 and rank == 0:
                next(model.parameters()).grad.to_local().fill_(float("inf"))
            finish(zero_grad=True)
        if step == 1:
            saved = dcp.get_optimizer_state_dict(model, optimizer)
            dcp.set_optimizer_state_dict(model, optimizer, saved)
    steps = [float(entry["step"]) for entry in optimizer.state.values() if "step" in entry]
    return [*whole(model), torch.tensor(steps), optimizer.skipped_steps.clone()]


def _fsdp_sgd(rank: int, ranks: int) -> Any:
    return _sharded(rank, ranks, torch.optim.SGD, OPTIONS)


def _fsdp_adamw(rank: int, ranks: int) -> Any:
    return _sharded(rank, ranks, torch.optim.AdamW, {"rho": 0.3, "lr": 0.05, "adaptive": True})


def _fsdp_generic(rank: int, ranks: int) -> Any:
    return _sharded(rank, ranks, torch.optim.RMSprop, {"rho": 0.3, "lr": 0.01})


def _fsdp_inf(rank: int, ranks: int) -> Any:
    return _sharded(rank, ranks, torch.optim.SGD, OPTIONS, spoil=3)


@pytest.mark.parametrize(
    ("scenario", "base", "options"),
    [
        ("fsdp_sgd", torch.optim.SGD, OPTIONS),
        ("fsdp_adamw", torch.optim.AdamW, {"rho": 0.3, "lr": 0.05, "adaptive": True}),
        ("fsdp_generic", torch.optim.RMSprop, {"rho": 0.3, "lr": 0.01}),
    ],
    ids=["SGD", "AdamW", "RMSprop"],
)
def test_fsdp_equals_one_process(outcomes, scenario, base, options):
    *found, steps, skipped = equal_on_all(outcomes, scenario)
    assert_close(found, alone(4, base, options), 1e-4)
    assert bool((steps == 4).all())  # on ranks with an empty shard, too
    assert int(skipped) == 0


def _train_one_layer_perturbed(model: nn.Module, data: Callable[[int], Any]) -> list[Tensor]:
    """Return the weights after training, inside ``unperturbed()``, and in ``unperturbed_weights``."""
    first, *rest = [layer for layer in model if isinstance(layer, nn.Linear)]
    optimizer = SAM(
        [
            {"params": [p for layer in rest for p in layer.parameters()], "perturb": False},
            {"params": list(first.parameters())},
        ],
        torch.optim.SGD,
        **OPTIONS,
    )
    for step in range(4):
        loss_of(model, data(step)).backward()
        optimizer.first_step(zero_grad=True)
        with optimizer.unperturbed():
            inside = whole(model)
            with torch.no_grad():
                loss_of(model, data(step))  # gathers the current weights
        loss_of(model, data(step)).backward()
        shown = list(optimizer.unperturbed_weights.values())
        shown += list(optimizer.perturbation.values())
        assert len(shown) == 4
        shown = [t.full_tensor() if isinstance(t, DTensor) else t for t in shown]
        if step % 2:
            optimizer.return_to_weights()
        optimizer.second_step(zero_grad=True)
    return [*whole(model), *inside, *shown]


def _fsdp_perturb(rank: int, ranks: int) -> Any:
    model = network()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, reshard_after_forward=False)
    fully_shard(model, reshard_after_forward=False)
    return _train_one_layer_perturbed(model, lambda step: share(step, rank, ranks))


def test_fsdp_between_the_halves_equals_one_process(outcomes):
    found = equal_on_all(outcomes, "fsdp_perturb")
    assert_close(found, _train_one_layer_perturbed(network(), batch), 1e-4)


def test_fsdp_skips_on_all_ranks(outcomes):
    *found, _, skipped = equal_on_all(outcomes, "fsdp_inf")
    assert_close(found, alone(3), 1e-5)
    assert int(skipped) == 1


def _warm_up(model: nn.Module, steps: int, data: Callable[[int], Any]) -> list[Tensor]:
    """Train with a learning rate that starts at 0, where a step with zero gradients would only create state.

    The last layer is one row of zeros, so in the first step all gradients but its own are 0, and one rank
    holds all of its shards.
    """
    nn.init.zeros_(model[-1].weight)
    optimizer = SAM(model.parameters(), torch.optim.SGD, start=100, **OPTIONS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 2))
    for step in range(steps):
        loss_of(model, data(step)).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert optimizer.attempted_steps == steps
    return whole(model)


def _fsdp_warm_up(rank: int, ranks: int) -> list[Tensor]:
    model = network()
    for layer in (model[0], model[2], model[4]):
        fully_shard(layer)
    fully_shard(model)
    return _warm_up(model, 4, lambda step: share(step, rank, ranks))


def test_fsdp_warms_up_from_a_learning_rate_of_0(outcomes):
    expected = _warm_up(network(), 4, batch)
    assert_close(equal_on_all(outcomes, "fsdp_warm_up"), expected, 1e-5)


def _fsdp_local(rank: int, ranks: int) -> str:
    model = fully_shard(network())
    optimizer = SAM(model.parameters(), torch.optim.SGD, process_group=dist.group.WORLD, **OPTIONS)
    loss_of(model, share(0, rank, ranks)).backward()
    with pytest.raises(ValueError, match="process_group") as error:
        optimizer.first_step()
    return str(error.value)


def test_fsdp_with_a_local_ascent_is_refused(outcomes):
    assert all("DTensor" in outcome["fsdp_local"] for outcome in outcomes)


def _fsdp_gathered(rank: int, ranks: int, base: Any, options: Any) -> list[Tensor]:
    """FSDP2 keeps gathered weights if configured to, and after a forward pass without a backward pass.

    Each phase makes them stale. SAM must not touch those of another model.
    """
    model = network()
    for layer in (model[0], model[2]):
        fully_shard(layer)
    fully_shard(model)
    other = fully_shard(network(), reshard_after_forward=False)
    optimizer = SAM(model.parameters(), base, **options)
    model.set_reshard_after_backward(False)
    with torch.no_grad():
        other(batch(0)[0])
    for step in range(4):
        if step == 2:  # an abandoned step is followed by one at the restored weights
            loss_of(model, share(9, rank, ranks)).backward()
            optimizer.first_step(zero_grad=True)
            loss_of(model, share(9, rank, ranks)).backward()
            optimizer.zero_grad()
            optimizer.restore()
        for finish in (optimizer.first_step, optimizer.second_step):
            loss_of(model, share(step, rank, ranks)).backward()
            with torch.no_grad():
                model(batch(0)[0])
            finish(zero_grad=True)
    assert isinstance(other, FSDPModule)
    assert not any(isinstance(p, DTensor) for p in other.parameters())  # still gathered
    return [
        (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for p in optimizer.param_groups[0]["params"]
    ]


def _fsdp_gathered_sgd(rank: int, ranks: int) -> list[Tensor]:
    return _fsdp_gathered(rank, ranks, torch.optim.SGD, OPTIONS)


def _fsdp_gathered_generic(rank: int, ranks: int) -> list[Tensor]:
    return _fsdp_gathered(rank, ranks, torch.optim.RMSprop, {"rho": 0.3, "lr": 0.01})


def test_gathered_weights_are_never_stale(outcomes):
    assert_close(equal_on_all(outcomes, "fsdp_gathered_sgd"), alone(), 1e-5)
    expected = alone(4, torch.optim.RMSprop, {"rho": 0.3, "lr": 0.01})
    assert_close(equal_on_all(outcomes, "fsdp_gathered_generic"), expected, 1e-4)


def _fsdp_accumulated(rank: int, ranks: int) -> list[Tensor]:
    """FSDP2 exposes no unsynchronized gradients; the last micro-batch synchronizes all of them."""
    model = fully_shard(network())
    optimizer = SAM(model.parameters(), torch.optim.SGD, **OPTIONS)
    for step in range(3):
        for finish in (optimizer.first_step, optimizer.second_step):
            x, y = share(step, rank, ranks)
            model.set_requires_gradient_sync(False)
            (loss_of(model, (x[:1], y[:1])) / len(x)).backward()
            if finish == optimizer.first_step:
                with pytest.raises(RuntimeError, match=r"set_requires_gradient_sync\(False\)"):
                    finish()
            model.set_requires_gradient_sync(True)
            (loss_of(model, (x[1:], y[1:])) * (len(x) - 1) / len(x)).backward()
            finish(zero_grad=True)
    return whole(model)


def test_fsdp_without_synchronized_gradients_is_refused(outcomes):
    assert_close(equal_on_all(outcomes, "fsdp_accumulated"), alone(3), 1e-5)


def _tensor_parallel(rank: int, ranks: int) -> list[Tensor]:
    """Shard rows and columns over the ranks; the last layer is a plain module, its twin replicated."""
    mesh = init_device_mesh("cpu", (ranks,))
    model = network(width=8)
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    optimizer = SAM(model.parameters(), torch.optim.SGD, **OPTIONS)
    assert any(
        isinstance(p, DTensor) and p.placements == (Replicate(),) for p in model.parameters()
    )
    train(model, optimizer, 4, batch)
    return whole(model)


def test_tensor_parallel_equals_one_process(outcomes):
    """Norms add up over shards and never over replicas."""
    assert_close(equal_on_all(outcomes, "tensor_parallel"), alone(width=8), 1e-5)


def _hybrid(rank: int, ranks: int) -> list[Tensor]:
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicate", "shard"))
    model = fully_shard(network(), mesh=mesh)
    optimizer = SAM(model.parameters(), torch.optim.SGD, **OPTIONS)
    train(model, optimizer, 4, lambda step: share(step, rank, ranks))
    return whole(model)


def test_hybrid_sharding_equals_one_process(outcomes):
    assert_close(equal_on_all(outcomes, "hybrid"), alone(), 1e-5)


def _two_dimensions(rank: int, ranks: int) -> list[Tensor]:
    """FSDP2 over tensor parallel: its strided shards are parts of the norm like any other."""
    mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("data", "tensor"))
    model = network(width=8)
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    for layer in (model[0], model[2], model[4]):
        fully_shard(layer, mesh=mesh["data"])
    optimizer = SAM(model.parameters(), torch.optim.SGD, **OPTIONS)
    train(model, optimizer, 4, lambda step: share(step, rank // 2, ranks // 2))
    return whole(model)


def test_fsdp_over_tensor_parallel_equals_one_process(outcomes):
    assert_close(equal_on_all(outcomes, "two_dimensions"), alone(width=8), 1e-5)


def _stochastic(rank: int, ranks: int) -> list[Tensor]:
    """Return the perturbed bfloat16 weights, which the ranks must round alike."""
    model = network().bfloat16()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.01, lr=0.2, stochastic_rounding=True)
    x, y = batch(0)
    loss_of(model, (x.bfloat16(), y.bfloat16())).backward()
    optimizer.first_step()
    return whole(model)


def test_ranks_round_stochastically_alike(outcomes):
    equal_on_all(outcomes, "stochastic")


# --- a model of its own on each rank ----------------------------------------------------------


def _own_models(rank: int, ranks: int) -> list[Tensor]:
    """Every rank has another interval, and trains another number of steps."""
    group = dist.new_group([rank], use_local_synchronization=True)
    model = network()
    options = {**OPTIONS, "interval": rank + 1}
    optimizer = SAM(model.parameters(), torch.optim.SGD, process_group=group, **options)
    asking(model, optimizer, 3 + rank, batch)
    return whole(model)


def test_ranks_may_train_models_of_their_own(outcomes):
    for rank, outcome in enumerate(outcomes):
        model = network()
        optimizer = SAM(model.parameters(), torch.optim.SGD, **OPTIONS, interval=rank + 1)
        asking(model, optimizer, 3 + rank, batch)
        assert_same_bits(outcome["own_models"], whole(model))


SCENARIOS: dict[str, Callable[[int, int], Any]] = {
    "own_models": _own_models,
    "policy_ddp": _policy_ddp,
    "policy_zero_redundancy": _policy_zero_redundancy,
    "policy_fsdp": _policy_fsdp,
    "policy_fsdp_inf": _policy_fsdp_inf,
    "policy_fsdp_local": _policy_fsdp_local,
    "policy_local": _policy_local,
    "policy_differs": _policy_differs,
    "ddp_global": _ddp_global,
    "ddp_local": _ddp_local,
    "ddp_local_nan": _ddp_local_nan,
    "local_refused": _local_refused,
    "copied": _copied,
    "local_without_gradient": _local_without_gradient,
    "static_graph": _static_graph,
    "static_graph_global": _static_graph_global,
    "zero_redundancy": _zero_redundancy,
    "fsdp_sgd": _fsdp_sgd,
    "fsdp_adamw": _fsdp_adamw,
    "fsdp_generic": _fsdp_generic,
    "fsdp_inf": _fsdp_inf,
    "fsdp_perturb": _fsdp_perturb,
    "fsdp_warm_up": _fsdp_warm_up,
    "fsdp_local": _fsdp_local,
    "fsdp_gathered_sgd": _fsdp_gathered_sgd,
    "fsdp_gathered_generic": _fsdp_gathered_generic,
    "fsdp_accumulated": _fsdp_accumulated,
    "tensor_parallel": _tensor_parallel,
    "hybrid": _hybrid,
    "two_dimensions": _two_dimensions,
    "stochastic": _stochastic,
}
