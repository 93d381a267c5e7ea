"""Criteria that are functions with options, or that return a sum."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastsam.curvature import curvature_operator
from python_tests.curvature.oracles import classification, explicit_hessian, mlp

WEIGHT = torch.tensor([1.0, 2.0, 5.0]).double()


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "sum"},
        {"reduction": "none"},
        {"weight": WEIGHT},
        {"weight": WEIGHT, "reduction": "sum", "ignore_index": 1, "label_smoothing": 0.1},
    ],
)
@pytest.mark.parametrize("sizes", [(9,), (6, 3)])
def test_a_partial_cross_entropy_is_the_module_with_its_options(options, sizes):
    model = mlp((3, 4, 3))
    inputs, targets = classification(9, 3, 3)
    targets[:3] = torch.arange(3)
    mean = partial(F.cross_entropy, **{**options, "reduction": "mean"})
    expected = explicit_hessian(model, lambda m: mean(m(inputs), targets))
    batches = list(zip(inputs.split(sizes), targets.split(sizes), strict=True))
    operator = curvature_operator(model, partial(F.cross_entropy, **options), batches)
    assert torch.allclose(operator.to_dense(), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("nested", [False, True])
def test_the_reduction_of_other_partial_functions(nested):
    model = mlp((3, 4, 2))
    inputs, targets = torch.randn(8, 3).double(), torch.randn(8, 2).double()
    summed = partial(F.mse_loss, reduction="sum")
    expected = explicit_hessian(model, lambda m: summed(m(inputs), targets) / 8)
    criterion = partial(summed) if nested else summed
    operator = curvature_operator(model, criterion, (inputs, targets))
    assert torch.allclose(operator.to_dense(), expected, rtol=1e-8, atol=1e-10)
    with pytest.raises(ValueError, match="reduction 'batchmean', expected 'mean'"):
        curvature_operator(
            model,
            partial(lambda y, t, reduction: (y - t).mean(), reduction="batchmean"),
            (inputs, targets),
        )


@pytest.mark.parametrize("batches", [1, 2])
def test_a_sum_that_looks_like_a_mean_is_refused(batches):
    inputs, targets = classification(8, 3, 3)
    size = 8 // batches
    data = list(zip(inputs.split(size), targets.split(size), strict=True))
    with pytest.raises(ValueError, match="returns the sum of the losses of the samples"):
        curvature_operator(
            mlp((3, 4, 3)), lambda y, t: F.cross_entropy(y, t, reduction="sum"), data
        )


def test_a_contrastive_loss_of_one_batch_is_no_sum():
    model = mlp((3, 4, 3))
    inputs, targets = classification(8, 3, 3)

    def contrastive(outputs, labels):
        return F.cross_entropy(outputs @ outputs.T, torch.arange(len(labels)))

    expected = explicit_hessian(model, lambda m: contrastive(m(inputs), targets))
    operator = curvature_operator(model, contrastive, (inputs, targets))
    assert torch.allclose(operator.to_dense(), expected, rtol=1e-8, atol=1e-10)


def test_a_module_criterion_keeps_its_options():
    model = mlp((3, 4, 3))
    batch = classification(8, 3, 3)
    first = curvature_operator(model, nn.CrossEntropyLoss(weight=WEIGHT), batch).to_dense()
    second = curvature_operator(model, partial(F.cross_entropy, weight=WEIGHT), batch).to_dense()
    assert torch.equal(first, second)
