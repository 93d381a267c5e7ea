"""Spectra of models against explicit Hessians."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fastsam.curvature import class_spectra, spectral_density
from fastsam.curvature.products.strategies import STRATEGIES
from python_tests.curvature.oracles import classification, explicit_hessian, mlp


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("probes", [1, 3])
def test_extremes_match_the_explicit_hessian(strategy, dtype, probes):
    model, criterion = mlp(), nn.CrossEntropyLoss()
    inputs, targets = classification(17, 3, 4)
    eigenvalues = torch.linalg.eigvalsh(
        explicit_hessian(model, lambda m: criterion(m(inputs), targets))
    )
    n = len(eigenvalues)
    loader = [(inputs[:6], targets[:6]), (inputs[6:], targets[6:])]
    spectrum = spectral_density(
        model, criterion, loader, steps=n, probes=probes, dtype=dtype, strategy=strategy
    )
    norm = float(eigenvalues.abs().max())
    tolerance = (1e-8 if dtype is torch.float64 else 1e-4) * norm
    assert spectrum.dimension == n
    assert spectrum.lambda_max == pytest.approx(float(eigenvalues[-1]), abs=tolerance)
    assert spectrum.lambda_min == pytest.approx(float(eigenvalues[0]), abs=tolerance)
    assert spectrum.settings["strategy"] == strategy
    assert spectrum.loss == pytest.approx(criterion(model(inputs), targets).item(), rel=1e-5)
    for weights in spectrum.weights:
        assert np.sum(weights) == pytest.approx(1, abs=1e-12)


def test_trace_lies_within_four_stated_errors_at_64_probes():
    model, criterion = mlp((4, 6, 3)), nn.CrossEntropyLoss()
    inputs, targets = classification(20, 4, 3)
    hessian = explicit_hessian(model, lambda m: criterion(m(inputs), targets))
    spectrum = spectral_density(model, criterion, (inputs, targets), steps=20, probes=64)
    assert abs(spectrum.trace - float(hessian.trace())) <= 4 * spectrum.trace_stderr
    squares = float(hessian.square().sum())
    error = abs(spectrum.frobenius_norm_squared - squares)
    assert error <= 4 * spectrum.frobenius_norm_squared_stderr


@pytest.mark.slow
def test_stated_error_is_at_most_twice_the_true_one():
    model, criterion = mlp((3, 4, 3)), nn.CrossEntropyLoss()
    batch = classification(12, 3, 3)
    trace = float(explicit_hessian(model, lambda m: criterion(m(batch[0]), batch[1])).trace())
    runs = [
        spectral_density(model, criterion, batch, steps=8, seed=seed, progress=False)
        for seed in range(200)
    ]
    true_error = np.sqrt(np.mean([(run.trace - trace) ** 2 for run in runs]))
    stated = np.sqrt(np.mean([run.trace_stderr**2 for run in runs]))
    assert 0.5 * true_error <= stated <= 2 * true_error


def test_class_hessians_add_up():
    model, criterion = mlp((3, 5, 3)), nn.CrossEntropyLoss()
    inputs, targets = classification(15, 3, 3)
    targets[0] = 0
    targets[1:] = torch.randint(1, 3, (14,))  # class 0 has one sample
    spectra = class_spectra(model, criterion, (inputs, targets), steps=60, probes=1)
    whole = spectral_density(model, criterion, (inputs, targets), steps=60)
    assert sorted(spectra) == [0, 1, 2]
    assert spectra[0].weight == 1
    # One seed, one probe: the first Lanczos coefficient u'Hu is linear in H.
    total = sum(part.weight * part.alpha[0, 0] for part in spectra.values()) / whole.weight
    assert total == pytest.approx(whole.alpha[0, 0], rel=1e-10)


def test_the_model_is_unchanged():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[3].bias.grad = torch.ones(2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    batch = classification(9, 3, 2, dtype=torch.float32)
    random_state = torch.get_rng_state()
    spectral_density(model, nn.CrossEntropyLoss(), batch, steps=5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert not model[0].weight.requires_grad
    assert torch.equal(model[3].bias.grad, torch.ones(2))
    assert model[3].weight.grad is None
    assert torch.equal(torch.get_rng_state(), random_state)
