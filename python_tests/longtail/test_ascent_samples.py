"""Samples for the ascent gradient: frequencies of images, and the expected gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fastsam.longtail import TrainConfig, Trainer, recipe
from fastsam.longtail.data import Batch, load_digits_lt
from fastsam.longtail.models.classifier import Outputs
from fastsam.longtail.objective import Objective
from fastsam.longtail.training.ascent_batch import AscentBatches

DIGITS = load_digits_lt()
SHORT = {"epochs": 4, "batch_size": 100, "lr": 0.05, "warmup_epochs": 0, "lr_milestones": (2, 3)}


def config_for(optimizer: str, method: str = "ce", **settings: Any) -> TrainConfig:
    return recipe("digits-lt", method, optimizer, **{**SHORT, **settings}).config()


def ascent_of(config: TrainConfig) -> AscentBatches:
    found = Trainer(config, data=DIGITS, progress=False).stepper.ascent
    assert found is not None
    return found


def batch(size: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, 1, 8, 8, generator=generator)
    targets = torch.randint(10, (size,), generator=generator)
    return Batch((inputs,), targets, torch.arange(size))


def test_a_uniform_sample_has_each_image_once_at_most_and_equally_often(seed: int) -> None:
    ascent = ascent_of(config_for("sam", ascent_share=0.3))
    data = batch(20, seed)
    counts = torch.zeros(20)
    for number in range(2000):
        found = ascent.sample(data, epoch=1, number=number)
        assert found.mass is None
        indices = found.batch.indices
        assert len(indices) == len(indices.unique()) == 6
        assert torch.equal(found.batch.inputs, data.inputs[indices])
        assert torch.equal(found.batch.targets, data.targets[indices])
        counts[indices] += 1
    # Expected 600 of 2000 each, standard deviation 20.5.
    assert float((counts - 600).abs().max()) < 5 * 20.5


def test_sizes_of_samples() -> None:
    ascent = ascent_of(config_for("sam", ascent_share=0.3))
    assert [ascent.size(n) for n in (100, 10, 5, 3, 2, 1)] == [30, 3, 2, 2, 2, 1]


def test_a_sample_is_that_of_seed_epoch_and_batch() -> None:
    data = batch(50, 0)

    def rows(epoch: int, number: int, **settings: Any) -> list[int]:
        ascent = ascent_of(config_for("sam", "ce-rw", ascent_share=0.5, **settings))
        return ascent.sample(data, epoch=epoch, number=number).batch.indices.tolist()

    for kind in ("uniform", "weighted"):
        options = {"ascent_sample": kind}
        first = rows(1, 0, **options)
        assert rows(1, 0, **options) == first
        assert first not in (rows(2, 0, **options), rows(1, 1, **options))
        assert rows(1, 0, seed=1, **options) != first


def test_a_weighted_sample_has_classes_in_proportion_to_their_weights(seed: int) -> None:
    config = config_for("sam", "ce-drw", defer_epoch=2, ascent_share=0.5, ascent_sample="weighted")
    ascent = ascent_of(config)
    targets = torch.tensor([0] * 12 + [4] * 5 + [9] * 3)
    data = Batch((torch.zeros(20, 1, 1, 1),), targets, torch.arange(20))
    beta = 0.9999
    effective = torch.tensor([(1 - beta) / (1 - beta ** int(n)) for n in DIGITS.counts])
    for epoch, weight in ((2, torch.ones(10)), (3, effective)):
        mass = weight[targets] / weight[targets].sum()
        found = torch.zeros(20)
        draws = 3000
        for number in range(draws):
            sample = ascent.sample(data, epoch=epoch, number=number)
            assert len(sample.batch.indices) == 10
            found += torch.bincount(sample.batch.indices, minlength=20)
        expected = 10 * draws * mass
        deviation = (10 * draws * mass * (1 - mass)).sqrt()
        assert float(((found - expected).abs() / deviation).max()) < 5, epoch


@pytest.mark.parametrize("weighting", ["effective", "algorithm1"])
@pytest.mark.usefixtures("one_thread")
def test_the_expected_gradient_of_a_weighted_sample_is_that_of_the_weighted_loss(
    weighting: str, seed: int
) -> None:
    settings = {"ascent_share": 0.5, "ascent_sample": "weighted", "weighting": weighting}
    run = Trainer(config_for("sam", "ce-rw", **settings), data=DIGITS, progress=False)
    ascent, network = run.stepper.ascent, run.model.eval().double()
    assert ascent is not None
    data = batch(24, seed)
    data = data._replace(views=(data.inputs.double(),), targets=torch.arange(24) % 10)
    features = network.outputs(data.inputs).features.detach()
    head = list(network.head.parameters())

    def gradient(part: Batch, objective: Objective) -> Tensor:
        of_part = features[part.indices]
        outputs = Outputs(of_part, network.head(of_part))
        return flat(objective.loss(outputs, part, network, epoch=1, prepared=[None]))

    def flat(loss: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, head)])

    draws = torch.stack(
        [
            gradient(ascent.sample(data, epoch=1, number=n).batch, ascent.objective)
            for n in range(1000)
        ]
    )
    mean, deviation = draws.mean(dim=0), draws.std(dim=0) / len(draws) ** 0.5 + 1e-12
    counts = DIGITS.counts.astype(float)
    inverse = 1 / counts if weighting == "algorithm1" else 1e-4 / (1 - 0.9999**counts)
    weight = torch.from_numpy(inverse)
    expected, plain = (
        flat(functional.cross_entropy(network.head(features), data.targets, weight=w))
        for w in (weight, None)
    )
    assert float(((mean - expected).abs() / deviation).max()) < 5
    assert float(((mean - plain).abs() / deviation).max()) > 5
    # The gradient of the run's own loss has the same direction.
    actual = gradient(data, run.objective)
    assert torch.allclose(actual / actual.norm(), expected / expected.norm(), atol=1e-9)
