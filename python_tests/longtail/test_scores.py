"""Scores compared with scikit-learn, weights with repeated images, intervals with binomial ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, log_loss, top_k_accuracy_score
from torch import Tensor

from fastsam.longtail.classes import target_prior
from fastsam.longtail.errors import UsageError
from fastsam.longtail.predictions import Predictions
from fastsam.longtail.scores import Scorer, intervals

CLASSES = 7
GROUPS = {"head": (0, 1, 2), "mid": (3, 4), "tail": (5, 6)}


def sample(seed: int, images: int = 203) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.cat(
        [torch.arange(CLASSES), torch.randint(CLASSES, (images - CLASSES,), generator=generator)]
    )
    logits = torch.randn(images, CLASSES, generator=generator)
    logits[torch.arange(images), targets] += 1
    return logits, targets


def test_against_scikit_learn(seed: int) -> None:
    logits, targets = sample(seed)
    scores = Scorer(Predictions.of(logits, targets), CLASSES, GROUPS).scores()
    chances = logits.double().softmax(dim=1).numpy()
    guess = logits.argmax(dim=1)
    assert scores["macro_f1"] == pytest.approx(100 * f1_score(targets, guess, average="macro"))
    assert scores["top5"] == pytest.approx(100 * top_k_accuracy_score(targets, chances, k=5))
    assert scores["nll"] == pytest.approx(log_loss(targets, chances), rel=1e-5)
    shares = [100 * float((guess[targets == c] == c).float().mean()) for c in range(CLASSES)]
    assert scores["worst_class"] == pytest.approx(min(shares))
    assert scores["harmonic_mean"] == pytest.approx(CLASSES / sum(1 / share for share in shares))
    assert scores["tail"] == pytest.approx(np.mean(shares[5:]))


def test_bins_of_confidence_are_those_of_the_calibration_error(seed: int) -> None:
    logits, targets = sample(seed)
    scorer = Scorer(Predictions.of(logits, targets), CLASSES)
    confidence, guess = logits.softmax(dim=1).max(dim=1)
    expected = []
    for low in range(15):
        inside = (confidence * 15).floor().clamp(max=14) == low
        if inside.any():
            right = (guess == targets)[inside].float().mean()
            parts = inside.float().mean(), confidence[inside].mean(), right
            expected.append([100 * float(part) for part in parts])
    bins = scorer.bins()
    found = [[each.share, each.confidence, each.accuracy] for each in bins]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    error = sum(each.share * abs(each.confidence - each.accuracy) for each in bins) / 100
    assert error == pytest.approx(scorer.scores()["ece"])


def test_an_image_that_counts_twice_is_there_twice(seed: int) -> None:
    logits, targets = sample(seed)
    generator = np.random.default_rng(seed)
    # Every class keeps at least 1 image.
    times = np.concatenate([np.ones(CLASSES), generator.integers(0, 4, len(targets) - CLASSES)])
    repeats = torch.from_numpy(times).long()
    repeated = Predictions.of(
        logits.repeat_interleave(repeats, dim=0), targets.repeat_interleave(repeats)
    )
    found = Scorer(Predictions.of(logits, targets), CLASSES, GROUPS).scores(times)
    expected = Scorer(repeated, CLASSES, GROUPS).scores()
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("name", ["uniform", "trained", "reversed"])
def test_a_prior_weights_the_accuracy_of_each_class(name, seed: int) -> None:
    logits, targets = sample(seed)
    predictions = Predictions.of(logits, targets)
    counts = np.array([640, 320, 160, 80, 40, 20, 10])
    prior = target_prior(name, counts)
    assert prior is not None
    scorer = Scorer(predictions, CLASSES, GROUPS, prior)
    found, plain = scorer.scores(), Scorer(predictions, CLASSES, GROUPS).scores()
    by_hand = {
        "uniform": np.full(CLASSES, 1 / CLASSES),
        "trained": counts / counts.sum(),
        "reversed": counts[::-1] / counts.sum(),
    }[name]
    assert found["accuracy"] == pytest.approx(float(by_hand @ scorer.shares()))
    nll = [float(predictions.nll[targets == c].double().mean()) for c in range(CLASSES)]
    assert found["nll"] == pytest.approx(float(by_hand @ nll))
    for untouched in ("balanced", "head", "mid", "tail", "harmonic_mean", "worst_class"):
        assert found[untouched] == plain[untouched]
    if name == "uniform":
        assert found["accuracy"] == pytest.approx(found["balanced"])


def test_reversed_shares_follow_the_ranks_not_the_numbers() -> None:
    assert target_prior("reversed", [10, 60, 30]) == pytest.approx([0.6, 0.1, 0.3])
    assert target_prior("as-is", [10, 60, 30]) is None
    with pytest.raises(UsageError, match="uniform"):
        target_prior("uniformly", [10, 60])  # type: ignore[arg-type]


def test_a_class_that_is_never_right_makes_the_harmonic_mean_0() -> None:
    predictions = Predictions.of(torch.eye(3)[[0, 0, 2]], torch.tensor([0, 1, 2]))
    scores = Scorer(predictions, 3).scores()
    assert scores["harmonic_mean"] == scores["worst_class"] == 0


def test_intervals_have_the_width_of_a_binomial_proportion(seed: int) -> None:
    logits, targets = sample(seed, images=1400)
    scorer = Scorer(Predictions.of(logits, targets), CLASSES, GROUPS)
    found = intervals(scorer, samples=2000, seed=seed)
    scores, shares, images = scorer.scores(), scorer.shares() / 100, scorer.images
    # A proportion within each class, and a sum over classes with known weights.
    variance = shares * (1 - shares) / images
    spreads = {
        "balanced": math.sqrt(variance.sum()) / CLASSES,
        "accuracy": math.sqrt(((images / images.sum()) ** 2 * variance).sum()),
        "tail": math.sqrt(variance[5:].sum()) / 2,
    }
    for name, spread in spreads.items():
        low, high = found[name]
        assert high - low == pytest.approx(2 * 1.96 * 100 * spread, rel=0.12)
        assert low < scores[name] < high
    assert found == intervals(scorer, samples=2000, seed=seed)


def test_confidence_1_is_in_the_bin_of_confidence_095() -> None:
    logits = torch.tensor([[100.0, 0.0], [math.log(19), 0.0]])
    scores = Scorer(Predictions.of(logits, torch.tensor([1, 0])), 2).scores()
    assert scores["ece"] == pytest.approx(50 * (1 - 0.05))
