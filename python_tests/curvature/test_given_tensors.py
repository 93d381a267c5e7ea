"""Batches whose tensors cannot be used as they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastsam.curvature import curvature_operator
from python_tests.curvature.oracles import classification, mlp

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
