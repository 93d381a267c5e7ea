"""Comparison of tensors in one call, against their properties read one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastsam.kernels import alike
from fastsam.kernels.alike import Alike
from fastsam.kernels.sam import TensorTable

SHAPES = ((3, 4), (), (0, 3), (2, 3, 4, 5))


def tensors() -> list[Tensor]:
    return [
        *(torch.zeros(shape) for shape in SHAPES),
        torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.zeros(4, 3).t(),
    ]


def test_equal_properties_fit() -> None:
    weights = [torch.nn.Parameter(tensor) for tensor in tensors()]
    assert Alike(weights).fits(tensors())


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: None,
        lambda tensor: tensor.double(),
        lambda tensor: tensor.bfloat16(),
        lambda tensor: tensor.to("meta"),
        lambda tensor: tensor.to_sparse(),
        lambda tensor: tensor.flatten()[:-1].reshape(-1),
        lambda tensor: tensor.mT.contiguous().mT,
        lambda tensor: torch._neg_view(tensor),
    ],
    ids=["none", "float64", "bfloat16", "device", "sparse", "shape", "strides", "negative"],
)
@pytest.mark.parametrize("place", [0, 3])
def test_one_difference_does_not_fit(change: Callable[[Tensor], Tensor | None], place: int) -> None:
    given: list[Tensor | None] = list(tensors())
    given[place] = change(tensors()[place])
    assert not Alike(tensors()).fits(given)


def test_another_number_of_tensors_does_not_fit() -> None:
    assert not Alike(tensors()).fits(tensors()[:-1])
    assert not Alike(tensors()).fits([*tensors(), torch.zeros(1)])


def _changed(*examples: Tensor, **sizes: object) -> None:
    raise TypeError("an argument is missing")


@pytest.mark.parametrize("call", [None, _changed])
def test_gradients_are_taken_without_the_call_of_torch(
    call: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If torch lacks or changes its private call, gradients are still taken, only more slowly."""
    weights, gradients = [torch.zeros(3, 4), torch.zeros(2)], [torch.ones(3, 4), torch.ones(2)]
    monkeypatch.setattr(alike, "_Guards", call)
    table = TensorTable(weights, groups=[0, 0], adaptive=[False, False])
    table.set_gradients(gradients)
    assert list(table.column("gradient")) == [gradient.data_ptr() for gradient in gradients]
