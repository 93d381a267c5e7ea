"""Replaced convolutions and BatchNorm: same values, same derivatives of first and second order."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastsam.curvature import spectral_density
from fastsam.curvature.products.second_order import FastSecondOrder
from python_tests.curvature.oracles import explicit_hessian

CONVOLUTIONS = {
    "plain": (nn.Conv2d(2, 3, 3), (5, 6)),
    "strided, padded": (nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False), (7, 5)),
    "uneven": (nn.Conv2d(2, 3, (3, 1), stride=(1, 2), padding=(0, 2), dilation=(2, 1)), (6, 5)),
    "groups": (nn.Conv2d(4, 4, 3, groups=2, padding=1), (4, 4)),
    "depthwise": (nn.Conv2d(3, 3, 3, groups=3), (5, 5)),
    "same": (nn.Conv2d(2, 2, 3, padding="same"), (4, 4)),
    "reflected": (nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), (4, 4)),
    "line": (nn.Conv1d(2, 3, 3, padding=1), (6,)),
    "volume": (nn.Conv3d(1, 2, 2), (3, 3, 3)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name):
    layer, size = CONVOLUTIONS[name]
    layer = layer.double()
    channels = layer.weight.shape[1] * layer.groups
    inputs = torch.randn(3, channels, *size, dtype=torch.float64, requires_grad=True)
    leaves = (inputs, *layer.parameters())

    def derivatives(fast: bool):
        if fast:
            with FastSecondOrder():
                outputs = layer(inputs)
        else:
            outputs = layer(inputs)
        first = torch.autograd.grad(outputs.sin().sum(), leaves, create_graph=True)
        generator = torch.Generator().manual_seed(0)
        along = [torch.randn(g.shape, generator=generator, dtype=torch.float64) for g in first]
        second = torch.autograd.grad(first, leaves, grad_outputs=along)
        return outputs, first, second

    (y1, g1, h1), (y2, g2, h2) = derivatives(False), derivatives(True)
    assert torch.allclose(y1, y2, atol=1e-12)
    for ours, theirs in zip((*g1, *h1), (*g2, *h2), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5), (2, 3, 4, 4)])
def test_batch_norm(affine, shape):
    kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}
    layer = kinds[len(shape)](3, affine=affine).double().eval()
    layer.running_mean.uniform_(-1, 1)
    layer.running_var.uniform_(0.1, 3)
    inputs = torch.randn(shape, dtype=torch.float64)
    with FastSecondOrder():
        fast = layer(inputs)
    assert torch.allclose(fast, layer(inputs), atol=1e-12)
    layer.train()
    with FastSecondOrder():  # training mode is left to torch
        fast = layer(inputs)
    assert torch.allclose(fast, F.batch_norm(inputs, None, None, layer.weight, layer.bias, True))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1, bias=False),
            nn.BatchNorm2d(3),
            nn.Softplus(),
            nn.Conv2d(3, 3, 3, stride=2, groups=3),
            nn.Tanh(),
        )
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.body(x).mean(dim=(2, 3)))


@pytest.mark.parametrize("strategy", ["kept-graph", "kept-graph-batched", "rebuild"])
@pytest.mark.parametrize("params", [None, ["body.3", "head"]])
def test_a_network_with_every_strategy(strategy, params):
    model = Network().double()
    inputs, targets = torch.randn(5, 1, 6, 6).double(), torch.randint(3, (5,))
    names = None
    if params:
        names = [n for n, _ in model.named_parameters() if n.startswith(tuple(params))]
    model.eval()
    hessian = explicit_hessian(model, lambda m: F.cross_entropy(m(inputs), targets), names)
    values = torch.linalg.eigvalsh(hessian)
    spectrum = spectral_density(
        model,
        F.cross_entropy,
        (inputs, targets),
        steps=len(hessian),
        probes=2,
        params=params,
        strategy=strategy,
    )
    scale = float(values.abs().max())
    assert spectrum.lambda_max == pytest.approx(float(values[-1]), abs=1e-8 * scale)
    assert spectrum.lambda_min == pytest.approx(float(values[0]), abs=1e-8 * scale)
