"""Losses with derivatives, structured outputs, dependent samples, and fits with almost no loss."""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsam.curvature import (
    BatchLoss,
    MatrixOperator,
    escape_report,
    negative_curvature,
    operator_spectrum,
    spectral_density,
)
from fastsam.curvature.products import planning, trials
from fastsam.curvature.products.strategies import STRATEGIES
from python_tests.curvature.oracles import SineOnce, classification, explicit_hessian, mlp

HESSIAN_ONLY = ("kept-graph-batched", "forward-over-reverse")


def agrees(spectrum, hessian) -> None:
    values = torch.linalg.eigvalsh(hessian.detach())
    scale = float(values.abs().max())
    found = spectrum.lambda_min, spectrum.lambda_max
    assert found == pytest.approx((float(values[0]), float(values[-1])), abs=1e-8 * scale)


# Strategies


def test_many_steps_take_the_kept_graph():
    """With 300 steps the process died inside torch.func.linearize."""
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 3)).double()
    batch = torch.randn(64, 20).double(), torch.rand(64, 3).double()
    spectrum = spectral_density(model, nn.MSELoss(), batch, steps=300)
    assert spectrum.settings["strategy"] == "kept-graph"
    assert "linearize" not in STRATEGIES
    with pytest.raises(ValueError, match="must be 'auto' or one of"):
        spectral_density(model, nn.MSELoss(), batch, strategy="linearize")


@pytest.mark.parametrize("fault", ["fails", "disagrees"])
@pytest.mark.parametrize("strategy", HESSIAN_ONLY)
def test_an_unfit_strategy_is_dropped_by_auto_and_refused_if_requested(
    fault, strategy, monkeypatch, caplog
):
    make = trials.make_product

    def unfit(name, *arguments, **options):
        product = make(name, *arguments, **options)
        if name != strategy:
            return product
        if fault == "fails":
            raise NotImplementedError("no such rule")
        return lambda vectors: product(vectors) * (1 + 1e-6)

    plain = "kept-graph" if strategy == "kept-graph-batched" else "rebuild"
    monkeypatch.setattr(trials, "make_product", unfit)
    monkeypatch.setattr(planning, "_candidates", lambda *_, **__: [plain, strategy])
    model, batch = mlp((3, 4, 3)), classification(9, 3, 3)
    hessian = explicit_hessian(model, lambda m: F.cross_entropy(m(batch[0]), batch[1]))
    with caplog.at_level(logging.DEBUG, logger="fastsam.curvature.products.trials"):
        spectrum = spectral_density(model, F.cross_entropy, batch, steps=31, probes=2)
    assert spectrum.settings["strategy"] == plain
    agrees(spectrum, hessian)
    assert [record.levelname for record in caplog.records] == ["DEBUG"]
    assert strategy in caplog.text
    with pytest.raises(ValueError, match=f"does not work for this model.*strategy='{plain}'"):
        spectral_density(model, F.cross_entropy, batch, steps=31, strategy=strategy)


# Losses that differentiate


class Field(nn.Module):
    """A smooth scalar field."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp((2, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Forces(Field):
    """Negative gradients of an energy by positions."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.layers(x).sum(), x, create_graph=True)
        return -slope


def residual(model: nn.Module, x: Tensor) -> Tensor:
    """Residual of u'' = u in the first coordinate, as in physics-informed networks."""
    x = x.requires_grad_()
    u = model(x)
    (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first[:, 0].sum(), x, create_graph=True)
    return (second[:, 0] - u[:, 0]).square()


@pytest.mark.parametrize("strategy", ["auto", "kept-graph", "kept-graph-batched", "rebuild"])
@pytest.mark.parametrize("kind", ["pinn", "forces", "penalty"])
def test_losses_that_differentiate(kind, strategy):
    inputs = torch.randn(7, 2, dtype=torch.float64)
    targets = torch.randn(7, 2 if kind == "forces" else 1, dtype=torch.float64)
    model = Forces() if kind == "forces" else Field()

    def penalized(network, x, y):
        x = x.detach().requires_grad_()
        outputs = network(x)
        (slope,) = torch.autograd.grad(outputs.sum(), x, create_graph=True)
        return F.mse_loss(outputs, y, reduction="sum") + slope.square().sum()

    if kind == "forces":
        loss, mean = nn.MSELoss(), lambda m: F.mse_loss(m(inputs), targets)
    elif kind == "pinn":
        loss = BatchLoss(lambda m, b: (residual(m, b[0]).sum(), len(b[0])))
        mean = lambda m: residual(m, inputs.clone()).mean()  # noqa: E731
    else:
        loss = BatchLoss(lambda m, b: (penalized(m, *b), len(b[0])))
        mean = lambda m: penalized(m, inputs, targets) / 7  # noqa: E731
    hessian = rows_of_hessian(model, mean)
    options = {"steps": 30, "strategy": strategy}
    agrees(spectral_density(model, loss, (inputs, targets), **options), hessian)
    assert not inputs.requires_grad


def rows_of_hessian(model: nn.Module, mean) -> Tensor:
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(
        mean(model), parameters, create_graph=True, allow_unused=True, materialize_grads=True
    )
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    rows = []
    for entry in flat:
        if not entry.requires_grad:
            rows.append(torch.zeros(len(flat), dtype=flat.dtype))
            continue
        row = torch.autograd.grad(
            entry, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([piece.reshape(-1) for piece in row]))
    return torch.stack(rows)


def test_escape_of_a_loss_that_differentiates():
    batches = [(torch.randn(5, 2).double(), torch.randn(5, 2).double()) for _ in range(3)]
    found = negative_curvature(Forces(), nn.MSELoss(), batches)
    model = Forces()
    assert escape_report(model, nn.MSELoss(), batches, found.direction, rho=0.01).batches == 3


# Outputs with structure


@dataclass
class Output:
    logits: Tensor
    loss: Any = None


class Ordered(OrderedDict):
    """An output like those of model libraries: entries are attributes, and the length counts them."""

    logits = property(lambda self: self["logits"])


class Heads(nn.Module):
    def __init__(self, make) -> None:
        super().__init__()
        self.body, self.make = mlp((3, 4, 3)), make

    def forward(self, x):
        return self.make(self.body(x))


STRUCTURES = {
    "dataclass": (Output, lambda o: o.logits),
    "ordered": (lambda y: Ordered(logits=y, hidden=y), lambda o: o.logits),
    "dict": (lambda y: {"cls": y, "aux": y.sum()}, lambda o: o["cls"]),
    "tuple": (lambda y: (y, None), lambda o: o[0]),
}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("targets_are", ["tensor", "dict"])
def test_criteria_over_outputs_with_structure(structure, targets_are):
    make, pick = STRUCTURES[structure]
    model, (inputs, targets) = Heads(make), classification(11, 3, 3)
    hessian = explicit_hessian(model, lambda m: F.cross_entropy(pick(m(inputs)), targets))
    data = [(inputs[:8], targets[:8]), (inputs[8:], targets[8:])]
    if targets_are == "dict":
        data = [(x, {"label": y}) for x, y in data]

    def criterion(outputs, y):
        return F.cross_entropy(pick(outputs), y["label"] if targets_are == "dict" else y)

    spectrum = spectral_density(model, criterion, data, steps=99)
    agrees(spectrum, hessian)
    assert spectrum.weight == 11


@pytest.mark.parametrize(
    "criterion", [nn.CrossEntropyLoss(), F.cross_entropy, nn.MSELoss(), F.mse_loss]
)
@pytest.mark.parametrize("kind", ["hessian", "ggn", "empirical-fisher", "mc-fisher"])
def test_errors_of_torch_criteria_over_structured_outputs_name_the_fix(criterion, kind):
    model, batch = Heads(Output), classification(11, 3, 3)
    with pytest.raises(TypeError, match=r"returned Output; select the tensor.*BatchLoss"):
        spectral_density(model, criterion, batch, kind=kind)


# Samples that depend on each other


def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
    """A contrastive loss, which compares every sample with all others of the batch."""
    z = F.normalize(outputs)
    return F.cross_entropy(z @ z.T / 0.5, targets.remainder(len(z)))


def weighted_mean(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, weight=torch.tensor([0.1, 1.0, 5.0]).to(outputs))


@pytest.mark.parametrize("criterion", [contrastive, weighted_mean])
@pytest.mark.parametrize(
    "options",
    [{"strategy": "auto"}, {"strategy": "rebuild"}, {"micro_batch": 4}, {"data_memory": 0}],
)
@pytest.mark.parametrize("size", [1, 10])
def test_samples_that_depend_on_each_other_are_refused(criterion, options, size):
    model, inputs, targets = mlp((3, 4, 3)), torch.randn(20, 3).double(), torch.arange(20) % 3
    data = [(x, y) for x, y in zip(inputs.split(size), targets.split(size), strict=True)]
    if size == 1 and criterion is weighted_mean and "micro_batch" in options:
        data = [(inputs, targets)]
    if options.pop("data_memory", None) is not None:
        options = {"data_memory": 0}
        data = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(inputs, targets), batch_size=max(size, 2)
        )
    with pytest.raises(ValueError, match=r"samples of a batch depend on each other.*BatchLoss"):
        spectral_density(model, criterion, data, steps=3, **options)


@pytest.mark.parametrize("strategy", ["auto", "rebuild"])
def test_samples_that_depend_on_each_other_in_a_single_batch_stay_whole(strategy):
    model, (inputs, targets) = mlp((3, 4, 3)), classification(10, 3, 3)
    hessian = explicit_hessian(model, lambda m: contrastive(m(inputs), targets))
    spectrum = spectral_density(model, contrastive, (inputs, targets), steps=99, strategy=strategy)
    agrees(spectrum, hessian)
    assert spectrum.loss == pytest.approx(contrastive(model(inputs), targets).item())


@pytest.mark.parametrize("strategy", ["auto", "rebuild"])
def test_a_criterion_for_batches_of_one_size_gets_only_those(strategy):
    model, inputs, targets = mlp((3, 4, 3)), torch.randn(20, 3).double(), torch.rand(20, 3).double()
    weight = torch.rand(10, 1).double()  # one for each sample of a batch
    hessian = explicit_hessian(
        model,
        lambda m: F.binary_cross_entropy_with_logits(
            m(inputs), targets, weight=torch.cat([weight, weight])
        ),
    )
    data = [(inputs[:10], targets[:10]), (inputs[10:], targets[10:])]

    def by_sample(outputs, y):
        return F.binary_cross_entropy_with_logits(outputs, y, weight=weight)

    agrees(spectral_density(model, by_sample, data, steps=99, strategy=strategy), hessian)


# Fits without loss


def fitted(dtype: torch.dtype, margin: float):
    """Return a model and data of one class that is fitted with this margin."""
    torch.manual_seed(3)
    model = mlp((5, 8, 3), dtype=dtype)
    with torch.no_grad():
        model[2].bias.copy_(torch.tensor([margin, 0.0, 0.0]))
    return model, (torch.randn(16, 5, dtype=dtype), torch.zeros(16, dtype=torch.long))


@pytest.mark.parametrize("margin", [15.5, 16.5])
def test_a_well_fitted_class_is_below_float32_and_not_asymmetric(margin):
    model, batch = fitted(torch.float32, margin)
    with pytest.raises(ValueError, match=r"below the resolution of float32.*dtype=torch\.float64"):
        spectral_density(model, nn.CrossEntropyLoss(), batch, steps=20)
    exact, wide = fitted(torch.float64, margin)
    hessian = explicit_hessian(exact, lambda m: F.cross_entropy(m(wide[0]), wide[1]))
    found = spectral_density(exact, nn.CrossEntropyLoss(), wide, steps=99)
    values = torch.linalg.eigvalsh(hessian)
    assert found.lambda_max == pytest.approx(float(values[-1]), rel=1e-6)


def test_the_resolution_is_judged_where_params_is_an_iterator():
    model, batch = fitted(torch.float32, 15.5)
    with pytest.raises(ValueError, match="below the resolution of float32"):
        spectral_density(model, nn.CrossEntropyLoss(), batch, steps=20, params=iter(["0", "2"]))


# Operations


class Switched(nn.Module):
    """A model that enters autocast itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp((3, 4, 3), dtype=torch.float32)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.layers(x)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_autocast_inside_a_model_is_switched_off(strategy):
    model, (inputs, targets) = Switched(), classification(9, 3, 3)
    exact = mlp((3, 4, 3))
    exact.load_state_dict(model.layers.state_dict())
    inputs = inputs.float()
    hessian = explicit_hessian(exact, lambda m: F.cross_entropy(m(inputs.double()), targets))
    values = torch.linalg.eigvalsh(hessian)
    spectrum = spectral_density(
        model, F.cross_entropy, (inputs, targets), steps=31, strategy=strategy
    )
    scale = float(values.abs().max())
    assert spectrum.lambda_max == pytest.approx(float(values[-1]), abs=1e-5 * scale)
    assert spectrum.lambda_min == pytest.approx(float(values[0]), abs=1e-5 * scale)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("inplace", [False, True])
def test_hardsigmoid_has_a_second_derivative(strategy, inplace):
    model, (inputs, targets) = mlp((3, 4, 3)), classification(9, 3, 3)

    def with_gate(gate):
        return nn.Sequential(model[0], gate, model[2])

    class Composed(nn.Module):
        def forward(self, x):
            return (x / 6 + 0.5).clamp(0, 1)

    hessian = explicit_hessian(with_gate(Composed()), lambda m: F.cross_entropy(m(inputs), targets))
    gate = with_gate(nn.Hardsigmoid(inplace=inplace))
    agrees(
        spectral_density(gate, F.cross_entropy, (inputs, targets), steps=31, strategy=strategy),
        hessian,
    )


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda y, t: F.multi_margin_loss(y, t, reduction="sum"), "multi_margin_loss"),
        (lambda y, t: SineOnce.apply(y).square().sum(), "SineOnce"),
        (lambda y, t: SineOnce.apply(y).sum(), "SineOnce"),
        (
            lambda y, t: F.ctc_loss(
                y.log_softmax(1)[:, None],
                t[:2].clamp(min=1)[None],
                (len(y),),
                (2,),
                reduction="sum",
            ),
            "ctc_loss",
        ),
    ],
)
def test_an_operation_without_a_second_derivative_is_named(function, name):
    loss = BatchLoss(lambda m, b: (function(m(b[0]), b[1]), len(b[1])))
    with pytest.raises(ValueError, match=f"cannot be differentiated twice.*{name}"):
        spectral_density(mlp((3, 4, 3)), loss, classification(9, 3, 3), steps=3)


@pytest.mark.parametrize("strategy", ["auto", "rebuild"])
def test_an_embedding_with_max_norm_is_unchanged(strategy):
    table = nn.Embedding(7, 3, max_norm=0.5)
    model = nn.Sequential(table, nn.Flatten(), nn.Linear(6, 3))
    before = table.weight.detach().clone()
    version = table.weight._version
    batch = torch.randint(7, (5, 2)), torch.randint(3, (5,))
    spectrum = spectral_density(model, F.cross_entropy, batch, steps=99, strategy=strategy)
    assert torch.equal(table.weight, before)
    assert table.weight._version == version
    capped = nn.Sequential(nn.Embedding(7, 3), *list(model)[1:])
    norms = before.norm(dim=1, keepdim=True)
    with torch.no_grad():
        capped[0].weight.copy_(torch.where(norms > 0.5, before * 0.5 / norms, before))
    plain = spectral_density(capped, F.cross_entropy, batch, steps=99, strategy=strategy)
    assert spectrum.lambda_max == pytest.approx(plain.lambda_max, rel=1e-4)


def test_an_embedding_bag_is_unchanged_and_named():
    table = nn.EmbeddingBag(7, 3, max_norm=0.5)
    before, batch = table.weight.detach().clone(), (torch.randint(7, (5, 2)), torch.arange(5) % 3)
    with pytest.raises(ValueError, match=r"differentiated twice.*_embedding_bag_backward"):
        spectral_density(table, F.cross_entropy, batch, steps=3)
    assert torch.equal(table.weight, before)


# Options and matrices


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 2.5}, "steps must be an integer, got 2.5"),
        ({"steps": float("nan")}, "steps must be an integer, got nan"),
        ({"probes": 1.5}, "probes must be an integer"),
        ({"probe_indices": range(-1, 2)}, "none below 0"),
        ({"probe_indices": [0, 1]}, "must be a range"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"seed": 0.5}, "seed must be an integer"),
        ({"memory_limit": 0}, "memory_limit must be at least 1"),
        ({"memory_limit": 1}, r"needs about 0\.14 KiB, but 0 bytes may be used"),
        ({"checkpoint_interval": float("nan")}, "checkpoint_interval must be in"),
        ({"checkpoint_interval": -1}, "checkpoint_interval must be in"),
        ({"tolerance": float("nan")}, "tolerance must be in"),
        ({"tolerance": "small"}, "tolerance must be a number"),
        ({"micro_batch": 2.5}, "micro_batch must be an integer"),
        ({"freeze": 1.5}, "freeze must be an integer"),
        ({"data_memory": -1}, "data_memory must be at least 0"),
        ({"basis": 3}, "basis must be"),
    ],
)
def test_numbers_among_the_options(options, message):
    model, batch = mlp((3, 3)), classification(5, 3, 3)
    with pytest.raises((TypeError, ValueError), match=message):
        spectral_density(model, F.cross_entropy, [batch], **options)


def test_matrices_of_numpy():
    matrix = np.diag([1.0, 2.0, 5.0])
    assert operator_spectrum(MatrixOperator(matrix), steps=3).lambda_max == pytest.approx(5)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.eye(3, dtype=int), "float32 or float64, got int64"),
        (torch.eye(3, dtype=torch.int64), r"float32 or float64, got torch\.int64"),
        (torch.eye(3, dtype=torch.bfloat16), "float32 or float64"),
        (torch.eye(3, dtype=torch.complex64), "float32 or float64"),
        (torch.eye(3).to_sparse(), "dense matrix"),
        (torch.zeros(0, 0), "at least 1x1"),
        (np.zeros((0, 0)), "at least 1x1"),
        ([[1.0]], "got list"),
        (None, "got NoneType"),
    ],
)
def test_invalid_matrices(matrix, message):
    with pytest.raises((TypeError, ValueError), match=message):
        MatrixOperator(matrix)
