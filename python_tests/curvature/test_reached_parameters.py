"""Losses that reach parameters in other ways than through the model's modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsam.curvature import (
    BatchLoss,
    curvature_operator,
    loss_surface,
    random_directions,
    worst_case_sharpness,
)
from python_tests.curvature.oracles import classification, explicit_hessian, mlp


def penalty(parameters: Any) -> Tensor:
    return 0.5 * sum(value.square().sum() for value in parameters)


class Listed(nn.Module):
    """Holds a parameter in a Python list besides its attribute, and uses the list."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.randn(3, 4).double())
        self.outer = nn.Parameter(torch.randn(4, 3).double())
        self.listed = [self.inner]

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.tanh(inputs @ self.listed[0]) @ self.outer


def test_a_penalty_on_parameters_listed_before_is_refused():
    model = mlp((3, 4, 3))
    batch = classification(8, 3, 3)
    listed = list(model.parameters())

    def captured(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets) + penalty(listed)

    def summed(network: nn.Module, data: Any) -> tuple[Tensor, int]:
        return len(data[0]) * captured(network(data[0]), data[1]), len(data[0])

    message = (
        r"parameter '[02]\.(weight|bias)' .*iterate over model\.parameters\(\) inside the loss"
    )
    for loss in (captured, BatchLoss(summed)):
        for kind in ("hessian", "ggn") if loss is captured else ("hessian",):
            with pytest.raises(ValueError, match=message):
                curvature_operator(model, loss, batch, kind=kind)
    with pytest.raises(ValueError, match=message):
        worst_case_sharpness(model, captured, batch, rho=0.1, progress=False)
    directions = random_directions(model, seed=0)
    with pytest.raises(ValueError, match=message):
        loss_surface(model, F.cross_entropy, batch, directions, metric=captured, progress=False)


def test_parameters_that_are_not_chosen_must_not_be_listed_either():
    """They would follow later changes of the model."""
    model = mlp((3, 4, 3))
    listed = [model[0].weight]
    with pytest.raises(ValueError, match=r"parameter '0\.weight'"):
        curvature_operator(
            model,
            lambda outputs, targets: F.cross_entropy(outputs, targets) + penalty(listed),
            classification(8, 3, 3),
            params=["2"],
        )


def test_a_module_that_keeps_a_parameter_in_a_list_is_refused():
    with pytest.raises(ValueError, match=r"parameter 'inner' .*nn\.ParameterList"):
        curvature_operator(Listed(), nn.CrossEntropyLoss(), classification(8, 3, 3))


def test_a_penalty_on_the_parameters_of_the_model_is_exact():
    model = mlp((3, 4, 3))
    inputs, targets = classification(8, 3, 3)
    operator = curvature_operator(
        model,
        lambda outputs, labels: F.cross_entropy(outputs, labels) + penalty(model.parameters()),
        (inputs, targets),
    )
    expected = explicit_hessian(
        model, lambda m: F.cross_entropy(m(inputs), targets) + penalty(m.parameters())
    )
    assert torch.allclose(operator.to_dense(), expected, rtol=1e-8, atol=1e-10)
