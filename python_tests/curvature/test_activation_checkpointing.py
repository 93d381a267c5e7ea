"""Models with activation checkpointing, whose backward pass runs parts of the forward pass again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastsam.curvature import (
    curvature_operator,
    escape_report,
    spectral_density,
    worst_case_sharpness,
)
from fastsam.curvature.products.strategies import STRATEGIES
from python_tests.curvature.landscapes import everything, same
from python_tests.curvature.oracles import classification, explicit_hessian, mlp

CRITERION = nn.CrossEntropyLoss()


class Checkpointed(nn.Module):
    """A network whose first part is checkpointed, also in evaluation mode."""

    def __init__(self, first: nn.Module, last: nn.Module, *, reentrant: bool = False) -> None:
        super().__init__()
        self.first, self.last = first, last
        self.reentrant, self.enabled = reentrant, True

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.enabled:
            return self.last(self.first(inputs))
        return self.last(checkpoint(self.first, inputs, use_reentrant=self.reentrant))


def small(**options: Any) -> Checkpointed:
    last = nn.Sequential(nn.Tanh(), nn.Linear(4, 3)).double()
    return Checkpointed(mlp((3, 4, 4)), last, **options)


def plain(model: Checkpointed) -> Checkpointed:
    twin = copy.deepcopy(model)
    twin.enabled = False
    return twin


def hessian_of(model: Checkpointed, inputs: Tensor, targets: Tensor) -> Tensor:
    return explicit_hessian(plain(model).eval(), lambda m: F.cross_entropy(m(inputs), targets))


def moved(model: nn.Module) -> None:
    with torch.no_grad():
        for value in model.parameters():
            value.add_(1)


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "forward-over-reverse"])
def test_operators_belong_to_the_weights_they_were_made_with(strategy):
    model = small()
    inputs, targets = classification(8, 3, 3)
    expected = hessian_of(model, inputs, targets)
    before = everything(model)
    operator = curvature_operator(model, CRITERION, (inputs, targets), strategy=strategy)
    assert torch.allclose(operator.to_dense(), expected, rtol=1e-8, atol=1e-10)
    assert same(before, everything(model))
    moved(model)
    assert torch.allclose(operator.to_dense(), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", ["ggn", "empirical-fisher", "mc-fisher"])
def test_other_matrices(kind):
    model = small()
    batch = classification(8, 3, 3)
    operator, expected = (
        curvature_operator(m, CRITERION, batch, kind=kind).to_dense() for m in (model, plain(model))
    )
    kept = curvature_operator(model, CRITERION, batch, kind=kind)
    moved(model)
    assert torch.allclose(operator, expected, rtol=1e-8, atol=1e-10)
    assert torch.allclose(kept.to_dense(), expected, rtol=1e-8, atol=1e-10)


def test_a_float32_model_in_float64():
    model = small().float()
    inputs, targets = classification(8, 3, 3, dtype=torch.float32)
    operator = curvature_operator(model, CRITERION, (inputs, targets), dtype=torch.float64)
    expected = hessian_of(copy.deepcopy(model).double(), inputs.double(), targets)
    assert torch.allclose(operator.to_dense(), expected, rtol=1e-8, atol=1e-10)


def test_a_convolution_with_batch_norm():
    first = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh())
    last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    model = Checkpointed(first, last).double()
    first[1].running_var.uniform_(0.5, 2)
    inputs, targets = torch.randn(8, 2, 5, 5).double(), torch.randint(3, (8,))
    expected = hessian_of(model, inputs, targets)
    for strategy in ("kept-graph", "rebuild"):
        operator = curvature_operator(model, CRITERION, (inputs, targets), strategy=strategy)
        assert torch.allclose(operator.to_dense(), expected, rtol=1e-8, atol=1e-10)
    spectrum = spectral_density(model, CRITERION, (inputs, targets), steps=40, progress=False)
    assert spectrum.lambda_max == pytest.approx(
        float(torch.linalg.eigvalsh(expected)[-1]), rel=1e-6
    )


def test_gradients_away_from_the_weights():
    model = small()
    inputs, targets = classification(8, 3, 3)
    batches = [(inputs[k::2], targets[k::2]) for k in range(2)]
    direction = {name: torch.ones_like(value) for name, value in model.named_parameters()}
    reports, sharpness = [], []
    for network in (model, plain(model)):
        report = escape_report(network, CRITERION, batches, direction, rho=2.0, progress=False)
        reports.append((report.sam, report.factor, report.taylor_error))
        found = worst_case_sharpness(network, CRITERION, (inputs, targets), rho=1.0, progress=False)
        sharpness.append(found.value)
    assert reports[0] == pytest.approx(reports[1], rel=1e-8)
    assert sharpness[0] == pytest.approx(sharpness[1], rel=1e-6)


def test_reentrant_checkpointing_is_refused():
    class Middle(
        Checkpointed
    ):  # its inputs require gradients, without which torch detaches outputs
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs.detach().requires_grad_())

    model = Middle(mlp((3, 4, 4)), nn.Linear(4, 3).double(), reentrant=True)
    with pytest.raises(ValueError, match="set use_reentrant=False"):
        curvature_operator(model, CRITERION, classification(8, 3, 3))


def test_forward_mode_is_refused():
    with pytest.raises(ValueError, match="Use strategy='rebuild' or 'auto'"):
        spectral_density(
            small(), CRITERION, classification(8, 3, 3), steps=3, strategy="forward-over-reverse"
        )
