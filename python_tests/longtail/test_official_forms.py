"""Losses, schedules and heads as in their official code, and invalid settings."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fastsam.longtail import Trainer, recipe
from fastsam.longtail.build import (
    build_network,
    build_objective,
    build_schedules,
    double_balance,
)
from fastsam.longtail.config import TrainConfig, find_setting
from fastsam.longtail.data import load_dataset
from fastsam.longtail.errors import UsageError
from fastsam.longtail.losses import (
    CrossEntropyLoss,
    EqualizationLoss,
    FocalLoss,
    InfluenceBalancedLoss,
    LDAMLoss,
    LongTailLoss,
    PaCoLoss,
    VSLoss,
    adjust_logits,
)
from fastsam.longtail.models import build_model
from fastsam.longtail.samplers import ClassSampler

COUNTS = [100, 30, 2]
LOSSES: list[LongTailLoss] = [
    CrossEntropyLoss(),
    FocalLoss(),
    LDAMLoss(COUNTS),
    VSLoss(COUNTS),
    EqualizationLoss(COUNTS),
    InfluenceBalancedLoss(),
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize(
    "targets",
    [torch.full((4, 3), 1 / 3), torch.ones(4), torch.ones(3, dtype=torch.long), torch.ones(4) > 0],
    ids=["soft", "float", "short", "bool"],
)
def test_targets_that_are_no_indices_are_refused(loss: LongTailLoss, targets: torch.Tensor) -> None:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    features = torch.ones(4, 5)
    assert loss(logits, torch.tensor([0, 1, 2, 0]), features).isfinite()
    with pytest.raises(UsageError, match="class indices"):
        loss(logits, targets, features)
    with pytest.raises(UsageError, match="class indices"):
        PaCoLoss(COUNTS)(logits, targets, logits, logits, torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_settings_that_are_no_numbers_are_refused(value: float) -> None:
    makes: list[Any] = [
        lambda: LDAMLoss(COUNTS, max_margin=value),
        lambda: LDAMLoss(COUNTS, scale=value),
        lambda: FocalLoss(value),
        lambda: InfluenceBalancedLoss(alpha=value),
        lambda: InfluenceBalancedLoss(epsilon=value),
        lambda: VSLoss(COUNTS, gamma=value),
        lambda: EqualizationLoss(COUNTS, drop=value),
        lambda: CrossEntropyLoss(weight=torch.tensor([1.0, value, 1.0])),
    ]
    for make in makes:
        with pytest.raises(UsageError):
            make()
    with pytest.raises(UsageError):
        CrossEntropyLoss(mean="sum")  # type: ignore[arg-type]


def test_a_class_sampler_takes_lists_and_tensors() -> None:
    targets = [0] * 9 + [1] * 3 + [2]
    counts = [9, 3, 1]
    expected = ClassSampler(np.array(targets), np.array(counts), seed=3).order(1)
    for kind in (list, torch.tensor, tuple):
        sampler = ClassSampler(kind(targets), kind(counts), seed=3)
        assert np.array_equal(sampler.order(1), expected)
    for wrong in ([9, 3, 2], [9, 4], [9.5, 3, 1]):
        with pytest.raises(UsageError, match="counts"):
            ClassSampler(targets, wrong, seed=3)
    with pytest.raises(UsageError, match="sampling strategy"):
        ClassSampler(targets, counts, strategy="even", seed=3)


@pytest.mark.parametrize(
    ("method", "tau", "ways"),
    [
        ("bs", 1.0, ["loss bs adds log prior", "posthoc_tau 1 "]),
        ("la", 0.5, ["loss la adds", "posthoc_tau 0.5 "]),
        ("vs", 1.0, ["loss vs adds", "posthoc_tau 1 "]),
        ("paco", 1.0, ["loss paco adds", "posthoc_tau 1 "]),
        ("paco-rs", 0.0, ["loss paco adds", "rule rs re-samples"]),
        ("ib-rs", 0.0, ["loss ib balances", "rule rs re-samples"]),
        ("la-drw", 0.0, ["loss la adds", "rule drw weights"]),
        ("ce-rs", 1.0, ["rule rs re-samples", "posthoc_tau 1 "]),
        ("ldam-drw", 1.0, ["rule drw weights", "posthoc_tau 1 "]),
        ("bs-rs", 1.0, ["loss bs adds", "rule rs re-samples", "posthoc_tau 1 "]),
    ],
)
def test_balancing_twice_is_a_warning(method: str, tau: float, ways: list[str]) -> None:
    config = recipe("digits-lt", method, "sgd", posthoc_tau=tau).config()
    data = load_dataset("digits-lt")
    with pytest.warns(UserWarning, match=f"balanced {len(ways)} times"):
        Trainer(config, data=data, progress=False)
    message = double_balance(config)
    assert message is not None
    assert all(way in message for way in ways)


def test_balancing_once_is_none() -> None:
    cases = (("bs", 0.0), ("ce", 1.0), ("ce-drw", -2.5), ("cdt", 1.0), ("ib", 0.0), ("ce-rs", 0.0))
    configs = [recipe("digits-lt", name, "sgd", posthoc_tau=tau).config() for name, tau in cases]
    for config in configs:
        assert double_balance(config) is None
    logits = torch.zeros(1, 3)
    assert torch.allclose(adjust_logits(logits, COUNTS, -1.0), -adjust_logits(logits, COUNTS, 1.0))
    with pytest.raises(UsageError, match="posthoc_tau must be"):
        recipe("digits-lt", "ce", "sgd", posthoc_tau=math.nan).config()


def without(config: TrainConfig, *names: str) -> TrainConfig:
    """Create the configuration as stored by an older version."""
    return TrainConfig.from_dict({k: v for k, v in config.as_dict().items() if k not in names})


def test_paco_projects_with_batch_norm_as_its_code_does() -> None:
    config = recipe("cifar100-lt", "paco", "sgd", model="resnet8").config()
    kinds = [type(part) for part in build_network(config, 10, 3).projection]  # type: ignore[union-attr]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    older = build_network(without(config, "paco_batch_norm"), 10, 3)
    assert [type(part) for part in older.projection] == [nn.Linear, nn.ReLU, nn.Linear]  # type: ignore[union-attr]


def test_the_schedules_of_paco() -> None:
    config = recipe("cifar100-lt", "paco", "sgd").config()
    # The code multiplies lr by 0.1 in epochs above 320, counted from 0, and by 0.01 above 360.
    for epoch in range(12, 401):
        factor = 0.01 if epoch - 1 > 360 else 0.1 if epoch - 1 > 320 else 1.0
        assert build_schedules(config)["lr"](epoch) == pytest.approx(0.05 * factor)
    config = recipe("imagenet-lt", "paco", "sgd").config()
    for epoch in range(config.epochs):  # counted from 0, as the code does
        warmup, epochs = 10, 400
        expected = (
            config.lr / warmup * (epoch + 1)
            if epoch < warmup
            else config.lr
            * 0.5
            * (1 + math.cos(math.pi * (epoch - warmup + 1) / (epochs - warmup + 1)))
        )
        assert build_schedules(config)["lr"](epoch + 1) == pytest.approx(expected, rel=1e-12)
    older = without(config, "cosine_start")
    expected = config.lr * (1 + math.cos(math.pi * 49 / 400)) / 2
    assert build_schedules(older)["lr"](50) == pytest.approx(expected, rel=1e-12)


def test_heads_begin_as_in_published_code() -> None:
    torch_std, he_std = 1 / math.sqrt(3 * 512), math.sqrt(2 / 512)
    for init, std in ((None, torch_std), ("torch", torch_std), ("he", he_std)):
        head = build_model("resnet18", 100, head_init=init).head  # type: ignore[arg-type]
        assert float(head.weight.detach().std()) == pytest.approx(std, rel=0.02)  # type: ignore[union-attr,operator,arg-type]
    for data, settings, init in (
        ("cifar10-lt", {}, "he"),
        ("cifar10-lt", {"model": "resnet18"}, "torch"),
        ("imagenet-lt", {}, "torch"),
        ("imagenet-lt", {"head_init": "he"}, "he"),
        ("imagenet-lt", {"model": "resnet32"}, "he"),
    ):
        config = recipe(data, "ce", "sgd", **settings).config()
        assert config.head_init == init
        assert without(config, "head_init").head_init == "he"
    assert recipe("imagenet-lt", "ldam", "sgd").config().head_init is None


def test_the_mean_of_the_weighted_focal_loss() -> None:
    config = recipe("digits-lt", "focal-rw", "sgd").config()
    logits = torch.randn(6, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    targets = torch.tensor([0, 1, 2, 3, 9, 9])
    counts = list(range(100, 0, -10))
    losses = {
        mean: build_objective(settings, np.array(counts)).at(1)[0][0]
        for mean, settings in (("samples", config), ("weights", without(config, "focal_mean")))
    }
    weight = losses["samples"].weight
    assert isinstance(weight, torch.Tensor)
    entropy = functional.cross_entropy(logits, targets, reduction="none")
    total = (weight[targets] * (1 - (-entropy).exp()) * entropy).sum()
    divisors = {"samples": 6.0, "weights": float(weight[targets].sum())}
    for mean, loss in losses.items():
        assert float(loss(logits, targets)) == pytest.approx(float(total) / divisors[mean])
    options = {"weighting": "algorithm1", "focal_mean": "weights"}
    settings = recipe("digits-lt", "focal-rw", "sgd", **options).config()
    assert build_objective(settings, np.array(counts)).at(1)[0][0].mean == "samples"
    assert "algorithm1" in find_setting("focal_mean")[0].metadata["help"]


def test_class_names_are_no_mathematics() -> None:
    from fastsam.report.figures import curves

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fonts without a glyph
        svg = curves({r"$\frac$": [(0, 1)], "a$b": [(1, 1)]}, x="x", y="$y$", title=r"class $\x{$")
    assert svg.startswith("<svg")
