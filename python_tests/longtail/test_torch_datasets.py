"""PyTorch datasets that cannot be a data set: labels, classes and normalization that do not fit."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from fastsam.longtail.data import from_datasets
from fastsam.longtail.data.items import as_image
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


class Folder(WithTargets):
    """Four classes, whose raw labels are in ``targets``, as in the datasets of torchvision."""

    classes = ("a", "b", "c", "d")

    def __init__(self, target_transform: Callable[[int], int] | None = None) -> None:
        super().__init__(20, [place // 5 for place in range(20)])
        self.target_transform = target_transform

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        image, label = super().__getitem__(place)
        return image, label if self.target_transform is None else self.target_transform(label)


def test_a_target_transform_applies_to_labels_and_names() -> None:
    plain, merged = Folder(), Folder(lambda label: label % 2)
    data = from_datasets("own", plain, plain)
    assert data.counts.tolist() == [5, 5, 5, 5]
    assert data.class_names == ("a", "b", "c", "d")
    data = from_datasets("own", merged, merged)
    assert data.counts.tolist() == [10, 10]
    assert data.class_names == ("0", "1")
    assert data.test.targets.tolist() == [0] * 5 + [1] * 5 + [0] * 5 + [1] * 5
    named = from_datasets("own", merged, merged, class_names=("even", "odd"))
    assert named.class_names == ("even", "odd")


def test_targets_that_differ_from_the_labels_of_items_are_refused() -> None:
    with pytest.raises(
        DataError, match=r"item 0 of the dataset Relabeled has label 3, but .* says 0"
    ):
        from_datasets("own", Relabeled(), TEST)


class Relabeled(Folder):
    """Items have other labels than ``targets`` says."""

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        image, label = super().__getitem__(place)
        return image, 3 - label


class Random(WithTargets):
    """Images that are random in one of the ways of transforms."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__(4, [0, 0, 1, 1])
        self.draw = draw

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        value = float(self.draw() < 0.5)  # as a flip, which is often no change
        return torch.full((1, 8, 8), value), self.targets[place]


COUNTER = itertools.count()
DRAWS = {
    "torch": lambda: float(torch.rand(())),
    "numpy": np.random.random,
    "random": random.random,
    "own generator": lambda: next(COUNTER) % 2,
}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("split", ["train", "test", "validation"])
def test_random_transforms_are_refused(name: str, split: str) -> None:
    sets = {"train": TRAIN, "test": TEST, split: Random(DRAWS[name])}
    states = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    with pytest.raises(UsageError, match=f"the {split} dataset has a random transform"):
        from_datasets("own", **sets)
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])
    assert states[2] == random.getstate()


def pillow(mode: str) -> Image.Image:
    """A red image in several modes; in gray ones of the same brightness."""
    red = Image.new("RGB", (8, 8), (250, 10, 10))
    if mode == "P":
        return red.quantize(4)
    if mode in ("I;16", "I", "F"):
        values = np.full((8, 8), 40000.0)
        return Image.fromarray(values.astype({"I;16": "<u2", "I": "<i4", "F": "<f4"}[mode]))
    return red.convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", "L", "LA", "1", "I;16"])
def test_pillow_images_are_converted_as_image_files_are(mode: str) -> None:
    found = as_image(pillow(mode))
    values = {"L": 82 / 255, "LA": 82 / 255, "I;16": 40000 / 65535}.get(mode)
    if mode == "1":
        assert set(found.unique().tolist()) <= {0.0, 1.0}
    elif values is not None:
        assert found.shape == (1, 8, 8)
        assert torch.allclose(found, torch.tensor(values), atol=2 / 255)
    else:
        color = torch.tensor([250, 10, 10])[:, None, None] / 255
        assert torch.allclose(found, color.expand(3, 8, 8), atol=2 / 255)


@pytest.mark.parametrize(
    "item",
    [
        pillow("I"),
        pillow("F"),
        torch.full((1, 8, 8), 200),
        np.full((8, 8), 200, dtype=np.int32),
        np.full((8, 8), 200, dtype=np.uint16),
    ],
    ids=["I", "F", "int64", "int32", "uint16"],
)
def test_values_of_unknown_range_are_refused(item: Any) -> None:
    with pytest.raises(DataError, match=r"range|largest possible"):
        as_image(item)
