"""Label noise: number and distribution of wrong labels, and what does not change."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chisquare

from fastsam.cli.main import main
from fastsam.longtail.data import load_dataset
from fastsam.longtail.data.label_noise import noisy_labels
from fastsam.longtail.errors import UsageError


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 1.0])
def test_the_share_is_exact_and_every_other_class_as_likely(share: float, seed: int) -> None:
    targets = np.repeat(np.arange(5), 2000)
    labels = noisy_labels(targets, 5, share, seed)
    wrong = labels != targets
    assert wrong.sum() == round(share * 10000)
    if share:
        moves = np.bincount((labels - targets)[wrong] % 5, minlength=5)[1:]
        assert chisquare(moves).pvalue > 1e-4
        assert chisquare([wrong[targets == c].sum() for c in range(5)]).pvalue > 1e-4 or share == 1
    assert np.array_equal(labels, noisy_labels(targets, 5, share, seed))
    assert np.array_equal(targets, np.repeat(np.arange(5), 2000))


@pytest.mark.parametrize("name", ["digits-lt", "fashion-mnist-lt"])
def test_only_training_labels_change(name: str) -> None:
    settings = {} if name == "digits-lt" else {"n_max": 60, "validation_per_class": 20}
    clean = load_dataset(name, imbalance=20, **settings)
    noisy = load_dataset(name, imbalance=20, label_noise=0.4, **settings)
    assert (noisy.train.targets != clean.train.targets).sum() == round(0.4 * len(clean.train))
    assert np.array_equal(noisy.train.digests(), clean.train.digests())
    for part in ("validation", "test"):
        assert np.array_equal(noisy.split(part).targets, clean.split(part).targets)
    assert noisy.groups == clean.groups
    assert noisy.counts.sum() == clean.counts.sum()
    assert noisy.subset_hash != clean.subset_hash
    assert (
        noisy.subset_hash
        != load_dataset(name, imbalance=20, label_noise=0.2, **settings).subset_hash
    )
    assert "were replaced" in noisy.notes[-1]


def test_a_share_above_1_is_refused() -> None:
    with pytest.raises(UsageError, match="label_noise"):
        load_dataset("digits-lt", label_noise=1.1)


def test_the_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    line = "train --data digits-lt --imbalance 1 --label-noise 0.4 --method ce --optimizer sgd"
    assert main([*line.split(), "--epochs", "1", "--quiet"]) == 0
    assert "label noise: 400 of 1000 training labels were replaced" in capsys.readouterr().out
