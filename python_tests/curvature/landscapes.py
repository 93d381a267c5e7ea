"""Closed forms for tests of surfaces and sharpness: linear regression, whose loss is a quadratic."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

QUADRATIC = nn.MSELoss()


def regression(features: int = 4, samples: int = 12) -> tuple[nn.Linear, tuple[Tensor, Tensor]]:
    """A linear model without bias, in float64, and data on which its gradient is not zero."""
    model = nn.Linear(features, 1, bias=False).double()
    inputs = torch.randn(samples, features, dtype=torch.float64)
    return model, (inputs, torch.randn(samples, 1, dtype=torch.float64))


def taylor(model: nn.Linear, batch: tuple[Tensor, Tensor]) -> tuple[float, Tensor, Tensor]:
    """Loss, gradient and Hessian of the mean squared error at the model's weights."""
    inputs, targets = batch
    residual = (inputs @ model.weight.detach().T - targets)[:, 0]
    return (
        float(residual.square().mean()),
        2 * inputs.T @ residual / len(inputs),
        2 * inputs.T @ inputs / len(inputs),
    )


def increase(gradient: Tensor, hessian: Tensor, step: Tensor) -> float:
    """Increase of a quadratic by a step."""
    return float(gradient @ step + step @ hessian @ step / 2)


def trust_region(gradient: Tensor, hessian: Tensor, rho: float) -> float:
    """Largest increase of a convex quadratic over ``||step|| <= rho``, by its secular equation.

    The maximizer solves ``(mu I - H) step = g`` with ``mu > lambda_max`` and ``||step|| = rho``, and its
    norm decreases in mu.
    """
    values, vectors = torch.linalg.eigh(hessian)
    g = vectors.T @ gradient
    low = float(values[-1]) * (1 + 1e-12)
    high = low + float(gradient.norm()) / rho
    for _ in range(200):
        mu = (low + high) / 2
        low, high = (mu, high) if (g / (mu - values)).norm() > rho else (low, mu)
    return increase(gradient, hessian, vectors @ (g / (high - values)))


def everything(model: nn.Module) -> list[Any]:
    """All that a call must not change: tensors, their identities, gradients, modes, random states."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    gradients = [p.grad for p in model.parameters()]
    return [
        [(name, id(value), value._version, value.detach().clone()) for name, value in tensors],
        [(id(g), None if g is None else g.clone()) for g in gradients],
        [module.training for module in model.modules()],
        copy.deepcopy(model.state_dict()),
        torch.get_rng_state(),
        str(np.random.get_state()),
        random.getstate(),
    ]


def same(first: Any, second: Any) -> bool:
    """Whether two results of :func:`everything` are equal to the bit."""
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A small network with BatchNorm, dropout, a frozen parameter and gradients, in training mode."""
    model = nn.Sequential(
        nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 4)
    ).to(dtype)
    model(torch.randn(16, 3, dtype=dtype)).square().sum().backward()
    model[0].bias.requires_grad_(False)
    model[4].eval()
    return model
