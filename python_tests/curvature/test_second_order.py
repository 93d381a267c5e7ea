"""Replaced convolutions and BatchNorm: same values, same derivatives of first and second order."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastsam.curvature import spectral_density
from fastsam.curvature.products import second_order
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


class Block(nn.Module):
    """A convolution and BatchNorm, whose derivatives the oracle takes without replacements."""

    def __init__(self, layer: nn.Module, norm: nn.Module, between: str = "nothing") -> None:
        super().__init__()
        self.layer, self.norm, self.between = layer, norm, between

    def forward(self, x):
        y = self.layer(x)
        if self.between == "changed in place":
            y *= 2
        if self.between == "changed in place, unseen by autograd":
            with torch.no_grad():
                y *= 2
        z = self.norm(y)
        return z + y if self.between == "used twice" else z


FOLDED = {
    "plain": (nn.Conv2d(2, 3, 3, bias=False), {}),
    "bias": (nn.Conv2d(2, 3, 3, stride=2, padding=1), {}),
    "no scale": (nn.Conv2d(2, 3, (3, 1)), {"affine": False}),
    "groups": (nn.Conv2d(2, 4, 3, groups=2, bias=False), {}),
    "line": (nn.Conv1d(2, 3, 3), {}),
    "volume": (nn.Conv3d(2, 3, 2, bias=False), {}),
}


@pytest.mark.parametrize("name", FOLDED)
@pytest.mark.parametrize(
    "case",
    ["all", "fixed input", "frozen weight", "frozen norm", "used twice", "changed in place"],
)
def test_a_convolution_with_the_batch_norm_of_its_output(name, case):
    layer, options = FOLDED[name]
    spatial = layer.weight.ndim - 2
    kind = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][spatial - 1]
    block = Block(copy.deepcopy(layer), kind(layer.weight.shape[0], **options), case).double()
    for value in (*block.parameters(), *block.buffers()):
        if value.is_floating_point():
            value.data.uniform_(0.2, 2)
    block.eval()
    block.layer.weight.requires_grad_(case != "frozen weight")
    block.norm.requires_grad_(case != "frozen norm")
    inputs = torch.randn(3, 2, *[5] * spatial).double().requires_grad_(case != "fixed input")
    leaves = [each for each in (inputs, *block.parameters()) if each.requires_grad]

    def derivatives() -> tuple[torch.Tensor, ...]:
        outputs = block(inputs)
        first = torch.autograd.grad(outputs.sin().sum(), leaves, create_graph=True)
        generator = torch.Generator().manual_seed(0)
        along = [torch.randn(g.shape, generator=generator, dtype=torch.float64) for g in first]
        second = torch.autograd.grad(first, leaves, grad_outputs=along, allow_unused=True)
        return (outputs, *first, *(torch.zeros(()) if g is None else g for g in second))

    expected = derivatives()
    with FastSecondOrder():
        found = derivatives()
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10)


def test_a_convolution_and_batch_norm_become_one_convolution():
    """No pass over activations is left: the graph of the output is that of a convolution."""
    block = Block(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3)).eval()
    with FastSecondOrder():
        output = block(torch.randn(2, 2, 5, 5, requires_grad=True))
    assert isinstance(output.grad_fn, second_order._Convolution._backward_cls)
    changed = Block(block.layer, block.norm, "changed in place, unseen by autograd").eval()
    inputs = torch.randn(2, 2, 5, 5, requires_grad=True)
    expected = changed(inputs)
    with FastSecondOrder():
        output = changed(inputs)
    assert not isinstance(output.grad_fn, second_order._Convolution._backward_cls)
    assert torch.allclose(output, expected, atol=1e-6)


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
