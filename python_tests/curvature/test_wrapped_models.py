"""Data-parallel and compiled models."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastsam.curvature import curvature_operator, layer_spectra
from python_tests.curvature.oracles import classification, explicit_hessian, mlp


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


def in_place(model: nn.Sequential) -> nn.Module:
    model.compile(backend="aot_eager")
    return model


def parts(model: nn.Sequential) -> nn.Module:
    model[0] = torch.compile(model[0], backend="aot_eager")
    model[1].compile(backend="aot_eager")
    return model


# torch's compiler itself reads the gradient of an activation.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("change", [in_place, parts])
@pytest.mark.parametrize("used", [False, True])
def test_compiled_parts_run_eagerly_in_a_run_only(change, used):
    plain = mlp((3, 4, 3))
    model = change(copy.deepcopy(plain))
    inputs, targets = classification(8, 3, 3)
    if used:
        F.cross_entropy(model(inputs), targets).backward()
    expected = explicit_hessian(plain, lambda m: F.cross_entropy(m(inputs), targets))
    operator = curvature_operator(model, F.cross_entropy, (inputs, targets))
    assert torch.allclose(operator.to_dense(), expected, rtol=1e-8, atol=1e-10)
    calls = []

    def backend(graph, examples):
        calls.append(1)
        return graph.forward

    torch.compile(lambda x: x + 1, backend=backend)(inputs)
    assert calls  # compiled again after the run
