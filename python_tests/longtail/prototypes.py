"""Generated long-tailed data sets with any number of classes: noisy copies of random images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fastsam.longtail.data import LongTailData, TensorImages, groups_by_count, longtail_counts
from fastsam.longtail.data.augment import RandomCrop


def prototypes(num_classes: int, *, n_max: int, imbalance: float, seed: int = 0) -> LongTailData:
    """Create grayscale images of 8x8 pixels; each class is one random image with added noise."""
    rng = np.random.default_rng(seed)
    centers = rng.integers(0, 256, (num_classes, 1, 8, 8))

    def drawn(counts: NDArray[np.int64]) -> TensorImages:
        targets = np.repeat(np.arange(num_classes), counts)
        pixels = centers[targets] + rng.normal(0, 20, (len(targets), 1, 8, 8))
        images = torch.from_numpy(pixels.clip(0, 255).astype(np.uint8))
        return TensorImages(images, targets, 255.0, (0.5,), (0.29,), RandomCrop(1))

    counts, names = longtail_counts(n_max, num_classes, imbalance), map(str, range(num_classes))
    sets = {"train": drawn(counts), "validation": None, "test": drawn(np.ones_like(counts))}
    groups = groups_by_count(counts, many=n_max // 2, few=3)
    return LongTailData("prototypes", **sets, class_names=(*names,), groups=groups, subset_hash="")


@pytest.fixture(scope="session")
def hundred_classes() -> LongTailData:
    return prototypes(100, n_max=30, imbalance=15)


@pytest.fixture(scope="session")
def inaturalist_classes() -> LongTailData:
    """A data set with as many classes as iNaturalist 2018."""
    return prototypes(8142, n_max=3, imbalance=3)
