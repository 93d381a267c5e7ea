"""Two processes: ascents along each rank's gradient, samples of each rank's images, and one average."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from fastsam.distributed import World
from fastsam.longtail import TrainConfig, Trainer, recipe
from fastsam.longtail.build import (
    build_class_weights,
    build_network,
    build_objective,
    build_optimizer,
)
from fastsam.longtail.data import Batch, load_digits_lt
from fastsam.longtail.training import Engine, Stepper
from fastsam.longtail.training.ascent_batch import AscentBatches
from fastsam.optim.passes import Need, Passes
from python_tests.ranks import run_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo"),
]

DIGITS = load_digits_lt()
SIZE = 2
STEPS = 5
SPOILED = 3
"""Step whose first pass on rank 1 is NaN: an ascent of LookSAM, too, and not its first."""
OPTIONS: dict[str, Any] = {"batch_size": 24, "lr": 0.05, "rho": 0.2, "warmup_epochs": 0}
State = dict[str, Tensor]


def config_for(optimizer: str, method: str = "ce", **settings: Any) -> TrainConfig:
    every = {"look_every": 3} if optimizer == "looksam" else {}
    return recipe("digits-lt", method, optimizer, **{**OPTIONS, **every, **settings}).config()


def share(step: int, rank: int) -> Batch:
    generator = torch.Generator().manual_seed(100 * step + rank)
    inputs = torch.randn(12, 1, 8, 8, generator=generator)
    targets = torch.randint(10, (12,), generator=generator)
    return Batch((inputs,), targets, torch.arange(12))


def copied(network: nn.Module) -> State:
    return {name: value.clone() for name, value in network.state_dict().items()}


# --- in each process ----------------------------------------------------------------------------


def _local(rank: int, optimizer: str, *, spoil: bool) -> dict[str, Any]:
    """Take steps with local ascents, one of them with NaN in the first pass of one rank."""
    config = config_for(optimizer, ascent_scope="local")
    network = build_network(config, 10, 1).train()
    world = World(rank, SIZE)
    made = build_optimizer(
        config, network, steps_per_epoch=STEPS, process_group=world.process_group
    )
    objective = build_objective(config, DIGITS.counts)
    stepper = Stepper(Engine(network, world), made, objective, seed=rank)
    spoiled = False

    def first_pass(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        nonlocal spoiled
        now, spoiled = spoiled, False
        return (inputs[0] * float("nan"),) if now else None

    network.features.register_forward_pre_hook(first_pass)
    states = []
    for step in range(STEPS):
        spoiled = spoil and (rank, step) == (1, SPOILED)
        list(stepper.steps([share(step, rank)], epoch=1))
        states.append(copied(network))
    return {"states": states, "skipped": stepper.skipped_steps, "cost": stepper.gradients}


class Asks(torch.optim.SGD):
    """An optimizer that records the ascent gradient and changes nothing."""

    given: list[Tensor]

    def passes(self) -> Passes:
        """One step."""
        yield Need(ascent=True)
        trained = [p for group in self.param_groups for p in group["params"]]
        self.given = [p.grad.clone() for p in trained]
        yield Need()


def head_and_tail(rank: int) -> Batch:
    """Rank 0 has 8 copies of an image of class 0, rank 1 has 4 copies of an image of class 9."""
    (image,) = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(rank))
    copies = 8 if rank == 0 else 4
    targets = torch.full((copies,), 0 if rank == 0 else 9)
    return Batch((image.expand(copies, 1, 8, 8).clone(),), targets, torch.arange(copies))


def _weighted(rank: int, weighting: str) -> list[Tensor]:
    """Compute the gradient of a weighted sample of images that are equal on each rank."""
    config = config_for("sam", "ce-rw", weighting=weighting)
    network = build_network(config, 10, 1).eval()
    objective = build_objective(config, DIGITS.counts)
    plain = build_objective(config, DIGITS.counts, weighted=False)
    weights = build_class_weights(config, DIGITS.counts)
    optimizer = Asks(network.parameters(), lr=0.1)
    stepper = Stepper(
        Engine(network, World(rank, SIZE)),
        optimizer,
        objective,
        seed=rank,
        ascent=AscentBatches(0.5, rank, plain, weights),
    )
    next(stepper.steps([head_and_tail(rank)], epoch=1))
    return optimizer.given


def _average(rank: int, folder: str) -> dict[str, Any]:
    """Train a run with averaging, batch normalization and epoch selection."""
    config = config_for(
        "sam", epochs=2, batch_size=100, ema=0.9, select="best-validation", ascent_share=0.5
    )
    run = Trainer(config, out=Path(folder), world=World(rank, SIZE), progress=False)
    first, states = copied(run.model), []
    update = run.judged.update

    def recorded() -> None:
        states.append(copied(run.model))
        update()

    run.judged.update = recorded  # type: ignore[method-assign]
    judged: list[State] = []
    predictions = run.judge.predictions

    def seen(images: Any) -> Any:
        judged.append(copied(run.judge.network))
        return predictions(images)

    run.judge.predictions = seen  # type: ignore[method-assign]
    result = run.fit()
    return {
        "first": first,
        "states": states,
        "judged": judged,
        "metrics": [result.test.accuracy, *(r.validation_accuracy for r in result.history)],
        "rule": result.rule,
        "steps": run.steps_per_epoch,
    }


def _rank_main(rank: int, folder: str) -> None:
    found = {
        f"{optimizer}-{spoil}": _local(rank, optimizer, spoil=spoil)
        for optimizer in ("sam", "asam", "looksam")
        for spoil in (False, True)
    }
    for weighting in ("effective", "algorithm1"):
        found[weighting] = {"gradients": _weighted(rank, weighting)}
    found["average"] = _average(rank, f"{folder}/run")
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(_rank_main, SIZE, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(SIZE)]


# --- by hand, in one process --------------------------------------------------------------------


def slope(network: nn.Module, data: Batch) -> list[Tensor]:
    loss = functional.cross_entropy(network(data.inputs), data.targets)
    return list(torch.autograd.grad(loss, list(network.parameters())))


def norm(tensors: list[Tensor]) -> Tensor:
    return torch.stack([tensor.norm() for tensor in tensors]).norm()


def product(one: list[Tensor], other: list[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(one, other, strict=True)]).sum()


def by_hand(optimizer: str, *, skip: int = -1) -> list[State]:
    """Every rank ascends along the gradient of its images; the gradients there are averaged."""
    config = config_for(optimizer)
    network = build_network(config, 10, 1).train()
    base = torch.optim.SGD(
        network.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    states, direction = [], None
    for step in range(STEPS):
        ascends = optimizer != "looksam" or step % config.look_every == 0
        slopes = [slope(network, share(step, rank)) for rank in range(SIZE)]
        mean = [(a + b) / 2 for a, b in zip(*slopes, strict=True)]
        total = mean
        if ascends:
            tops = []
            for rank in range(SIZE):
                twin = build_network(config, 10, 1).train()
                scales = []
                with torch.no_grad():
                    for (name, p), q in zip(
                        twin.named_parameters(), network.parameters(), strict=True
                    ):
                        p.copy_(q)
                        adapts = optimizer == "asam" and "weight" in name
                        scales.append(q.abs() + 0.01 if adapts else torch.ones_like(q))
                    scaled = [t * g for t, g in zip(scales, slopes[rank], strict=True)]
                    for p, t, g in zip(twin.parameters(), scales, scaled, strict=True):
                        p.add_(t * g * (0.2 / norm(scaled)))
                tops.append(slope(twin, share(step, rank)))
            total = [(a + b) / 2 for a, b in zip(*tops, strict=True)]
            if optimizer == "looksam" and step != skip:
                along = product(mean, total) / norm(mean) ** 2
                flat = [g - along * m for g, m in zip(total, mean, strict=True)]
                direction = [f / norm(flat) for f in flat]
        elif direction is not None:
            length = config.look_alpha * norm(mean)
            total = [m + length * d for m, d in zip(mean, direction, strict=True)]
        if step != skip:
            for p, g in zip(network.parameters(), total, strict=True):
                p.grad = g.detach()
            base.step()
        states.append({name: p.detach().clone() for name, p in network.named_parameters()})
    return states


# --- both ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sam", "asam", "looksam"])
@pytest.mark.usefixtures("one_thread")
def test_each_rank_climbs_on_its_own_gradient(
    optimizer: str, outcomes: list[dict[str, Any]]
) -> None:
    one, other = (outcome[f"{optimizer}-False"] for outcome in outcomes)
    expected = by_hand(optimizer)
    for found, twin, state in zip(one["states"], other["states"], expected, strict=True):
        for name, value in state.items():
            assert torch.equal(found[name], twin[name]), name
            assert torch.allclose(found[name], value, rtol=1e-4, atol=2e-5), name
    assert one["skipped"] == other["skipped"] == 0
    assert one["cost"] == other["cost"] == (STEPS + 2 if optimizer == "looksam" else 2 * STEPS)


@pytest.mark.parametrize("optimizer", ["sam", "asam", "looksam"])
@pytest.mark.usefixtures("one_thread")
def test_a_nan_on_one_rank_skips_the_step_on_both(
    optimizer: str, outcomes: list[dict[str, Any]]
) -> None:
    one, other = (outcome[f"{optimizer}-True"] for outcome in outcomes)
    assert one["skipped"] == other["skipped"] == 1
    expected = by_hand(optimizer, skip=SPOILED)
    for found, twin, state in zip(one["states"], other["states"], expected, strict=True):
        for name, value in state.items():
            assert torch.equal(found[name], twin[name]), name
            assert torch.allclose(found[name], value, rtol=1e-4, atol=2e-5), name
    for outcome in (one, other):  # including running statistics
        before, after = outcome["states"][SPOILED - 1], outcome["states"][SPOILED]
        assert all(torch.equal(before[name], value) for name, value in after.items())


@pytest.mark.parametrize("weighting", ["effective", "algorithm1"])
def test_samples_of_ranks_count_by_the_class_weights_of_their_images(
    weighting: str, outcomes: list[dict[str, Any]]
) -> None:
    """With equal images every sample has their gradient, so the sum is exactly that of the weighted loss."""
    one, other = (outcome[weighting]["gradients"] for outcome in outcomes)
    config = config_for("sam", "ce-rw", weighting=weighting)
    network = build_network(config, 10, 1).eval()
    weight = build_class_weights(config, DIGITS.counts)(1).float()
    shares = [head_and_tail(rank) for rank in range(SIZE)]
    loss = functional.cross_entropy(
        network(torch.cat([data.inputs for data in shares])),
        torch.cat([data.targets for data in shares]),
        weight=weight,
    )
    expected = torch.autograd.grad(loss, list(network.parameters()))
    for found, twin, gradient in zip(one, other, expected, strict=True):
        assert torch.equal(found, twin)
        assert torch.allclose(found, gradient, rtol=1e-4, atol=1e-6)


def test_both_ranks_evaluate_the_same_average(outcomes: list[dict[str, Any]]) -> None:
    one, other = (outcome["average"] for outcome in outcomes)
    assert one["metrics"] == other["metrics"]
    assert one["rule"] == other["rule"]
    assert "averaged with decay 0.9" in one["rule"]
    # Validation of both epochs, test and validation of the best.
    assert len(one["judged"]) == len(other["judged"]) == 4
    for found, twin in zip(one["judged"], other["judged"], strict=True):
        assert all(torch.equal(found[name], twin[name]) for name in found)
    # The average of the means over ranks, running statistics included.
    spread = 0.0
    mean = {name: value.double() for name, value in one["first"].items()}
    for epoch in range(2):
        for step in range(epoch * one["steps"], (epoch + 1) * one["steps"]):
            here, there = one["states"][step], other["states"][step]
            for name, value in mean.items():
                both = (here[name].double() + there[name].double()) / 2
                spread = max(spread, float((here[name] - there[name]).abs().max()))
                mean[name] = 0.9 * value + 0.1 * both
        for name, value in one["judged"][epoch].items():
            if value.is_floating_point():
                assert torch.allclose(value.double(), mean[name], rtol=1e-5, atol=1e-6), name
    assert spread > 0.01  # the ranks' running statistics differ within an epoch
