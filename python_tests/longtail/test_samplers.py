"""Samplers: class frequencies match the rule, and ranks split an epoch evenly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from scipy.stats import chisquare
from torch.utils.data import DataLoader

from fastsam.longtail import Trainer, recipe
from fastsam.longtail.data import load_digits_lt
from fastsam.longtail.errors import UsageError
from fastsam.longtail.samplers import ClassSampler, EpochSampler, ShuffledSampler
from fastsam.longtail.training import Step
from python_tests.ranks import run_ranks

COUNTS = np.array([300, 90, 25, 7, 1])
TARGETS = np.random.default_rng(1).permutation(np.repeat(np.arange(5), COUNTS))


def class_sampler(strategy: str, **options: Any) -> ClassSampler:
    return ClassSampler(TARGETS, COUNTS, strategy=strategy, **{"seed": 0, **options})


@pytest.mark.parametrize(
    ("strategy", "epoch", "shares"),
    [
        ("class-balanced", 1, np.full(5, 0.2)),
        ("square-root", 3, np.sqrt(COUNTS) / np.sqrt(COUNTS).sum()),
        ("progressive", 0, COUNTS / COUNTS.sum()),
        ("progressive", 1, COUNTS / COUNTS.sum()),
        ("progressive", 6, 0.5 * COUNTS / COUNTS.sum() + 0.1),
        ("progressive", 11, np.full(5, 0.2)),
        ("progressive", 12, np.full(5, 0.2)),
    ],
)
def test_class_frequencies_match_the_rule(strategy: str, epoch: int, shares: np.ndarray) -> None:
    drawn = np.concatenate(
        [class_sampler(strategy, epochs=11, seed=seed).order(epoch) for seed in range(60)]
    )
    observed = np.bincount(TARGETS[drawn], minlength=5)
    assert chisquare(observed, shares * len(drawn)).pvalue > 1e-4
    wrong = np.roll(shares, 1) if strategy != "class-balanced" else COUNTS / COUNTS.sum()
    if not np.allclose(wrong, shares):
        assert chisquare(observed, wrong * len(drawn)).pvalue < 1e-4
    within = np.bincount(drawn, minlength=len(TARGETS))[TARGETS == 0]
    assert chisquare(within).pvalue > 1e-4  # images of a class are equally likely


def test_order_depends_on_seed_and_epoch_only() -> None:
    for make in (
        lambda seed: ShuffledSampler(50, seed=seed),
        lambda seed: class_sampler("square-root", seed=seed),
    ):
        first = make(3).order(2)
        assert (first == make(3).order(2)).all()
        assert (first != make(3).order(1)).any()
        assert (first != make(4).order(2)).any()


@pytest.mark.parametrize("size", [1, 2, 7, 100, 101])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_share_an_epoch(size: int, world_size: int) -> None:
    parts = [
        ShuffledSampler(size, seed=0, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    orders = [part.order(1) for part in parts]
    assert {len(order) for order in orders} == {len(parts[0])}
    times = np.bincount(np.concatenate(orders), minlength=size)
    assert times.min() >= 1
    assert times.sum() - size == -size % world_size
    if size >= world_size:
        assert times.max() <= 2


def test_a_data_loader_follows_the_epoch() -> None:
    sampler: EpochSampler = ShuffledSampler(20, seed=0)
    loader: Any = DataLoader(list(range(20)), sampler=sampler, batch_size=5)  # type: ignore[arg-type]
    for epoch in (1, 2):
        sampler.set_epoch(epoch)
        assert torch.cat(list(loader)).tolist() == sampler.order(epoch).tolist()
    assert len(loader) == 4


def test_ranks_are_checked() -> None:
    with pytest.raises(UsageError, match="rank"):
        ShuffledSampler(3, seed=0, rank=2, world_size=2)


def _gather(rank: int, folder: str) -> None:
    everything = {}
    for name, sampler in (
        ("shuffled", ShuffledSampler(len(TARGETS), seed=5, rank=rank, world_size=2)),
        ("balanced", class_sampler("class-balanced", seed=5, rank=rank, world_size=2)),
    ):
        loader: Any = DataLoader(range(len(TARGETS)), sampler=sampler, batch_size=16)  # type: ignore[arg-type]
        mine = torch.cat(list(loader))
        parts = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(parts, mine)
        everything[name] = torch.stack(parts, dim=1).flatten()
    if rank == 0:
        torch.save(everything, f"{folder}/drawn.pt")


@pytest.mark.slow
def test_two_processes_lose_and_double_nothing(tmp_path: Any) -> None:
    run_ranks(_gather, 2, str(tmp_path))
    drawn = torch.load(tmp_path / "drawn.pt", weights_only=True)
    odd = len(TARGETS) % 2
    whole = ShuffledSampler(len(TARGETS), seed=5).order(1)
    assert drawn["shuffled"].tolist() == [*whole.tolist(), *whole[:odd].tolist()]
    alone = class_sampler("class-balanced", seed=5).order(1)
    assert drawn["balanced"].tolist() == [*alone.tolist(), *alone[:odd].tolist()]


@pytest.mark.parametrize("sampling", ["class-balanced", "square-root", "progressive"])
def test_deferred_sampling_changes_the_samples(sampling: str) -> None:
    data = load_digits_lt()
    drawn: dict[int, list[int]] = {epoch: [] for epoch in (1, 2, 3)}

    def note(step: Step) -> None:
        drawn[step.epoch] += step.targets.tolist()

    chosen = recipe(
        "digits-lt", "ce-drs", "sgd", epochs=3, defer_epoch=1, batch_size=138, sampling=sampling
    )
    run = Trainer(chosen.config(), data=data, on_step=note, progress=False)
    run.fit()
    assert np.bincount(drawn[1]).tolist() == data.counts.tolist()
    late = ClassSampler(data.train.targets, data.counts, strategy=sampling, epochs=3, seed=0)
    for epoch in (2, 3):
        assert len(drawn[epoch]) == len(data.train)
        tail = np.isin(drawn[epoch], (7, 8, 9)).mean()
        assert tail > 1.5 * data.counts[7:].sum() / data.counts.sum()
        observed = np.bincount(drawn[epoch], minlength=10)
        expected = late.class_shares(epoch) * len(drawn[epoch])
        assert chisquare(observed, expected).pvalue > 1e-4


def test_a_sampler_needs_a_target() -> None:
    with pytest.raises(UsageError, match="not empty"):
        ClassSampler([], [0, 0], seed=0)


def test_epochs_that_a_loop_counts_from_0() -> None:
    sampler = class_sampler("progressive", epochs=3)
    orders = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert len({tuple(order) for order in orders}) == 4
    with pytest.raises(UsageError, match="epoch must be at least 0, got -1"):
        sampler.set_epoch(-1)
