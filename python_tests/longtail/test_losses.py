"""Every loss compared with an independent float64 NumPy implementation of its formula."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fastsam.longtail.data import Batch
from fastsam.longtail.errors import UsageError
from fastsam.longtail.losses import (
    CrossEntropyLoss,
    EqualizationLoss,
    FocalLoss,
    InfluenceBalancedLoss,
    LabelAwareSmoothingLoss,
    LDAMLoss,
    LongTailLoss,
    VSLoss,
    adjust_logits,
    class_balanced_weights,
    inverse_frequency_weights,
)
from fastsam.longtail.losses.softmax_bce import SoftmaxBinaryLoss
from fastsam.longtail.models import Outputs
from fastsam.longtail.objective import Given
from python_tests.longtail.formulas import (
    Numpy,
    balanced,
    ce,
    ce_smoothed,
    equalization,
    focal,
    influence,
    las,
    ldam,
    softmax_binary,
    vs,
)

CLASSES, FEATURES = 6, 5
ORDINARY = [500.0, 120.0, 33.0, 12.0, 5.0, 2.0]
EXTREME = [1e6, 1e6, 1234.0, 2.0, 1.0, 1.0]

CASES: dict[str, tuple[Callable[..., LongTailLoss], Numpy]] = {
    "ce": (lambda n, w: CrossEntropyLoss(weight=w), ce),
    "focal": (lambda n, w: FocalLoss(1.7, weight=w), focal),
    "ldam": (lambda n, w: LDAMLoss(n, 0.5, 30.0, w), ldam),
    "vs": (lambda n, w: VSLoss(n, 0.3, 1.25, w), vs),
    "eql": (lambda n, w: EqualizationLoss(n, 0.05, 0.9, w).eval(), equalization),
    "smoothed": (lambda n, w: CrossEntropyLoss(0.2, weight=w), ce_smoothed),
    "las": (lambda n, w: LabelAwareSmoothingLoss(n, 0.4, 0.1, weight=w), las),
    "las-linear": (
        lambda n, w: LabelAwareSmoothingLoss(n, 0.4, 0.1, "linear", w),
        partial(las, shape="linear"),
    ),
    "las-convex": (
        lambda n, w: LabelAwareSmoothingLoss(n, 0.4, 0.1, "convex", w),
        partial(las, shape="convex"),
    ),
    "softmax-bce": (lambda n, w: SoftmaxBinaryLoss(weight=w), softmax_binary),
    "ib": (lambda n, w: InfluenceBalancedLoss(1000.0, 1e-3, weight=w), influence),
}


def sample(seed: int, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(17, CLASSES, generator=generator, dtype=dtype)
    targets = torch.randint(CLASSES, (17,), generator=generator)
    features = torch.randn(17, FEATURES, generator=generator, dtype=dtype).relu()
    return logits, targets, features


@pytest.mark.parametrize("counts", [ORDINARY, EXTREME], ids=["ordinary", "extreme"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_value_is_the_formula(name: str, weighted: bool, counts: list[float], seed: int) -> None:
    build, formula = CASES[name]
    n = np.array(counts)
    weight = class_balanced_weights(n) if weighted else None
    logits, targets, features = sample(seed)
    losses = [
        formula(z, int(y), n, h)
        for z, y, h in zip(logits.numpy(), targets, features.numpy(), strict=True)
    ]
    w = balanced(n)[targets] if weighted else np.ones(len(targets))
    divisor = len(targets) if name == "ib" else w.sum()
    expected = float(w @ np.array(losses) / divisor)
    loss = build(n, weight)
    assert float(loss(logits, targets, features)) == pytest.approx(expected, rel=1e-6)
    total = loss.sum(logits, targets, features)
    divided = loss.divisor(Batch((), targets, targets))
    assert float(total) == pytest.approx(expected * divisor, rel=1e-6)
    assert float(divided) == pytest.approx(divisor, rel=1e-6)


@pytest.mark.parametrize("counts", [ORDINARY, EXTREME], ids=["ordinary", "extreme"])
@pytest.mark.parametrize("name", CASES)
def test_first_and_second_derivative_by_finite_differences(
    name: str, counts: list[float], seed: int
) -> None:
    loss = CASES[name][0](np.array(counts), class_balanced_weights(counts))
    logits, targets, features = (values[:4] for values in sample(seed))
    # A smaller scale keeps LDAM's exponentials within the resolution of finite differences.
    z = (0.1 * logits).requires_grad_()

    size = loss(z, targets, features).detach().abs()

    def value(z: Tensor) -> Tensor:
        return loss(z, targets, features) / size

    assert torch.autograd.gradcheck(value, (z,), eps=1e-6, atol=1e-5)
    assert torch.autograd.gradgradcheck(value, (z,), eps=1e-6, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_gradient_is_finite_for_certain_and_hopeless_samples(name: str) -> None:
    loss = CASES[name][0](np.array(EXTREME), class_balanced_weights(EXTREME))
    for size in (0.0, 80.0, -80.0):
        logits = torch.zeros(CLASSES, CLASSES)
        logits.fill_diagonal_(size)
        logits.requires_grad_()
        value = loss(logits, torch.arange(CLASSES), torch.zeros(CLASSES, FEATURES))
        value.backward()
        assert value.isfinite()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()


@pytest.mark.parametrize("name", CASES)
def test_half_precision_is_raised_before_anything_is_computed(name: str) -> None:
    loss = CASES[name][0](np.array(ORDINARY), None)
    logits, targets, features = sample(1, dtype=torch.float32)
    half = logits.bfloat16()
    value = loss(half, targets, features)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(half.float(), targets, features))


def test_cross_entropy_is_that_of_torch(seed: int) -> None:
    logits, targets, _ = sample(seed)
    weight = class_balanced_weights(ORDINARY)
    expected = torch.nn.CrossEntropyLoss(weight)(logits, targets)
    assert torch.allclose(CrossEntropyLoss(weight=weight)(logits, targets), expected, rtol=1e-12)


def test_mean_over_samples_divides_by_their_number(seed: int) -> None:
    logits, targets, _ = sample(seed)
    weight = 1 / torch.tensor(ORDINARY, dtype=torch.float64)
    per_sample = torch.nn.functional.cross_entropy(logits, targets, weight, reduction="none")
    value = CrossEntropyLoss(weight=weight, mean="samples")(logits, targets)
    assert torch.allclose(value, per_sample.mean(), rtol=1e-12)


def test_special_cases_of_the_vector_scaling_loss(seed: int) -> None:
    logits, targets, _ = sample(seed)
    prior = torch.tensor(ORDINARY, dtype=torch.float64)
    prior = prior / prior.sum()
    balanced_softmax = torch.nn.functional.cross_entropy(logits + prior.log(), targets)
    assert torch.allclose(VSLoss(ORDINARY, 0.0, 1.0)(logits, targets), balanced_softmax)
    assert torch.allclose(
        VSLoss(ORDINARY, 0.0, 0.0)(logits, targets),
        torch.nn.functional.cross_entropy(logits, targets),
    )
    adjusted = adjust_logits(logits + prior.log(), ORDINARY)
    assert torch.allclose(adjusted, logits)


def test_equalization_draws_the_stated_share_and_repeats_it() -> None:
    counts = np.array([1000.0, *([1.0] * 9)])
    loss = EqualizationLoss(counts, threshold=0.01, drop=0.7)
    logits = torch.zeros(4000, 10, dtype=torch.float64)
    targets = torch.zeros(4000, dtype=torch.long)
    loss.reseed(3)
    first = loss.per_sample(logits, targets, None)
    # With equal logits the loss is the log of the number of classes kept in the denominator.
    kept = (first.exp() - 1) / 9
    assert abs(float(kept.mean()) - 0.3) < 5 * (0.21 / 36000) ** 0.5
    assert torch.equal(first, loss.per_sample(logits, targets, None))
    loss.reseed(4)
    assert not torch.equal(first, loss.per_sample(logits, targets, None))


@pytest.mark.parametrize("training", [True, False])
def test_equalization_without_any_rare_class_in_other_denominators(training: bool) -> None:
    loss = EqualizationLoss([96, 1, 2, 1], threshold=0.015, drop=1.0).train(training)
    logits = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.arange(8) % 4
    found = loss.per_sample(logits, targets, None)
    kept = torch.tensor([[True, False, True, False]] * 8) | (targets[:, None] == torch.arange(4))
    left = logits.where(kept, torch.tensor(-1e300, dtype=torch.float64))
    expected = torch.nn.functional.cross_entropy(left, targets, reduction="none")
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found.sum(), logits, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), logits)[0])


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999, 1 - 1e-9])
def test_class_balanced_weights(beta: float) -> None:
    for counts in (ORDINARY, EXTREME):
        weights = class_balanced_weights(counts, beta).numpy()
        assert weights.sum() == pytest.approx(len(counts))
        exact = [
            1.0 if beta == 0 else (1 - beta) / -np.expm1(count * np.log1p(beta - 1))
            for count in counts
        ]
        assert weights == pytest.approx(np.array(exact) / sum(exact) * len(exact), rel=1e-6)


def test_published_weight_ratios_at_factor_100() -> None:
    for n_max, n_min, ratio in ((5000, 50, 78.9), (500, 5, 97.6)):
        weights = class_balanced_weights([n_max, n_min])
        assert float(weights[1] / weights[0]) == pytest.approx(ratio, abs=0.05)


def test_inverse_frequency_weights() -> None:
    # 5000**90 overflows.
    np.testing.assert_allclose(inverse_frequency_weights([5000, 4000], 90), [0, 2], atol=1e-8)
    weights = inverse_frequency_weights([4, 1, 2])
    assert weights.tolist() == pytest.approx([3 / 7, 12 / 7, 6 / 7])


@pytest.mark.parametrize("counts", [[3, 0], [3], [3, float("nan")], [[1, 2], [3, 4]]])
def test_counts_without_images_are_refused(counts: list[float]) -> None:
    for build in (class_balanced_weights, inverse_frequency_weights, LDAMLoss, VSLoss):
        with pytest.raises(UsageError, match=r"class"):
            build(counts)  # type: ignore[operator]


def test_options_out_of_range_are_refused() -> None:
    for call in (
        lambda: class_balanced_weights([2, 1], beta=1.0),
        lambda: FocalLoss(-1.0),
        lambda: FocalLoss(float("nan")),
        lambda: VSLoss([2, 1], gamma=-0.1),
        lambda: EqualizationLoss([2, 1], drop=1.1),
    ):
        with pytest.raises(UsageError):
            call()
    with pytest.raises(UsageError, match="features"):
        InfluenceBalancedLoss()(torch.zeros(2, 2), torch.tensor([0, 1]))


def test_label_aware_smoothing_of_equal_classes_and_in_the_wrong_order() -> None:
    assert LabelAwareSmoothingLoss([7, 7, 7], 0.3, 0.1).smoothing.tolist() == [0.3] * 3
    with pytest.raises(UsageError, match=r"expected 0 <= tail <= head <= 1, got tail=0\.3"):
        LabelAwareSmoothingLoss([7, 2], 0.1, 0.3)
    with pytest.raises(UsageError, match="smoothing must be in"):
        CrossEntropyLoss(1.5)


def test_power_weights_are_those_of_the_disalign_code() -> None:
    n = np.array(ORDINARY)
    weights = 1 / (n / n.sum()) ** 1.2
    expected = weights / weights.sum() * len(n)
    np.testing.assert_allclose(inverse_frequency_weights(n, 1.2), expected, rtol=1e-12)


def test_a_subclass_with_its_own_sum_does_not_mix_unless_it_says_so() -> None:
    class Former(CrossEntropyLoss):
        """A loss written before there were shares."""

        def sum(  # type: ignore[override]
            self, logits: Tensor, targets: Tensor, features: Any = None, *, factors: Any = None
        ) -> Tensor:
            return 2 * super().sum(logits, targets, features, factors=factors)

    class OwnLoss(CrossEntropyLoss):
        def loss(self, outputs: Outputs, batch: Batch, given: Given) -> Tensor:
            return outputs.logits.sum()

    class Mixes(Former):
        mixes = True

        def sum(self, *inputs: Any, **factors: Any) -> Tensor:
            return LongTailLoss.sum(self, *inputs, **factors)

    class PerSample(CrossEntropyLoss):
        def per_sample(self, logits: Tensor, targets: Tensor, features: Any) -> Tensor:
            return logits.sum(1)

    assert [c.mixes for c in (Former, OwnLoss, Mixes, PerSample)] == [False, False, True, True]
    assert EqualizationLoss.mixes
    logits, targets = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    network: Any = None
    found = Former().loss(
        Outputs(logits, logits), Batch((logits,), targets, targets), Given(network)
    )
    assert torch.allclose(found, 2 * functional.cross_entropy(logits, targets, reduction="sum"))
