"""Random small networks of every kind, with every strategy, against explicit Hessians in float64."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastsam.curvature import spectral_density
from fastsam.curvature.products.strategies import STRATEGIES

SEED = int(os.environ.get("FASTSAM_TEST_SEED", "0"))
PADDING = ("zeros", "reflect", "replicate", "circular")
ACTIVATIONS = (nn.Tanh, nn.Softplus, nn.SiLU, nn.GELU, nn.Sigmoid, nn.ELU, nn.Hardsigmoid)
SAMPLES = 4


class Last(nn.Module):
    """The last time step of a recurrent layer's outputs."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0][:, -1]


class SelfAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0].mean(dim=1)


class Tied(nn.Module):
    """A network that uses one layer twice, and the transpose of its weight at the end."""

    def __init__(self, width: int, activation: nn.Module) -> None:
        super().__init__()
        self.layer, self.activation = nn.Linear(width, width), activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.layer(self.activation(self.layer(x))))
        return x @ self.layer.weight


@dataclass
class Output:
    """An output object like those of model libraries."""

    logits: Tensor
    hidden: tuple[Tensor, ...]


class Structured(nn.Module):
    def __init__(self, body: nn.Module, form: str) -> None:
        super().__init__()
        self.body, self.form = body, form

    def forward(self, x: Tensor):
        y = self.body(x)
        return {"dict": {"cls": y, "aux": 2 * y}, "object": Output(y, (x,)), "tuple": (y, x)}[
            self.form
        ]


PICK = {
    "plain": lambda o: o,
    "dict": lambda o: o["cls"],
    "object": lambda o: o.logits,
    "tuple": lambda o: o[0],
}


def random_network(seed: int):
    """Return (model, criterion, batch, mean loss of the outputs, name of the loss) for a seed."""
    generator = torch.Generator().manual_seed(1_000_003 * SEED + seed)

    def pick(choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    activation, classes = pick(ACTIVATIONS)(), 3
    kind = ("dense", "conv1d", "conv2d", "recurrent", "attention", "tied", "frozen")[seed % 7]
    if kind in ("dense", "frozen"):
        inputs, width = normal(SAMPLES, 3), 3
        body = nn.Sequential(
            nn.Linear(3, 4),
            activation,
            nn.BatchNorm1d(4),
            nn.Linear(4, 3, bias=pick((True, False))),
        )
        if kind == "frozen":
            body[pick((0, 3))].weight.requires_grad_(False)
    elif kind == "conv1d":
        inputs, width = normal(SAMPLES, 2, 6), 2
        layer = nn.Conv1d(2, 2, 3, padding=pick((1, 2)), padding_mode=PADDING[seed // 7 % 4])
        body = nn.Sequential(layer, activation, nn.AdaptiveAvgPool1d(1), nn.Flatten())
    elif kind == "conv2d":
        inputs, width = normal(SAMPLES, 1, 4, 4), 2
        layer = nn.Conv2d(
            1, 2, pick((2, 3)), stride=pick((1, 2)), padding=1, padding_mode=PADDING[seed // 7 % 4]
        )
        body = nn.Sequential(
            layer, nn.BatchNorm2d(2), activation, nn.AdaptiveMaxPool2d(1), nn.Flatten()
        )
    elif kind == "recurrent":
        inputs, width = normal(SAMPLES, 3, 2), 2
        cell = pick((nn.RNN, nn.LSTM, nn.GRU))(2, 2, batch_first=True)
        body = nn.Sequential(Last(cell), activation)
    elif kind == "attention":
        inputs, width = normal(SAMPLES, 3, 2), 2
        body = nn.Sequential(SelfAttention(2), activation, nn.LayerNorm(2))
    else:
        inputs, width = normal(SAMPLES, 3), 3
        body = nn.Sequential(Tied(3, activation))
    model = nn.Sequential(body, nn.Linear(width, classes)).double().eval()
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(normal(*value.shape) * 0.7)
    loss = pick(("mse", "ce", "bce"))
    form = pick(("plain", "plain", "dict", "object", "tuple"))
    if loss == "ce":
        targets = torch.randint(classes, (SAMPLES,), generator=generator)
        criterion, function = nn.CrossEntropyLoss(), F.cross_entropy
    elif loss == "mse":
        targets, criterion, function = normal(SAMPLES, classes), nn.MSELoss(), F.mse_loss
    else:
        targets = torch.rand(SAMPLES, classes, generator=generator, dtype=torch.float64)
        criterion, function = nn.BCEWithLogitsLoss(), F.binary_cross_entropy_with_logits
    picked = PICK[form]
    if form != "plain":
        model, criterion = Structured(model, form), lambda o, t: function(picked(o), t)

    def mean_loss(outputs) -> Tensor:
        return function(picked(outputs), targets)

    return model, criterion, (inputs, targets), mean_loss, loss


def explicit(model: nn.Module, inputs: Tensor, mean_loss):
    """Hessian by rows, and the gradient as a function of the parameters."""
    names = [name for name, value in model.named_parameters() if value.requires_grad]
    values = [value.detach() for value in model.parameters() if value.requires_grad]
    sizes = [value.numel() for value in values]

    def gradient(flat: Tensor, *, graph: bool = False) -> Tensor:
        flat = flat.detach().requires_grad_()
        pieces = zip(names, flat.split(sizes), values, strict=True)
        state = {name: piece.view_as(value) for name, piece, value in pieces}
        with sdpa_kernel(SDPBackend.MATH):
            loss = mean_loss(functional_call(model, state, (inputs,)))
        (found,) = torch.autograd.grad(loss, flat, create_graph=graph)
        if not graph:
            return found
        rows = [
            torch.autograd.grad(entry, flat, retain_graph=True, allow_unused=True)[0]
            for entry in found
        ]
        return torch.stack([torch.zeros_like(flat) if row is None else row for row in rows])

    start = torch.cat([value.reshape(-1) for value in values])
    return gradient(start, graph=True), gradient, start


def check(seed: int, strategies=("auto", *STRATEGIES)) -> None:
    model, criterion, batch, mean_loss, loss = random_network(seed)
    model_of_oracle = model
    if isinstance(model, nn.Module) and any(isinstance(m, nn.Hardsigmoid) for m in model.modules()):
        model_of_oracle = with_other_hardsigmoid(seed)
    hessian, gradient, start = explicit(model_of_oracle, batch[0], mean_loss)
    # A check of the oracle by differences of gradients, which use no second derivatives.
    along = torch.randn(
        len(start), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    step = 1e-6
    slope = (gradient(start + step * along) - gradient(start - step * along)) / (2 * step)
    values = torch.linalg.eigvalsh(hessian)
    scale = max(float(values.abs().max()), 1e-12)
    assert float((slope - hessian @ along).norm()) <= 1e-5 * scale * float(along.norm()), "oracle"
    for strategy in strategies:
        options = {"steps": (60, 300)[seed % 2], "probes": 1 + seed % 3 // 2, "strategy": strategy}
        try:
            spectrum = spectral_density(model, criterion, batch, progress=False, **options)
        except ValueError as error:
            refusal = str(error)
        else:
            refusal = None
        if refusal is not None:
            # Torch has no forward mode for the gradient of mse_loss; nothing wrong is returned.
            assert (strategy, loss) == ("forward-over-reverse", "mse"), (seed, refusal)
            assert "does not work for this model and loss" in refusal, (seed, refusal)
            continue
        assert spectrum.dimension == len(hessian) <= 60
        found = spectrum.lambda_min, spectrum.lambda_max
        expected = float(values[0]), float(values[-1])
        assert found == pytest.approx(expected, abs=1e-8 * scale), (seed, strategy)


class OtherHardsigmoid(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x / 6 + 0.5).clamp(0, 1)


def with_other_hardsigmoid(seed: int) -> nn.Module:
    """Replace torch's Hardsigmoid, which has no second derivative, in a copy of the network."""
    model = random_network(seed)[0]
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Hardsigmoid):
                setattr(module, name, OtherHardsigmoid())
    return model


@pytest.mark.parametrize("seed", range(14))
def test_random_networks(seed):
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 500, 20))
def test_five_hundred_random_networks(first):
    for seed in range(first, first + 20):
        check(seed)
