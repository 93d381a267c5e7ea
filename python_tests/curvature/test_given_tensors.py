"""Batches whose tensors cannot be used as they are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastsam.curvature import (
    BatchLoss,
    curvature_operator,
    loss_surface,
    random_directions,
    spectral_density,
)
from python_tests.curvature.oracles import classification, explicit_hessian, mlp

CRITERION = nn.CrossEntropyLoss()


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("options", [{}, {"micro_batch": 3}, {"kind": "ggn"}])
def test_tensors_made_in_inference_mode(inside, options):
    model = mlp((3, 4, 3))
    inputs, targets = classification(8, 3, 3)
    expected = curvature_operator(model, CRITERION, (inputs, targets), **options).to_dense()
    with torch.inference_mode():
        made = inputs.clone(), targets.clone()
    assert made[0].is_inference()
    with torch.inference_mode(inside):
        found = curvature_operator(model, CRITERION, made, **options).to_dense()
    assert torch.allclose(found, expected, rtol=1e-8, atol=1e-10)


class Normalizing(nn.Module):
    """Normalizes its input, in place if asked."""

    def __init__(self, inner: nn.Module, *, inplace: bool) -> None:
        super().__init__()
        self.inner, self.inplace = inner, inplace

    def forward(self, inputs):
        if self.inplace:
            return self.inner(inputs.sub_(0.5).div_(2))
        return self.inner((inputs - 0.5) / 2)


@pytest.mark.parametrize("strategy", ["kept-graph", "rebuild"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_that_writes_to_its_input(strategy, dtype):
    inner = mlp((3, 4, 3), dtype=dtype)
    inputs, targets = classification(8, 3, 3, dtype=dtype)
    before = inputs.clone()
    exact = Normalizing(inner, inplace=False).double()
    expected = explicit_hessian(exact, lambda m: F.cross_entropy(m(before.double()), targets))
    model = Normalizing(inner, inplace=True)
    batches = [(inputs[:5], targets[:5]), (inputs[5:], targets[5:])]
    operator = curvature_operator(model, CRITERION, batches, strategy=strategy, dtype=torch.float64)
    for _ in range(2):
        assert torch.allclose(operator.to_dense(), expected, rtol=1e-8, atol=1e-10)
    assert torch.equal(inputs, before)


@pytest.mark.parametrize("kind", ["ggn", "empirical-fisher", "mc-fisher"])
def test_other_matrices_of_a_model_that_writes_to_its_input(kind):
    inner = mlp((3, 4, 3))
    batch = classification(8, 3, 3)
    before = batch[0].clone()
    found, expected = (
        curvature_operator(Normalizing(inner, inplace=x), CRITERION, batch, kind=kind).to_dense()
        for x in (True, False)
    )
    assert torch.allclose(found, expected, rtol=1e-8, atol=1e-10)
    assert torch.equal(batch[0], before)


def test_a_loss_that_writes_to_its_batch():
    model = mlp((3, 4, 3))
    batch = {"x": torch.randn(8, 3).double(), "y": torch.rand(8, 3).double()}
    before = {name: value.clone() for name, value in batch.items()}

    def summed(network, data):
        error = network(data["x"]) - data["y"].log_()
        return error.square().sum(), len(error)

    expected = explicit_hessian(
        model, lambda m: (m(before["x"]) - before["y"].log()).square().sum() / 8
    )
    operator = curvature_operator(model, BatchLoss(summed), batch)
    assert torch.allclose(operator.to_dense(), expected, rtol=1e-8, atol=1e-10)
    assert all(torch.equal(batch[name], before[name]) for name in batch)


def test_a_surface_of_a_model_that_writes_to_its_input():
    inner = mlp((3, 4, 3))
    batch = classification(8, 3, 3)
    before = batch[0].clone()
    losses = []
    for inplace in (True, False):
        model = Normalizing(inner, inplace=inplace)
        directions = random_directions(model, 1, seed=0)
        surface = loss_surface(
            model, CRITERION, batch, directions, points=3, metric=CRITERION, progress=False
        )
        losses.append(torch.as_tensor(surface.loss))
    assert torch.allclose(losses[0], losses[1], rtol=1e-10)
    assert torch.equal(batch[0], before)


def loader(batches):
    class Loader:
        def __iter__(self):
            return iter(batches)

    return Loader()


@pytest.mark.parametrize("given", [list, iter, loader])
@pytest.mark.parametrize("options", [{}, {"micro_batch": 3}])
def test_batches_without_samples_are_skipped(given, options):
    model = mlp((3, 4, 1))
    inputs, targets = torch.randn(8, 3).double(), torch.randn(8, 1).double()
    expected = explicit_hessian(model, lambda m: F.mse_loss(m(inputs), targets))
    empty = inputs[:0], targets[:0]
    batches = [empty, (inputs[:5], targets[:5]), empty, (inputs[5:], targets[5:]), empty]
    operator = curvature_operator(model, nn.MSELoss(), given(batches), **options)
    assert operator.weight == 8
    assert torch.allclose(operator.to_dense(), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("given", [list, iter, loader])
@pytest.mark.parametrize("options", [{"data_memory": 0}, {"verify_data": False}, {"freeze": 1}])
def test_how_data_are_read_does_not_matter_for_empty_batches(given, options):
    model = mlp((3, 4, 1))
    batch = torch.randn(8, 3).double(), torch.randn(8, 1).double()
    empty = tuple(part[:0] for part in batch)
    if given is iter and options == {"data_memory": 0}:
        return  # refused
    found, expected = (
        spectral_density(model, nn.MSELoss(), given(some), steps=4, progress=False, **options)
        for some in ([batch, empty], [batch])
    )
    assert found.lambda_max == pytest.approx(expected.lambda_max, rel=1e-8)
    assert found.settings["samples"] == expected.settings["samples"]


def test_data_without_samples_are_refused():
    empty = torch.randn(0, 3).double(), torch.randn(0, 1).double()
    for data in (empty, [empty], loader([empty])):
        with pytest.raises(ValueError, match="data has no batch with samples"):
            curvature_operator(mlp((3, 4, 1)), nn.MSELoss(), data)
