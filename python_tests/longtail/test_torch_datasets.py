"""PyTorch datasets that cannot be a data set: labels, classes and normalization that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from fastsam.longtail.data import from_datasets
from fastsam.longtail.errors import DataError, UsageError


def of_labels(labels: list[int], channels: int = 1) -> TensorDataset:
    return TensorDataset(torch.rand(len(labels), channels, 8, 8), torch.tensor(labels))


TRAIN, TEST = of_labels([0] * 4 + [1] * 2), of_labels([0, 1])


class WithTargets(Dataset[Any]):
    """Images whose attribute ``targets`` may have another length."""

    def __init__(self, images: int, targets: list[int]) -> None:
        self.images = images
        self.targets = targets

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return torch.zeros(1, 8, 8), self.targets[place]


@pytest.mark.parametrize(("images", "labels"), [(60, 15), (30, 60)])
def test_targets_of_another_length_are_refused(images: int, labels: int) -> None:
    wrong = WithTargets(images, [number % 2 for number in range(labels)])
    message = rf"WithTargets has {images} images, but its targets have {labels} labels"
    for pair in ((wrong, TEST), (TRAIN, wrong)):
        with pytest.raises(DataError, match=message):
            from_datasets("own", *pair)


def test_classes_without_a_training_image_are_refused() -> None:
    message = r"1 of 3 classes have no image in the training set of own: "
    with pytest.raises(DataError, match=message + "1"):
        from_datasets("own", of_labels([0] * 4 + [2] * 2), TEST)
    with pytest.raises(DataError, match=message + "2"):
        from_datasets("own", TRAIN, TEST, class_names=("ant", "bee", "cat"))
    with pytest.raises(DataError, match=r"0 class\(es\), but at least 2"):
        from_datasets("own", WithTargets(0, torch.zeros(0, dtype=torch.int64)), TEST)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((0.1, 0.2), (1.0,)),
        ((0.1, 0.2), (1.0, 1.0)),
        ((), (1.0,)),
        ((0.0,), (0.0,)),
        ((0.0,), (-1.0,)),
        ((0.0,), (float("nan"),)),
        ((0.0,), (float("inf"),)),
        ((float("nan"),), (1.0,)),
    ],
)
def test_normalization_that_does_not_fit_is_refused(
    mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    message = r"own has 1 channel\(s\): expected as many means and positive standard deviations"
    with pytest.raises(UsageError, match=message):
        from_datasets("own", TRAIN, TEST, mean=mean, std=std)


def test_one_value_normalizes_every_channel() -> None:
    train, test = of_labels([0, 0, 1], 3), of_labels([0, 1], 3)
    data = from_datasets("own", train, test, mean=(0.5,), std=(0.1, 0.2, 0.3))
    assert data.train.channels == 3
    with pytest.raises(UsageError, match=r"own has 3 channel\(s\)"):
        from_datasets("own", train, test, mean=(0.5, 0.5))
    with pytest.raises(UsageError, match=r"got \(0\.5, 0\.5, 0\.5\) and \(1\.0, 1\.0, nan\)"):
        data.normalized((0.5,) * 3, (1.0, 1.0, float("nan")))
