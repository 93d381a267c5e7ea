"""Data and losses: accepted and refused forms, and exactly weighted sums."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fastsam.curvature import BatchLoss, Spectrum, class_spectra, spectral_density
from python_tests.curvature.oracles import SineOnce, classification, explicit_hessian, mlp

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
"""Tolerance relative to the largest absolute eigenvalue."""


def eigenvalues_of(spectrum):
    return spectrum.lambda_min, spectrum.lambda_max


def extremes(matrix):
    values = torch.linalg.eigvalsh(matrix)
    return float(values[0]), float(values[-1])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weighted_cross_entropy_over_uneven_batches(reduction, smoothing):
    model = mlp((3, 4, 3))
    inputs, targets = classification(23, 3, 3)
    targets[::5] = -7
    weight = torch.rand(3, dtype=torch.float64) + 0.1
    settings = {"weight": weight, "ignore_index": -7, "label_smoothing": smoothing}
    hessian = explicit_hessian(model, lambda m: F.cross_entropy(m(inputs), targets, **settings))
    criterion = nn.CrossEntropyLoss(**settings, reduction=reduction)
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=10)
    spectrum = spectral_density(model, criterion, loader, steps=99)
    assert eigenvalues_of(spectrum) == pytest.approx(extremes(hessian), rel=1e-8)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_linear_regression(dtype):
    model = nn.Linear(5, 1, bias=False).double()
    inputs, targets = torch.randn(30, 5).double(), torch.randn(30, 1).double()
    hessian = 2 / 30 * inputs.T @ inputs
    data = [(inputs[:20], targets[:20]), (inputs[20:], targets[20:])]
    spectrum = spectral_density(model, nn.MSELoss(), data, steps=5, dtype=dtype)
    low, high = extremes(hessian)
    assert eigenvalues_of(spectrum) == pytest.approx((low, high), abs=TOLERANCE[dtype] * high)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_logistic_regression(dtype):
    model = nn.Linear(4, 1).double()
    inputs, targets = torch.randn(30, 4).double(), torch.randint(2, (30, 1)).double()
    p = torch.sigmoid(model(inputs)).detach()
    extended = torch.cat([inputs, torch.ones(30, 1)], dim=1)
    hessian = (extended * p * (1 - p)).T @ extended / 30
    batch = inputs, targets
    spectrum = spectral_density(model, nn.BCEWithLogitsLoss(), batch, steps=5, dtype=dtype)
    low, high = extremes(hessian)
    assert eigenvalues_of(spectrum) == pytest.approx((low, high), abs=TOLERANCE[dtype] * high)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_softmax_regression(dtype):
    model = nn.Linear(3, 4, bias=False).double()
    inputs, targets = classification(20, 3, 4)
    p = torch.softmax(model(inputs), dim=1).detach()
    hessian = torch.zeros(12, 12, dtype=torch.float64)
    for row, x in zip(p, inputs, strict=True):
        hessian += torch.kron(torch.diag(row) - torch.outer(row, row), torch.outer(x, x)) / 20
    batch = inputs, targets
    spectrum = spectral_density(model, nn.CrossEntropyLoss(), batch, steps=12, dtype=dtype)
    low, high = extremes(hessian)
    assert eigenvalues_of(spectrum) == pytest.approx((low, high), abs=TOLERANCE[dtype] * high)


class Convolutional(nn.Module):
    """Evaluation-mode BatchNorm, an unused parameter, tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.mix = nn.Conv2d(3, 3, 1)
        self.again = self.mix  # one module under two names
        self.other = nn.Conv2d(3, 3, 1)
        self.other.weight = self.mix.weight  # one parameter under two names
        self.unused = nn.Parameter(torch.ones(2))
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        x = torch.tanh(self.norm(self.conv(x)))
        x = self.again(torch.tanh(self.other(torch.tanh(self.mix(x)))))
        return self.head(x.mean(dim=(2, 3)))


@pytest.mark.parametrize(
    ("strategy", "dtype"),
    [
        ("kept-graph", torch.float64),
        ("kept-graph", torch.float32),
        ("forward-over-reverse", torch.float64),
    ],
)
def test_convolutional_network_with_unused_tied_and_frozen_parameters(strategy, dtype):
    model = Convolutional().double()
    model.norm.running_mean.uniform_(-1, 1)
    model.norm.running_var.uniform_(0.5, 2)
    model.head.bias.requires_grad_(False)
    inputs, targets = torch.randn(7, 1, 4, 4).double(), torch.randint(3, (7,))
    model.eval()
    hessian = explicit_hessian(model, lambda m: F.cross_entropy(m(inputs), targets))
    model.train()
    spectrum = spectral_density(
        model,
        nn.CrossEntropyLoss(),
        (inputs, targets),
        steps=len(hessian),
        strategy=strategy,
        dtype=dtype,
    )
    assert spectrum.dimension == len(hessian)
    low, high = extremes(hessian)
    tolerance = TOLERANCE[dtype] * max(-low, high)
    assert eigenvalues_of(spectrum) == pytest.approx((low, high), abs=tolerance)
    assert model.norm.training


def test_named_parameters_and_layers():
    model = mlp((3, 4, 3))
    inputs, targets = classification(9, 3, 3)
    names = ["0.bias", "2.weight", "2.bias"]
    hessian = explicit_hessian(model, lambda m: F.cross_entropy(m(inputs), targets), names)
    spectrum = spectral_density(
        model, F.cross_entropy, (inputs, targets), steps=99, params=["0.bias", "2"]
    )
    assert spectrum.dimension == len(hessian)
    assert eigenvalues_of(spectrum) == pytest.approx(extremes(hessian), rel=1e-8)
    with pytest.raises(ValueError, match=r"no parameter or layer named 'conv'.*0\.weight"):
        spectral_density(model, F.cross_entropy, (inputs, targets), params=["conv"])


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (None, ["0", "2", "4"]),
        (["4", "0.bias", "0.weight", "0"], ["0", "4"]),
        (iter(["2.bias"]), ["2.bias"]),
        ("2", ["2"]),
    ],
)
def test_a_spectrum_records_its_layers(tmp_path, asked, said):
    model = mlp((3, 4, 4, 3))
    spectrum = spectral_density(model, F.cross_entropy, GOOD, steps=2, params=asked)
    spectrum.save(tmp_path / "spectrum.json")
    found = Spectrum.load(tmp_path / "spectrum.json").settings["params"]
    assert found == said
    again = spectral_density(model, F.cross_entropy, GOOD, steps=2, params=found)
    assert again.dimension == spectrum.dimension
    assert again.weight_norm == pytest.approx(spectrum.weight_norm)


def test_frozen_and_tied_parameters_are_not_among_those_of_a_spectrum():
    model = Convolutional()
    model.head.bias.requires_grad_(False)
    batch = torch.randn(4, 1, 4, 4), torch.randint(3, (4,))
    found = spectral_density(model, F.cross_entropy, batch, steps=2).settings["params"]
    assert found == ["unused", "conv", "norm", "mix", "other", "head.weight"]


def test_batch_loss_with_dictionaries():
    model = mlp((3, 4, 2))
    inputs, targets = torch.randn(9, 3).double(), torch.randn(9, 2).double()
    hessian = explicit_hessian(model, lambda m: (m(inputs) - targets).pow(4).sum() / 9)

    def summed(network, batch):
        return (network(batch["x"]) - batch["y"]).pow(4).sum(), len(batch["y"])

    batches = [{"x": inputs[:4], "y": targets[:4]}, {"x": inputs[4:], "y": targets[4:]}]
    spectrum = spectral_density(model, BatchLoss(summed), batches, steps=99)
    assert eigenvalues_of(spectrum) == pytest.approx(extremes(hessian), rel=1e-8)
    single = spectral_density(model, BatchLoss(summed), {"x": inputs, "y": targets}, steps=99)
    assert eigenvalues_of(single) == pytest.approx(extremes(hessian), rel=1e-8)


class Augmented(Dataset):
    """Linear regression data whose inputs get new noise at every read."""

    def __init__(self, source: str) -> None:
        self.inputs, self.targets = torch.randn(6, 12), torch.zeros(6, 1)
        self.source = source

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index):
        if self.source == "torch":
            noise = torch.randn(12)
        elif self.source == "numpy":
            noise = torch.from_numpy(np.random.randn(12)).float()
        else:
            noise = torch.full((12,), random.gauss(0, 1))
        return self.inputs[index] + noise, self.targets[index]


@pytest.mark.parametrize("source", ["torch", "numpy", "python"])
def test_changing_samples_are_refused_and_frozen_ones_accepted(source):
    model = nn.Linear(12, 1, bias=False)
    loader = DataLoader(Augmented(source), batch_size=4)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with pytest.raises(ValueError, match=r"6 of 6 samples differ.*freeze=K"):
        spectral_density(model, nn.MSELoss(), loader, steps=3)
    spectrum = spectral_density(
        model, nn.MSELoss(), loader, steps=12, freeze=5, dtype=torch.float64
    )
    assert spectrum.settings["samples"] == 30
    assert spectrum.lambda_min >= -1e-8 * spectrum.lambda_max
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])
    assert states[2] == random.getstate()


def test_why_changing_samples_are_refused():
    """A positive semidefinite operator that is drawn again at each product looks like a saddle."""
    model = nn.Linear(12, 1, bias=False)
    loader = DataLoader(Augmented("torch"), batch_size=6)
    wrong = spectral_density(model, nn.MSELoss(), loader, steps=12, verify_data=False)
    assert wrong.lambda_min < -0.1 * wrong.lambda_max
    assert wrong.settings["data_verified"] is False
    right = spectral_density(model, nn.MSELoss(), loader, steps=12, freeze=1)
    assert right.lambda_min >= -1e-4 * right.lambda_max


def test_a_loader_that_reorders_is_accepted():
    model = mlp((3, 4, 3))
    inputs, targets = classification(20, 3, 3)
    hessian = explicit_hessian(model, lambda m: F.cross_entropy(m(inputs), targets))
    own = torch.Generator().manual_seed(4)
    for generator in (None, own):
        loader = DataLoader(
            TensorDataset(inputs, targets), batch_size=6, shuffle=True, generator=generator
        )
        before = torch.get_rng_state(), own.get_state()
        spectrum = spectral_density(model, F.cross_entropy, loader, steps=99)
        assert eigenvalues_of(spectrum) == pytest.approx(extremes(hessian), rel=1e-8)
        assert torch.equal(before[0], torch.get_rng_state())
        assert torch.equal(before[1], own.get_state())


def test_a_loader_too_large_to_hold_is_read_again_in_the_same_order():
    model = mlp((3, 4, 3))
    inputs, targets = classification(20, 3, 3)
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=6, shuffle=True)
    held = spectral_density(model, F.cross_entropy, loader, steps=9)
    runs = [
        spectral_density(model, F.cross_entropy, loader, steps=9, data_memory=64) for _ in range(2)
    ]
    assert held.settings["strategy"] == "kept-graph"
    assert runs[0].settings["strategy"] == "rebuild"
    assert np.allclose(held.alpha, runs[0].alpha)
    assert np.array_equal(runs[0].alpha, runs[1].alpha)


def test_one_shot_iterators_are_held_or_refused():
    model = mlp((3, 4, 3))
    inputs, targets = classification(20, 3, 3)
    batches = [(inputs[:12], targets[:12]), (inputs[12:], targets[12:])]
    spectrum = spectral_density(model, F.cross_entropy, iter(batches), steps=9)
    assert np.array_equal(
        spectrum.alpha, spectral_density(model, F.cross_entropy, batches, steps=9).alpha
    )
    with pytest.raises(ValueError, match="one-shot"):
        spectral_density(model, F.cross_entropy, iter(batches), steps=9, data_memory=64)
    with pytest.raises(ValueError, match="freeze=4 requires data that can be read 4 times"):
        spectral_density(model, F.cross_entropy, iter(batches), steps=9, freeze=4)
    once = spectral_density(model, F.cross_entropy, iter(batches), steps=9, freeze=1)
    assert np.array_equal(once.alpha, spectrum.alpha)


def nan_batch():
    inputs, targets = classification(5, 3, 3)
    inputs[2, 1] = torch.nan
    return inputs, targets


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3).double()

    def forward(self, x):
        return F.dropout(self.layer(x), 0.5)


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3).double()

    def forward(self, x):
        return self.layer(x).detach()


class OnceDifferentiable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3).double()

    def forward(self, x):
        return SineOnce.apply(self.layer(x))


def words() -> nn.Module:
    return nn.Sequential(nn.Embedding(7, 3, sparse=True), nn.Flatten(), nn.Linear(6, 3))


WORDS = (torch.randint(7, (5, 2)), torch.randint(3, (5,)))
GOOD = classification(5, 3, 3)


@pytest.mark.parametrize(
    ("model", "data", "options", "error", "message"),
    [
        (mlp((3, 3)), nan_batch(), {}, ValueError, "batch 0 is nan: the data contain NaN"),
        (Dropping(), GOOD, {}, ValueError, "loss is random"),
        (Detached(), GOOD, {}, ValueError, "does not depend"),
        (OnceDifferentiable(), GOOD, {}, ValueError, "differentiated twice"),
        (words(), WORDS, {}, ValueError, "sparse=False"),
        (mlp((3, 3)).requires_grad_(False), GOOD, {}, ValueError, "no parameter that requires"),
        (nn.Tanh(), GOOD, {}, ValueError, "no parameter"),
        (mlp((3, 3)), [], {}, ValueError, "no batch"),
        (mlp((3, 3)), GOOD[0], {}, TypeError, "one batch"),
        (mlp((3, 3)), 3, {}, TypeError, "one batch"),
        (mlp((3, 3)), TensorDataset(*GOOD), {}, TypeError, "DataLoader"),
        (mlp((3, 3)), (*GOOD, GOOD[1]), {}, TypeError, r"\(inputs, targets\)"),
        (mlp((3, 3)), {"x": GOOD[0]}, {}, TypeError, r"\(inputs, targets\)"),
        (mlp((3, 3)), GOOD, {"steps": 0}, ValueError, "steps"),
        (mlp((3, 3)), GOOD, {"strategy": "magic"}, ValueError, "kept-graph"),
        (mlp((3, 3)), GOOD, {"dtype": torch.bfloat16}, ValueError, "float32"),
        (mlp((3, 3)), [GOOD], {"freeze": 0}, ValueError, "freeze"),
        ("model", GOOD, {}, TypeError, "nn.Module"),
    ],
)
def test_bad_input(model, data, options, error, message):
    modes = [m.training for m in model.modules()] if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=message):
        spectral_density(model, nn.CrossEntropyLoss(), data, **options)
    if modes is not None:
        assert modes == [m.training for m in model.modules()]


def test_invalid_losses_are_refused():
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.ones(3)

        def forward(self, outputs, targets):
            return F.cross_entropy(outputs, targets, self.weight)

    model = mlp((3, 3))
    with pytest.raises(ValueError, match="class weights"):
        spectral_density(model, Weighted(), GOOD)
    with pytest.raises(TypeError, match="BatchLoss"):
        spectral_density(model, "ce", GOOD)
    with pytest.raises(TypeError, match="scalar"):
        spectral_density(model, lambda out, y: (out - 1).square(), GOOD)
    with pytest.raises(TypeError, match="loss_sum, weight"):
        spectral_density(model, BatchLoss(lambda m, b: m(b[0]).sum()), GOOD)
    ignored = GOOD[0], torch.full_like(GOOD[1], -100)
    with pytest.raises(ValueError, match="total weight"):
        spectral_density(model, nn.CrossEntropyLoss(), ignored)


def test_a_loss_linear_in_the_parameters_has_hessian_zero():
    spectrum = spectral_density(mlp((3, 3)), BatchLoss(lambda m, b: (m(b[0]).sum(), 1)), GOOD)
    assert (spectrum.lambda_min, spectrum.lambda_max) == (0, 0)


def test_a_class_without_samples():
    with pytest.raises(ValueError, match=r"class 7 has no sample.*choose among"):
        class_spectra(mlp((3, 3)), nn.CrossEntropyLoss(), GOOD, classes=[7])


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_changes_when_the_run_is_interrupted(error, monkeypatch):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double().train()
    calls = []

    def summed(network, batch):
        calls.append(1)
        torch.rand(1)
        if len(calls) == 6:
            raise error("stop")
        return F.cross_entropy(network(batch[0]), batch[1], reduction="sum"), len(batch[1])

    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    precision = torch.backends.cuda.matmul.fp32_precision
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    with pytest.raises(error):
        spectral_density(model, BatchLoss(summed), GOOD, steps=20, strategy="rebuild")
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.grad is None and value.requires_grad for value in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.backends.cuda.matmul.fp32_precision == precision
    assert torch.backends.cudnn.benchmark
    assert not torch.backends.cudnn.deterministic


def test_low_precision_weights_and_autocast():
    model = mlp((3, 4, 3)).to(torch.bfloat16)
    inputs, targets = classification(9, 3, 3)
    exact = mlp((3, 4, 3))
    exact.load_state_dict(model.state_dict())
    hessian = explicit_hessian(exact, lambda m: F.cross_entropy(m(inputs), targets))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        spectrum = spectral_density(model, F.cross_entropy, (inputs, targets), steps=31)
    low, high = extremes(hessian)
    assert spectrum.settings["dtype"] == "float32"
    assert eigenvalues_of(spectrum) == pytest.approx((low, high), abs=1e-4 * max(-low, high))
    assert model[0].weight.dtype is torch.bfloat16


def test_attention_is_differentiated_on_its_math_backend():
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True)

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = layer, nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.layer(x).mean(dim=1))

    model = Classifier().double()
    inputs, targets = torch.randn(4, 5, 4).double(), torch.randint(3, (4,))
    spectrum = spectral_density(
        model, F.cross_entropy, (inputs, targets), steps=30, params=["head"]
    )
    model.eval()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        names = ["head.weight", "head.bias"]
        hessian = explicit_hessian(model, lambda m: F.cross_entropy(m(inputs), targets), names)
    low, high = extremes(hessian)
    assert eigenvalues_of(spectrum) == pytest.approx((low, high), abs=1e-8 * high)
    whole = spectral_density(model, F.cross_entropy, (inputs, targets), steps=5)
    assert np.isfinite(whole.lambda_max)


def test_tied_parameters_stay_tied():
    model = Convolutional()
    batch = torch.randn(4, 1, 4, 4), torch.randint(3, (4,))
    spectral_density(model, F.cross_entropy, batch, steps=3, strategy="rebuild")
    assert model.other.weight is model.mix.weight
    assert model.again is model.mix


def test_recurrent_network():
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.RNN(2, 3, batch_first=True), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.cell(x)[0][:, -1])

    model = Recurrent().double()
    inputs, targets = torch.randn(5, 4, 2).double(), torch.randint(2, (5,))
    hessian = explicit_hessian(model, lambda m: F.cross_entropy(m(inputs), targets))
    spectrum = spectral_density(model, F.cross_entropy, (inputs, targets), steps=len(hessian))
    low, high = extremes(hessian)
    assert eigenvalues_of(spectrum) == pytest.approx((low, high), abs=1e-8 * max(-low, high))
    assert all(
        a is b for a, b in zip(model.cell._flat_weights, model.cell.parameters(), strict=True)
    )


class UnitNorm(torch.autograd.Function):
    """``x / ||x||``, whose backward treats the norm as a constant, like torch's weight_norm."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x / x.norm()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        norm = x.norm().detach()
        return gradient / norm - x * (x * gradient).sum() / norm**3


def test_wrong_second_derivatives_are_refused():
    class Normalized(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))

        def forward(self, x):
            return x @ UnitNorm.apply(self.weight)

    with pytest.raises(ValueError, match="not symmetric"):
        spectral_density(Normalized(), F.cross_entropy, GOOD, steps=9)


def test_batch_norm_without_running_statistics_is_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False))
    with pytest.raises(ValueError, match="1 is a BatchNorm layer without running statistics"):
        spectral_density(model.double(), F.cross_entropy, GOOD)


def test_wrapped_models_are_unwrapped():
    model = mlp((3, 4, 3))
    plain = spectral_density(model, F.cross_entropy, GOOD, steps=5)
    for wrapper in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        wrapped = spectral_density(wrapper, F.cross_entropy, GOOD, steps=5, params=["0", "2"])
        assert np.array_equal(wrapped.alpha, plain.alpha)


def test_modules_with_state_are_restored():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3).double()
            self.calls, self.last = 0, None
            self.register_buffer("total", torch.zeros((), dtype=torch.float64))

        def forward(self, x):
            self.calls += 1
            self.last = x
            self.total += 1
            return self.layer(x)

    model = Counting()
    spectral_density(model, F.cross_entropy, GOOD, steps=3, strategy="rebuild")
    assert (model.calls, model.last, model.total.item()) == (0, None, 0)


def test_targets_are_found_or_given():
    class Pairs(Dataset):
        def __len__(self):
            return 5

        def __getitem__(self, index):
            return GOOD[0][index], int(GOOD[1][index])

    model = mlp((3, 3))
    label = int(GOOD[1][0])
    options = {"classes": [label], "steps": 3}
    read = class_spectra(model, nn.CrossEntropyLoss(), Pairs(), **options)[label]
    given = class_spectra(model, nn.CrossEntropyLoss(), Pairs(), targets=GOOD[1], **options)[label]
    subset = torch.utils.data.Subset(TensorDataset(*GOOD), range(5))
    part = class_spectra(model, nn.CrossEntropyLoss(), subset, **options)[label]
    assert read.alpha[0, 0] == pytest.approx(given.alpha[0, 0])
    assert read.alpha[0, 0] == pytest.approx(part.alpha[0, 0])
    with pytest.raises(ValueError, match="one class per sample"):
        class_spectra(model, nn.CrossEntropyLoss(), Pairs(), targets=GOOD[1][:3])


def test_classes_of_a_loader_are_those_of_its_dataset():
    inputs, targets = classification(30, 3, 3)
    model, criterion = mlp((3, 3)), nn.CrossEntropyLoss()
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=7, shuffle=True)
    expected = class_spectra(model, criterion, (inputs, targets), steps=4)
    found = class_spectra(model, criterion, loader, steps=4)
    assert {c: s.lambda_max for c, s in found.items()} == {
        c: s.lambda_max for c, s in expected.items()
    }
    with pytest.raises(TypeError, match="map-style dataset"):
        class_spectra(model, criterion, list(loader), steps=4)


class Focal(nn.CrossEntropyLoss):
    """A different loss in a subclass of torch's."""

    def forward(self, outputs, targets):
        each = F.cross_entropy(outputs, targets, reduction="none")
        return (1 - torch.exp(-each)).square().mul(each).mean()


class Adjusted(nn.NLLLoss):
    """Adjusted logits; its forward uses the reduction."""

    def forward(self, outputs, targets):
        shift = torch.arange(outputs.shape[1]).to(outputs)
        return F.cross_entropy(outputs + shift, targets, reduction=self.reduction)


class Balanced(nn.CrossEntropyLoss):
    """Torch's loss with class weights that the subclass sets."""

    def __init__(self):
        super().__init__(weight=torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64))


@pytest.mark.parametrize("criterion", [Focal(), Adjusted(), Balanced()])
def test_subclasses_of_torch_losses_use_their_forward(criterion):
    model = mlp((3, 4, 3))
    inputs, targets = classification(13, 3, 3)
    data = [(inputs[:8], targets[:8]), (inputs[8:], targets[8:])]
    hessian = explicit_hessian(model, lambda m: criterion(m(inputs), targets))
    spectrum = spectral_density(model, criterion, data, steps=99)
    low, high = extremes(hessian)
    assert eigenvalues_of(spectrum) == pytest.approx((low, high), abs=1e-8 * max(-low, high))
    assert spectrum.loss == pytest.approx(criterion(model(inputs), targets).item())


def test_a_method_put_on_a_criterion_is_its_forward():
    model = mlp((3, 4, 3))
    criterion = nn.CrossEntropyLoss()
    criterion.forward = Focal().forward
    spectrum = spectral_density(model, criterion, GOOD, steps=2)
    assert spectrum.loss == pytest.approx(Focal()(model(GOOD[0]), GOOD[1]).item())


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (Focal(weight=torch.ones(3).double()), "class weights"),
        (Focal(ignore_index=1), "ignore_index=1.*BatchLoss"),
        (Adjusted(reduction="sum"), "reduction='sum'.*BatchLoss"),
        (Adjusted(reduction="none"), "reduction='none'.*BatchLoss"),
    ],
)
def test_subclasses_whose_mean_is_unknown_are_refused(criterion, message):
    with pytest.raises(ValueError, match=message):
        spectral_density(mlp((3, 3)), criterion, GOOD)


def test_fisher_matrices_of_subclasses():
    model = mlp((3, 4, 3))
    inputs, targets = GOOD
    options = {"steps": 31, "kind": "empirical-fisher"}
    spectrum = spectral_density(model, Adjusted(), GOOD, **options)
    expected = 0
    for x, y in zip(inputs, targets, strict=True):
        gradient = flat_gradient(Adjusted()(model(x[None]), y[None]), model)
        expected = expected + torch.outer(gradient, gradient) / len(targets)
    assert spectrum.lambda_max == pytest.approx(extremes(expected)[1], rel=1e-8)
    with pytest.raises(ValueError, match=r"Focal.*must use self\.reduction"):
        spectral_density(model, Focal(), GOOD, **options)
    with pytest.raises(ValueError, match="overridden forward"):
        spectral_density(model, Focal(), GOOD, kind="mc-fisher")


def flat_gradient(loss, model):
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, model.parameters())])


@pytest.mark.parametrize(
    "criterion",
    [
        *(nn.MSELoss(reduction=reduction) for reduction in ("mean", "sum", "none")),
        *(nn.KLDivLoss(reduction=reduction) for reduction in ("batchmean", "sum", "none")),
    ],
)
def test_fisher_of_one_sample_is_its_gradient_squared(criterion):
    model = nn.Sequential(mlp((3, 4, 5)), nn.LogSoftmax(dim=1))
    batch = torch.randn(1, 3).double(), torch.rand(1, 5).double().softmax(dim=1)
    spectrum = spectral_density(model, criterion, batch, steps=9, kind="empirical-fisher")
    gradient = flat_gradient(criterion(model(batch[0]), batch[1]).sum(), model)
    assert spectrum.lambda_max == pytest.approx(float(gradient @ gradient), rel=1e-8)
    assert spectrum.gradient_norm == pytest.approx(float(gradient.norm()))
