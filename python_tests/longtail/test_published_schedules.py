"""Learning rate and rho of a run equal the formulas bit for bit in every epoch."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

import pytest

from fastsam.longtail.build import build_schedules
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.data import DATASETS
from fastsam.longtail.losses import LOSSES
from fastsam.longtail.methods import RULES
from fastsam.longtail.named_recipes import NAMED_RECIPES
from fastsam.longtail.optimizers import OPTIMIZERS
from fastsam.longtail.recipes import recipe

METHODS = [
    loss if rule == "none" else f"{loss}-{rule}"
    for loss in LOSSES
    for rule in RULES
    if not (LOSSES[loss].balances_classes and rule in ("rw", "drw"))
]


def piecewise(epoch: int, milestones: Sequence[int], values: Sequence[float]) -> float:
    return values[bisect_left(milestones, epoch)]


def expected_learning_rate(config: TrainConfig, epoch: int) -> float:
    if epoch <= config.warmup_epochs:
        return config.lr * epoch / config.warmup_epochs
    if config.lr_schedule == "cosine" and config.cosine_start == "after-warmup":
        warmup = config.warmup_epochs
        share = (epoch - warmup) / (config.epochs - warmup + 1)
        return config.lr * (1 + math.cos(math.pi * share)) / 2
    if config.lr_schedule == "cosine":
        return config.lr * (1 + math.cos(math.pi * (epoch - 1) / config.epochs)) / 2
    factors = (1.0, *(config.lr_factors or ()))
    return config.lr * piecewise(epoch, config.lr_milestones or (), factors)


def expected_radius(config: TrainConfig, epoch: int) -> float | None:
    if config.rho is None:
        return None
    if config.rho_schedule == "linear":
        share = (epoch - 1) / max(config.epochs - 1, 1)
        return config.rho[0] + share * (config.rho[1] - config.rho[0])
    if config.rho_schedule == "deferred":
        return piecewise(epoch, (config.defer_epoch or 0,), config.rho)
    return piecewise(epoch, config.rho_milestones or (), config.rho)


def assert_same_bits(config: TrainConfig) -> None:
    schedules = build_schedules(config)
    for epoch in range(1, config.epochs + 1):
        assert schedules["lr"](epoch) == expected_learning_rate(config, epoch)
        radius = schedules["rho"](epoch) if "rho" in schedules else None
        assert radius == expected_radius(config, epoch)


@pytest.mark.parametrize(
    "data",
    [
        name if name in ("digits-lt", "cifar10-lt") else pytest.param(name, marks=pytest.mark.slow)
        for name in DATASETS
    ],
)
def test_every_recipe(data: str) -> None:
    checked = set()
    for method in METHODS:
        for optimizer in OPTIMIZERS:
            config = recipe(data, method, optimizer).config()
            of_schedules = (
                *(config.lr, config.epochs, config.warmup_epochs, config.lr_schedule),
                *(config.cosine_start, config.lr_factors, config.lr_milestones),
                *(config.rho, config.rho_schedule, config.rho_milestones, config.defer_epoch),
            )
            if of_schedules not in checked:
                checked.add(of_schedules)
                assert_same_bits(config)
    assert len(checked) > 1


@pytest.mark.parametrize("warmup", [0, 1, 2, 7])
@pytest.mark.parametrize("start", ["first-epoch", "after-warmup"])
@pytest.mark.parametrize("epochs", [1, 7, 61])
def test_cosines_of_any_warm_up(warmup: int, start: str, epochs: int) -> None:
    if warmup <= epochs:
        assert_same_bits(
            recipe(
                "cifar10-lt",
                "ce",
                "sgd",
                lr=0.3,
                epochs=epochs,
                warmup_epochs=warmup,
                lr_schedule="cosine",
                cosine_start=start,
            ).config()
        )


@pytest.mark.parametrize("rho", [(0.05, 0.8), (0.7, 0.1), (0.3, 0.3)])
@pytest.mark.parametrize("epochs", [2, 90, 200])
@pytest.mark.parametrize("schedule", ["linear", "deferred"])
def test_radii_of_two_values(rho: tuple[float, float], epochs: int, schedule: str) -> None:
    assert_same_bits(
        recipe(
            "cifar10-lt", "ce-drw", "sam", epochs=epochs, rho=rho, rho_schedule=schedule
        ).config()
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED_RECIPES)
def test_named_recipes(name: str) -> None:
    for data in NAMED_RECIPES[name].data:
        for optimizer in ("sgd", "sam"):
            assert_same_bits(recipe(data, "ce-drw", optimizer, recipe=name).config())
