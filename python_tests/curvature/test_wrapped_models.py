"""Data-parallel and compiled models."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastsam.curvature import layer_spectra
from python_tests.curvature.oracles import classification, mlp


def compiled(model: nn.Module) -> nn.Module:
    whole: nn.Module = torch.compile(model, backend="eager")
    return whole


@pytest.mark.parametrize("wrap", [nn.DataParallel, compiled])
def test_layers_of_a_wrapped_model_have_their_own_names(wrap: Callable[[nn.Module], nn.Module]):
    model, batch = mlp((3, 4, 3)), classification(8, 3, 3)
    plain = layer_spectra(model, F.cross_entropy, batch, steps=4)
    wrapped = layer_spectra(wrap(copy.deepcopy(model)), F.cross_entropy, batch, steps=4)
    assert list(wrapped) == list(plain) == ["0", "2"]
    for name, spectrum in wrapped.items():
        assert np.array_equal(spectrum.alpha, plain[name].alpha)
