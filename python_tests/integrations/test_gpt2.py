"""The Gauss-Newton matrix of GPT-2 on padded batches equals ``J' H J`` by finite differences."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from fastsam import curvature_operator

pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install transformers"
)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SCRIPT = Path(__file__).parents[2] / "examples" / "gpt2_ggn.py"


def logits(model: nn.Module, batch: dict[str, Tensor], weights: Tensor) -> Tensor:
    """Return the logits that predict a label, at given weights, ``[labels, classes]``."""
    vector_to_parameters(weights, model.parameters())
    counted = batch["labels"][:, 1:] != -100
    return model(**batch).logits[:, :-1][counted]


def product(model: nn.Module, batch: dict[str, Tensor], vector: Tensor) -> tuple[Tensor, int]:
    """Return the sum over labels of ``J' (diag(p) - p p') J vector``, and the number of labels.

    Central differences give ``J vector``, so no derivative is shared with the operator.
    """
    weights = parameters_to_vector(model.parameters()).detach()
    step = 1e-5 / vector.norm() * weights.norm()
    with torch.no_grad():
        ahead, behind = (logits(model, batch, weights + sign * step * vector) for sign in (1, -1))
        tangent = (ahead - behind) / (2 * step)
    outputs = logits(model, batch, weights)
    p = outputs.detach().softmax(dim=1)
    cotangent = p * (tangent - (p * tangent).sum(dim=1, keepdim=True))
    gradients = torch.autograd.grad(outputs, list(model.parameters()), cotangent)
    return torch.cat([gradient.reshape(-1) for gradient in gradients]), len(outputs)


def test_ggn_of_gpt2(seed: int) -> None:
    script: dict[str, Any] = runpy.run_path(str(SCRIPT))
    model, ggn, pairs = script["main"]()
    assert ggn.shape[0] == sum(weights.numel() for weights in model.parameters()) > 100_000
    assert pairs.converged
    assert float(pairs.values.min()) > 0
    model.eval().double()
    batches = script["batches"]()
    exact = curvature_operator(model, script["NEXT_TOKEN"], batches, kind="ggn")
    generator = torch.Generator().manual_seed(seed)
    for vector in torch.randn(2, len(exact.gradient), generator=generator, dtype=torch.float64):
        sums, labels = zip(*(product(model, batch, vector) for batch in batches), strict=True)
        expected = sum(sums) / sum(labels)
        assert (exact @ vector - expected).norm() <= 1e-7 * expected.norm()
    weights = pairs.vectors[0].double()
    value = weights @ (exact @ weights)
    assert abs(value - pairs.values[0]) <= 1e-4 * abs(value)
