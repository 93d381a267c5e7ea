"""Spectra of classes take loaders that read each sample once, and refuse others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from fastsam.curvature import (
    BatchLoss,
    CurvatureTracker,
    class_spectra,
    group_spectra,
    spectral_density,
)
from python_tests.curvature.oracles import classification, mlp

CRITERION = nn.CrossEntropyLoss()
FEW = range(0, 60, 5)


def samples() -> TensorDataset:
    torch.manual_seed(2)
    inputs, _ = classification(60, 4, 3)
    return TensorDataset(inputs, torch.arange(60) % 3)


WHOLE: dict[str, dict[str, Any]] = {
    "in order": {"batch_size": 7},
    "shuffled": {"batch_size": 7, "shuffle": True},
    "without a remainder": {"batch_size": 20, "shuffle": True, "drop_last": True},
    "in given batches": {"batch_sampler": BatchSampler(SequentialSampler(range(60)), 7, False)},
}


@pytest.mark.parametrize("form", WHOLE)
def test_the_classes_of_a_whole_loader_add_up(form: str) -> None:
    model, loader = mlp((4, 5, 3)), DataLoader(samples(), **WHOLE[form])
    options: Any = {"steps": 2, "progress": False}
    whole = spectral_density(model, CRITERION, loader, **options)
    parts = class_spectra(model, CRITERION, loader, **options).values()
    assert sum(part.weight for part in parts) == whole.weight == 60
    mean = sum(part.weight * part.loss for part in parts) / 60
    assert mean == pytest.approx(whole.loss)


PARTIAL: dict[str, tuple[dict[str, Any], str]] = {
    "subset": ({"sampler": SubsetRandomSampler(list(FEW))}, "a SubsetRandomSampler as sampler"),
    "weighted": ({"sampler": WeightedRandomSampler([1.0] * 60, 60)}, "a WeightedRandomSampler"),
    "repeated": ({"sampler": RandomSampler(range(60), replacement=True)}, "a RandomSampler"),
    "fewer": ({"sampler": RandomSampler(range(60), num_samples=12)}, "a RandomSampler"),
    "others": ({"sampler": SequentialSampler(range(12))}, "a SequentialSampler"),
    "drop last": (
        {"batch_size": 8, "drop_last": True},
        "drop_last=True, which leaves 4 samples out",
    ),
    "list of batches": ({"batch_sampler": [[0, 1], [2, 3]]}, "a list as batch_sampler"),
    "batches of a subset": (
        {"batch_sampler": BatchSampler(SubsetRandomSampler(list(FEW)), 4, False)},
        "a SubsetRandomSampler as sampler",
    ),
}


@pytest.mark.parametrize("form", PARTIAL)
def test_partial_loaders_are_refused(form: str) -> None:
    model, (options, problem) = mlp((4, 5, 3)), PARTIAL[form]
    loader = DataLoader(samples(), **options)
    message = rf"each of its 60 samples once, got one with {problem}.*Subset\(dataset, indices\)"
    with pytest.raises(ValueError, match=message):
        class_spectra(model, CRITERION, loader, steps=2, progress=False)
    with pytest.raises(ValueError, match=message):
        group_spectra(model, CRITERION, loader, {"head": [0, 1]}, steps=2, progress=False)
    with pytest.raises(ValueError, match=message):
        CurvatureTracker(model, CRITERION, loader, every=1, classes=[0])


def test_the_advice_gives_the_classes_of_the_subset() -> None:
    model, subset = mlp((4, 5, 3)), Subset(samples(), FEW)
    found = class_spectra(model, CRITERION, subset, steps=2, progress=False)
    expected = {label: sum(i % 3 == label for i in FEW) for label in range(3)}
    assert {label: spectrum.weight for label, spectrum in found.items()} == expected


CLASSES = torch.arange(8) % 2
INPUTS = torch.randn(8, 3)


class Pairs(Dataset):
    """Samples whose targets are numbers between classes."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return INPUTS[index], float(CLASSES[index]) + 0.5


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ((INPUTS, CLASSES + 0.25), {}, r"must be integers, .* got .*0\.25.*pass.*targets="),
        ((INPUTS, CLASSES * float("nan")), {}, r"must be integers, .* got .*nan"),
        ((INPUTS, CLASSES), {"targets": ["a"] * 8}, r"must be integers, .* got .*'a'"),
        ((INPUTS, CLASSES), {"classes": [0.5]}, r"expected integers as classes, got 0\.5"),
        (Pairs(), {}, r"not a pair \(input, target\) with an integer class"),
        (TensorDataset(INPUTS, CLASSES, CLASSES), {}, r"has 3 tensors.*targets="),
        (Subset(TensorDataset(INPUTS), range(8)), {}, r"has 1 tensors.*targets="),
    ],
)
def test_targets_that_are_no_classes_are_refused(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        class_spectra(nn.Linear(3, 2), nn.CrossEntropyLoss(), dataset, steps=3, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.bool])
def test_whole_numbers_of_any_type_are_classes(dtype):
    loss = BatchLoss(lambda model, batch: (model(batch[0]).square().sum(), len(batch[0])))
    found = class_spectra(nn.Linear(3, 2), loss, (INPUTS, CLASSES.to(dtype)), steps=3)
    assert list(found) == [0, 1]
    extra = TensorDataset(INPUTS, CLASSES, torch.randn(8))
    assert list(class_spectra(nn.Linear(3, 2), loss, extra, targets=CLASSES, steps=3)) == [0, 1]
