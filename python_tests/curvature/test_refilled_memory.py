"""Loaders that fill the same memory for every batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsam.curvature import curvature_operator
from fastsam.curvature.data import read_batches
from python_tests.curvature.oracles import classification, explicit_hessian, mlp


class Refilling:
    """A loader with a few buffers that it fills in turn, through torch or through NumPy."""

    def __init__(self, batch: tuple[Tensor, Tensor], *, buffers: int, arrays: bool) -> None:
        self.batch, self.arrays = batch, arrays
        self.buffers = [[torch.empty_like(part[:3]) for part in batch] for _ in range(buffers)]

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self.batch[0]), 3):
            filled = self.buffers[start // 3 % len(self.buffers)]
            for buffer, part in zip(filled, self.batch, strict=True):
                if self.arrays:
                    buffer.numpy()[:] = part[start : start + 3].numpy()
                else:
                    buffer.copy_(part[start : start + 3])
            yield tuple(torch.from_numpy(x.numpy()) if self.arrays else x for x in filled)


@pytest.mark.parametrize(("buffers", "arrays"), [(1, False), (1, True), (2, False)])
@pytest.mark.parametrize("options", [{}, {"freeze": 1}, {"data_memory": 64}])
def test_memory_that_a_loader_fills_again(buffers, arrays, options):
    model = mlp((3, 4, 3))
    inputs, targets = classification(9, 3, 3)
    expected = explicit_hessian(model, lambda m: F.cross_entropy(m(inputs), targets))
    loader = Refilling((inputs, targets), buffers=buffers, arrays=arrays)
    operator = curvature_operator(model, nn.CrossEntropyLoss(), loader, **options)
    assert torch.allclose(operator.to_dense(), expected, rtol=1e-8, atol=1e-10)


def test_a_one_shot_iterator_that_fills_its_memory_again_is_refused():
    loader = Refilling(classification(9, 3, 3), buffers=1, arrays=False)
    with pytest.raises(ValueError, match=r"overwrites its earlier batches.*tensor\.clone"):
        curvature_operator(mlp((3, 4, 3)), nn.CrossEntropyLoss(), iter(loader))


@pytest.mark.parametrize("interleaved", [False, True])
def test_views_of_one_data_set_are_not_copied(interleaved):
    inputs, targets = classification(12, 3, 3)

    class Views:
        def __iter__(self) -> Iterator[Any]:
            for k in range(3):
                part = slice(k, None, 3) if interleaved else slice(4 * k, 4 * k + 4)
                yield inputs[part], targets[part]

    held = list(read_batches(Views()))
    assert len(held) == 3
    storages = {x.untyped_storage().data_ptr() for x, _ in held}
    assert storages == {inputs.untyped_storage().data_ptr()}
    # Overlapping windows of one series, and a batch that is read twice.
    windows = [(inputs[k : k + 4], targets[k : k + 4]) for k in (0, 2, 2)]
    repeated = list(read_batches(iter(windows)))
    assert np.all([x is y[0] for (x, _), y in zip(repeated, windows, strict=True)])
