"""Operators of models that change after the operator was made."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastsam.curvature import curvature_operator, spectral_density
from python_tests.curvature.oracles import classification, explicit_hessian, mlp

CRITERION = nn.CrossEntropyLoss()


class Tied(nn.Module):
    """Two layers with one weight, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()
        self.second.weight = self.first.weight
        self.register_buffer("shift", torch.randn(3).double())

    def forward(self, inputs):
        return self.second(torch.tanh(self.first(inputs + self.shift)))


def step(model: nn.Module) -> None:
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value.add_(1)


def assign(model: nn.Module) -> None:
    state = {name: value + 1 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def replace_layer(model: nn.Module) -> None:
    model.second = nn.Linear(3, 3).double()


def replace_buffer(model: nn.Module) -> None:
    model.shift = torch.zeros(3).double()


def test_changes_in_place_do_not_change_an_operator():
    model = Tied()
    inputs, targets = classification(8, 3, 3)
    expected = explicit_hessian(model, lambda m: F.cross_entropy(m(inputs), targets))
    for strategy in ("kept-graph", "rebuild"):
        operator = curvature_operator(model, CRITERION, (inputs, targets), strategy=strategy)
        kept = [value.detach().clone() for value in (*model.parameters(), *model.buffers())]
        step(model)
        model.load_state_dict({name: 2 * x for name, x in model.state_dict().items()})
        assert torch.allclose(operator.to_dense(), expected, rtol=1e-8, atol=1e-10)
        with torch.no_grad():
            for value, old in zip((*model.parameters(), *model.buffers()), kept, strict=True):
                value.copy_(old)


@pytest.mark.parametrize(
    ("change", "name"),
    [(assign, r"[a-z.]+"), (replace_layer, r"(first|second)\.[a-z]+"), (replace_buffer, "shift")],
)
def test_replaced_tensors_are_refused(change: Callable[[nn.Module], None], name: str):
    """The operator put its values where the model no longer looked, and returned 0."""
    model = Tied()
    operator = curvature_operator(model, CRITERION, classification(8, 3, 3), strategy="rebuild")
    operator.to_dense()
    change(model)
    with pytest.raises(ValueError, match=rf"'{name}' of the model is another tensor"):
        operator.to_dense()


def test_a_replaced_layer_is_refused_even_if_a_tied_one_remains():
    model = Tied()
    operator = curvature_operator(
        model, CRITERION, classification(8, 3, 3), strategy="rebuild", params=["first.weight"]
    )
    model.second.weight = nn.Parameter(torch.zeros(3, 3).double())
    with pytest.raises(ValueError, match=r"'first\.weight' of the model is another tensor"):
        operator.to_dense()


def test_a_kept_graph_needs_the_model_no_more():
    model = mlp((3, 4, 3))
    inputs, targets = classification(8, 3, 3)
    expected = explicit_hessian(model, lambda m: F.cross_entropy(m(inputs), targets))
    operator = curvature_operator(model, CRITERION, (inputs, targets), strategy="kept-graph")
    operator.to_dense()
    assign(model)
    assert torch.allclose(operator.to_dense(), expected, rtol=1e-8, atol=1e-10)


class Lazy(nn.Module):
    """Registers buffers and a submodule in its first forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, inputs):
        if not hasattr(self, "position"):
            self.register_buffer("position", torch.ones(3, dtype=inputs.dtype))
            self.register_buffer("other", torch.ones(3, dtype=inputs.dtype), persistent=False)
            self.activation = nn.Tanh()
        return self.activation(self.layer(inputs + self.position))


def test_what_a_model_registers_in_a_run_does_not_stay():
    """The buffers had the dtype of the run."""
    model = Lazy()
    inputs, targets = classification(8, 3, 3, dtype=torch.float32)
    options = {"steps": 3, "progress": False}
    spectral_density(model, CRITERION, (inputs, targets), dtype=torch.float64, **options)
    assert not list(model.buffers())
    assert list(model._modules) == ["layer"]
    assert not model._non_persistent_buffers_set
    assert model(inputs).dtype is torch.float32
    assert list(model._modules) == ["layer", "activation"]
    expected = explicit_hessian(
        model.double(), lambda m: F.cross_entropy(m(inputs.double()), targets)
    )
    operator = curvature_operator(model, CRITERION, (inputs.double(), targets))
    assert torch.allclose(operator.to_dense(), expected, rtol=1e-8, atol=1e-10)
