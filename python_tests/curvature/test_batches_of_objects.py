"""Batches that are objects, and loaders whose samples change without augmentation."""

from __future__ import annotations

import itertools
from collections import UserDict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, Dataset, TensorDataset, WeightedRandomSampler

from fastsam.curvature import BatchLoss, class_spectra, spectral_density
from python_tests.curvature.oracles import classification, mlp


@dataclass
class Pair:
    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Nested:
    inner: Pair
    name: str = "nested"


class Slotted:
    __slots__ = ("x", "y")

    def __init__(self, x, y) -> None:
        self.x, self.y = x, y


class Graph:
    """A batch like those of graph network libraries: iterable over its fields, with ``to``."""

    def __init__(self, x, y) -> None:
        self.store = {"x": x, "y": y}

    x = property(lambda self: self.store["x"])
    y = property(lambda self: self.store["y"])

    def __iter__(self):
        return iter(self.store.items())

    def to(self, device):
        self.store = {key: value.to(device) for key, value in self.store.items()}
        return self


class Unpacked(Pair):
    """Iterable over its own tensors, as for ``x, y = batch``."""

    def __iter__(self):
        return iter((self.x, self.y))


class Encoding(UserDict):
    """A mapping whose entries are attributes, as tokenizers return it."""

    def __getattr__(self, name):
        try:
            return self.__dict__["data"][name]
        except KeyError as error:
            raise AttributeError(name) from error

    x = property(lambda self: self.data["x"])


class Fields(NamedTuple):
    x: Tensor
    y: Tensor


FORMS = {
    "dataclass": (Pair, lambda b: b),
    "nested": (lambda x, y: Nested(Pair(x, y)), lambda b: b.inner),
    "slots": (Slotted, lambda b: b),
    "graph": (Graph, lambda b: b),
    "unpacked": (Unpacked, lambda b: b),
    "encoding": (lambda x, y: Encoding(x=x, y=y), lambda b: b),
    "named tuple": (Fields, lambda b: b),
    "in a tuple": (lambda x, y: (Pair(x, y), "label"), lambda b: b[0]),
    "in a dict": (lambda x, y: {"graph": Graph(x, y)}, lambda b: b["graph"]),
}


def loss_of(part) -> BatchLoss:
    def summed(model, batch):
        found = part(batch)
        assert found.x.dtype == model[0].weight.dtype
        return F.cross_entropy(model(found.x), found.y, reduction="sum"), len(found.y)

    return BatchLoss(summed)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("several", [False, True])
def test_objects_are_batches_in_the_dtype_of_the_run(form, several):
    make, part = FORMS[form]
    model, (inputs, targets) = mlp((3, 4, 3), dtype=torch.float32), classification(20, 3, 3)
    inputs = inputs.float()
    expected = spectral_density(
        model, nn.CrossEntropyLoss(), (inputs, targets), steps=9, dtype=torch.float64
    )
    data = make(inputs, targets)
    if several:
        data = [make(inputs[:9], targets[:9]), make(inputs[9:], targets[9:])]
    found = spectral_density(model, loss_of(part), data, steps=9, dtype=torch.float64)
    assert found.lambda_max == pytest.approx(expected.lambda_max, rel=1e-8)
    assert found.settings["dtype"] == "float64"
    assert found.settings["data_verified"]
    assert inputs.dtype is torch.float32


class Redrawn:
    """Yields batches with new noise at every read, in any form."""

    def __init__(self, make) -> None:
        self.make = make

    def __iter__(self):
        for _ in range(2):
            yield self.make(torch.randn(5, 3), torch.arange(5) % 3)


@pytest.mark.parametrize("form", [*FORMS, "array"])
def test_noise_in_objects_is_seen(form):
    if form == "array":
        make, part = lambda x, y: (x.numpy(), y * 0), None
    else:
        make, part = FORMS[form]
    with pytest.raises(ValueError, match="samples differ between two reads"):
        spectral_density(mlp((3, 3), dtype=torch.float32), loss_of(part), Redrawn(make), steps=3)


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_of_other_objects_is_refused(form, tmp_path):
    make, part = FORMS[form]
    model = mlp((3, 3), dtype=torch.float32)
    options = {"steps": 3, "checkpoint": tmp_path / "run"}
    first, other = (make(torch.randn(5, 3), torch.arange(5) % 3) for _ in range(2))
    spectral_density(model, loss_of(part), [first], **options)
    with pytest.raises(ValueError, match="other settings"):
        spectral_density(model, loss_of(part), [other], **options)


class Opaque:
    """An object without visible tensors, with a ``to`` method."""

    def __init__(self, x) -> None:
        self.get = lambda: x

    def to(self, device):
        return self


@pytest.mark.parametrize(
    "data",
    [
        [Opaque(torch.ones(3))],
        [{"a": 1}],
        [np.ones(3)],
        [(torch.ones(2), Opaque(torch.ones(3)))],
        {},
    ],
)
def test_batches_without_tensors_are_refused(data):
    with pytest.raises(TypeError, match="no tensor was found"):
        spectral_density(mlp((3, 3)), BatchLoss(lambda m, b: (m(torch.ones(3)).sum(), 1)), data)


def test_a_loader_that_holds_tensors_is_not_a_batch():
    class Loader:
        def __init__(self, x, y) -> None:
            self.x, self.y = x, y

        def __iter__(self):
            yield self.x[:5], self.y[:5]
            yield self.x[5:], self.y[5:]

    model, (inputs, targets) = mlp((3, 3)), classification(20, 3, 3)
    found = spectral_density(model, F.cross_entropy, Loader(inputs, targets), steps=3)
    expected = spectral_density(model, F.cross_entropy, (inputs, targets), steps=3)
    assert found.lambda_max == pytest.approx(expected.lambda_max, rel=1e-8)


def test_packed_sequences():
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.RNN(2, 3)

        def forward(self, x):
            return self.cell(x)[1][0]

    packed = pack_sequence([torch.randn(3, 2), torch.randn(2, 2)])

    def summed(model, batch):
        return model(batch[0]).square().sum(), len(batch[1])

    spectrum = spectral_density(
        Recurrent(), BatchLoss(summed), (packed, torch.ones(2)), steps=5, dtype=torch.float64
    )
    assert spectrum.settings["dtype"] == "float64"
    assert packed.data.dtype is torch.float32


def test_names_of_samples_move_with_them():
    """One string per sample besides the tensors, in a new order at every read."""
    inputs, targets = classification(12, 3, 3)

    class Named(Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, index):
            return inputs[index], targets[index], f"sample {index}"

    def summed(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[1])

    loader = DataLoader(Named(), batch_size=4, shuffle=True)
    found = spectral_density(mlp((3, 3)), BatchLoss(summed), loader, steps=3)
    assert found.settings["data_verified"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"shuffle": True, "drop_last": True},
            "drop_last=True with a RandomSampler leaves 2 other",
        ),
        (
            {"sampler": WeightedRandomSampler([1.0] * 20, 20)},
            "Its WeightedRandomSampler draws 20 new samples",
        ),
    ],
)
def test_samplers_are_not_blamed_on_augmentation(options, message):
    loader = DataLoader(TensorDataset(*classification(20, 3, 3)), batch_size=6, **options)
    with pytest.raises(ValueError, match=message) as caught:
        spectral_density(mlp((3, 3)), F.cross_entropy, loader, steps=3)
    assert "augmentation" not in str(caught.value)
    spectrum = spectral_density(mlp((3, 3)), F.cross_entropy, loader, steps=3, freeze=1)
    assert spectrum.settings["samples"] in (18, 20)


def test_datasets_of_dicts_say_that_they_need_targets():
    inputs, labels = classification(12, 3, 3)
    samples = [{"x": x, "y": int(y)} for x, y in zip(inputs, labels, strict=True)]

    class Dicts(Dataset):
        def __len__(self):
            return len(samples)

        def __getitem__(self, index):
            return samples[index]

    def summed(model, batch):
        return F.cross_entropy(model(batch["x"]), batch["y"], reduction="sum"), len(batch["y"])

    model, label = mlp((3, 3)), int(labels[0])
    with pytest.raises(ValueError, match=r"sample 0 of the dataset is a dict.*targets="):
        class_spectra(model, BatchLoss(summed), Dicts(), steps=3)
    found = class_spectra(model, BatchLoss(summed), Dicts(), [label], targets=labels, steps=3)
    mask = labels == label
    alone = spectral_density(model, F.cross_entropy, (inputs[mask], labels[mask]), steps=3)
    assert found[label].lambda_max == pytest.approx(alone.lambda_max, rel=1e-8)


def test_each_read_of_an_unverified_loader_draws_new_numbers():
    counter = itertools.count()

    class Counting:
        def __iter__(self):
            next(counter)
            yield classification(5, 3, 3)

    spectral_density(mlp((3, 3)), F.cross_entropy, Counting(), steps=3, verify_data=False)
    assert next(counter) > 3
