"""Metrics compared with scikit-learn and with values computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix
from torchmetrics.functional.classification import multiclass_calibration_error

from fastsam.longtail.metrics import evaluate
from fastsam.longtail.predictions import Predictions

GROUPS = {"head": (0, 1), "mid": (2, 3), "tail": (4,)}


def test_against_scikit_learn(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(211, 5, generator=generator)
    targets = torch.cat([torch.arange(5), torch.randint(5, (206,), generator=generator)])
    guess = logits.argmax(dim=1)
    counts = np.array([101, 100, 20, 19, 1])
    metrics = evaluate(Predictions.of(logits, targets), GROUPS, counts)
    shares = metrics.per_class
    assert metrics.groups_by_count == pytest.approx(
        {"head": shares[0], "mid": np.mean(shares[1:3]), "tail": np.mean(shares[3:])}
    )
    assert metrics.accuracy == pytest.approx(100 * accuracy_score(targets, guess))
    assert metrics.balanced == pytest.approx(100 * balanced_accuracy_score(targets, guess))
    matrix = confusion_matrix(targets, guess)
    assert metrics.confusion_matrix().tolist() == matrix.tolist()
    assert len(metrics.confusion) == (matrix > 0).sum()
    assert metrics.images == 211
    ece = multiclass_calibration_error(logits.softmax(dim=1), targets, 5, n_bins=15)
    assert metrics.ece == pytest.approx(100 * float(ece), rel=1e-5)
    assert metrics.groups["mid"] == pytest.approx(np.mean(metrics.per_class[2:4]))


def test_calibration_error_by_hand() -> None:
    # Confidence 0.9 for all and an accuracy of 0.5 give an error of 0.4.
    logits = torch.log(torch.tensor([[0.9, 0.1], [0.9, 0.1]]))
    metrics = evaluate(Predictions.of(logits, torch.tensor([0, 1])), {}, np.array([2, 1]))
    assert metrics.ece == pytest.approx(40.0, abs=1e-4)


def test_a_class_without_images_is_not_counted() -> None:
    groups = {"head": (0,), "tail": (2,)}
    logits = torch.eye(3)[[0, 1]]
    predictions = Predictions.of(logits, torch.tensor([0, 0]))
    metrics = evaluate(predictions, groups, np.array([500, 50, 5]))
    assert metrics.per_class[0] == 50
    assert math.isnan(metrics.per_class[2])
    assert math.isnan(metrics.groups["tail"])
    assert metrics.balanced == 50
