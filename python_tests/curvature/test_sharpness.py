"""Sharpness: closed forms on quadratics, invariances, and hostile input."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastsam.curvature import (
    BatchLoss,
    average_sharpness,
    loss_surface,
    m_sharpness,
    worst_case_sharpness,
)
from python_tests.curvature.landscapes import (
    QUADRATIC,
    everything,
    increase,
    network,
    regression,
    same,
    taylor,
    trust_region,
)
from python_tests.curvature.oracles import classification, mlp

MEASURES = [
    lambda *arguments, **options: m_sharpness(*arguments, m=8, **options),
    worst_case_sharpness,
    average_sharpness,
]


def quadratic(features: int = 5, samples: int = 14):
    model, batch = regression(features, samples)
    return model, batch, *taylor(model, batch)


@pytest.mark.parametrize("adaptive", [False, True])
def test_m_sharpness_of_a_quadratic(adaptive):
    """Chunks of 4, 4 and 2 of a batch of 10, and of 4 of the next: each its own quadratic."""
    model, (inputs, targets) = regression(5, 14)
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=10)
    rho, expected, losses = 0.3, 0.0, 0.0
    scale = model.weight.detach()[0].abs() if adaptive else torch.ones(5, dtype=torch.float64)
    for rows in (range(4), range(4, 8), range(8, 10), range(10, 14)):
        loss, gradient, hessian = taylor(model, (inputs[rows], targets[rows]))
        step = rho * scale**2 * gradient / (scale * gradient).norm()
        expected += len(rows) * increase(gradient, hessian, step) / 14
        losses += len(rows) * loss / 14
    found = m_sharpness(model, QUADRATIC, loader, rho=rho, m=4, adaptive=adaptive)
    assert found.value == pytest.approx(expected, rel=1e-10)
    assert found.loss == pytest.approx(losses, rel=1e-12)
    assert (len(found.increases), found.measure, found.adaptive) == (4, "m", adaptive)
    assert found.is_lower_bound
    assert found.stderr is None


def test_chunks_of_a_batch_loss_are_its_batches():
    model, (inputs, targets) = regression(5, 14)
    batches = [(inputs[:8], targets[:8]), (inputs[8:], targets[8:])]
    summed = BatchLoss(lambda m, b: ((m(b[0]) - b[1]).square().sum(), len(b[1])))
    found = m_sharpness(model, summed, batches, rho=0.2, m=None)
    same_chunks = m_sharpness(model, QUADRATIC, batches, rho=0.2, m=8)
    assert found.value == pytest.approx(same_chunks.value, rel=1e-12)
    with pytest.raises(ValueError, match="m requires a criterion"):
        m_sharpness(model, summed, batches, rho=0.2, m=4)


def test_chunks_whose_targets_are_ignored_do_not_count():
    model = mlp((3, 5, 4))
    inputs, targets = classification(12, 3, 4)
    ignored = targets.clone()
    ignored[4:8] = -100
    kept = torch.cat([inputs[:4], inputs[8:]]), torch.cat([targets[:4], targets[8:]])
    criterion = nn.CrossEntropyLoss()
    found = m_sharpness(model, criterion, (inputs, ignored), rho=0.1, m=4)
    assert found.value == pytest.approx(m_sharpness(model, criterion, kept, rho=0.1, m=4).value)
    with pytest.raises(ValueError, match="no chunk has a positive weight"):
        m_sharpness(model, criterion, (inputs, torch.full_like(targets, -100)), rho=0.1, m=4)


@pytest.mark.parametrize(("adaptive", "rho"), [(False, 0.7), (True, 0.1)])
def test_the_worst_case_of_a_quadratic_is_the_trust_region_solution(adaptive, rho):
    model, batch, loss, gradient, hessian = quadratic()
    scale = model.weight.detach()[0].abs() if adaptive else torch.ones(5, dtype=torch.float64)
    exact = trust_region(scale * gradient, scale[:, None] * hessian * scale, rho)
    found = worst_case_sharpness(
        model, QUADRATIC, batch, rho=rho, adaptive=adaptive, steps=30, restarts=1
    )
    assert found.value <= exact * (1 + 1e-9)
    assert found.value == pytest.approx(exact, rel=1e-2)
    assert found.loss == pytest.approx(loss)
    step = found.perturbation["weight"][0]
    assert float((step / scale).norm()) <= rho * (1 + 1e-12)
    assert increase(gradient, hessian, step) == pytest.approx(found.value)
    assert len(found.increases) == 60
    assert max(found.increases) == found.value


def test_the_worst_case_at_a_minimum_is_the_largest_eigenvalue():
    """There the gradient is zero: the ascent starts from a random point."""
    model = nn.Linear(4, 1, bias=False).double()
    inputs = torch.randn(9, 4, dtype=torch.float64)
    batch = inputs, (inputs @ model.weight.detach().T)
    top = float(torch.linalg.eigvalsh(2 * inputs.T @ inputs / 9)[-1])
    found = worst_case_sharpness(model, QUADRATIC, batch, rho=0.3, steps=50)
    assert found.value <= 0.3**2 / 2 * top * (1 + 1e-9)
    assert found.value == pytest.approx(0.3**2 / 2 * top, rel=0.05)
    assert m_sharpness(model, QUADRATIC, batch, rho=0.3, m=3).value == 0


def test_the_worst_case_grows_with_its_steps():
    model, batch = mlp((3, 5, 4)), classification(20, 3, 4)
    values = [
        worst_case_sharpness(model, F.cross_entropy, batch, rho=1.0, steps=steps).value
        for steps in (1, 4, 12)
    ]
    assert values == sorted(values)
    assert values[0] < values[-1]
    one_step = m_sharpness(model, F.cross_entropy, batch, rho=1.0, m=20)
    assert values[0] == pytest.approx(max(one_step.value, 0), rel=1e-9)


def test_the_worst_case_at_a_maximum_is_zero():
    model = nn.Linear(2, 1, bias=False).double()
    batch = torch.eye(2, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
    with torch.no_grad():
        model.weight.zero_()
    found = worst_case_sharpness(
        model, lambda outputs, _: -outputs.square().mean(), batch, rho=0.5, steps=3
    )
    assert found.value == 0
    assert not found.perturbation["weight"].any()
    assert max(found.increases) <= 0


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_average_of_a_quadratic(adaptive, seed):
    model, batch, loss, _, hessian = quadratic()
    scale = model.weight.detach()[0].abs() if adaptive else torch.ones(5, dtype=torch.float64)
    scaled = scale[:, None] * hessian * scale
    rho, samples = 0.7, 100
    found = average_sharpness(
        model, QUADRATIC, batch, rho=rho, samples=samples, adaptive=adaptive, seed=seed
    )
    mean = rho**2 / 2 * float(scaled.trace()) / 5
    # The variance of u'Au / 2 for Gaussian u of variance s^2 is s^4 ||A||_F^2 / 2.
    stderr = rho**2 / 5 * float(scaled.norm()) / math.sqrt(2 * samples)
    assert abs(found.value - mean) < 4.5 * stderr
    assert found.stderr == pytest.approx(stderr, rel=0.6)
    assert not found.is_lower_bound
    assert found.loss == pytest.approx(loss)
    # Exactly: each pair is u'Au / 2, without the gradient.
    generator = torch.Generator().manual_seed(seed)
    for value in found.increases[:5]:
        u = rho / math.sqrt(5) * torch.randn(5, dtype=torch.float64, generator=generator)
        assert value == pytest.approx(float(u @ scaled @ u) / 2, rel=1e-9)


def test_the_interval_of_an_average():
    from scipy.stats import ttest_1samp

    model, batch, *_ = quadratic()
    found = average_sharpness(model, QUADRATIC, batch, rho=0.3, samples=6)
    expected = ttest_1samp(found.increases, 0).confidence_interval(0.9)
    assert found.interval(0.9) == pytest.approx((expected.low, expected.high))
    with pytest.raises(ValueError, match="confidence must be between"):
        found.interval(1.0)
    with pytest.raises(ValueError, match="'m' has no standard error"):
        m_sharpness(model, QUADRATIC, batch, rho=0.3, m=2).interval()


@pytest.mark.parametrize("measure", MEASURES)
def test_adaptive_sharpness_does_not_depend_on_the_scale_of_layers(measure):
    batch = classification(24, 3, 4)
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4)).double()
    values = {}
    for scaled in (False, True):
        if scaled:
            with torch.no_grad():
                model[0].weight *= 5
                model[0].bias *= 5
                model[2].weight /= 5
        for adaptive in (False, True):
            found = measure(model, F.cross_entropy, batch, rho=0.5, adaptive=adaptive)
            values[scaled, adaptive] = found.value
    assert values[True, True] == pytest.approx(values[False, True], rel=1e-8)
    assert values[True, False] != pytest.approx(values[False, False], rel=1e-2)


@pytest.mark.parametrize("measure", MEASURES)
def test_the_model_does_not_change(measure):
    model = network()
    loader = DataLoader(
        TensorDataset(*classification(20, 3, 4, dtype=torch.float32)), batch_size=8, shuffle=True
    )
    before = everything(model)
    found = measure(model, F.cross_entropy, loader, rho=0.1)
    assert same(before, everything(model))
    again = measure(model, F.cross_entropy, loader, rho=0.1)
    assert found.increases == again.increases
    with pytest.raises(ZeroDivisionError):
        measure(model, lambda outputs, targets: 1 / 0, loader, rho=0.1)
    assert same(before, everything(model))


def test_chosen_parameters_and_a_surface_along_the_worst_case():
    model, batch = mlp((3, 5, 4)), classification(20, 3, 4)
    found = worst_case_sharpness(model, F.cross_entropy, batch, rho=0.5, params=["2"])
    assert sorted(found.perturbation) == ["2.bias", "2.weight"]
    surface = loss_surface(model, F.cross_entropy, batch, found.perturbation, points=3)
    assert surface.losses[-1] - surface.loss == pytest.approx(found.value)
    single = average_sharpness(
        model, F.cross_entropy, batch, rho=0.5, params=["2"], dtype=torch.float32, seed=3
    )
    double = average_sharpness(model, F.cross_entropy, batch, rho=0.5, params=["2"], seed=3)
    assert single.value == pytest.approx(double.value, rel=1e-3)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"rho": 0}, ValueError, "rho must be above 0, got 0"),
        ({"rho": -0.1}, ValueError, "rho must be in"),
        ({"rho": math.nan}, ValueError, "rho must be in"),
        ({"rho": math.inf}, ValueError, "rho must be in"),
        ({"rho": "0.1"}, TypeError, "rho must be a number"),
        ({"params": ["9"]}, ValueError, "no parameter or layer named '9'"),
        ({"data": []}, ValueError, "data has no batch"),
        ({"data": (torch.zeros(0, 3), torch.zeros(0).long())}, ValueError, "with samples"),
        ({"data": (torch.zeros(2, 3), torch.full((2,), -100))}, ValueError, "weight 0|no chunk"),
        (
            {"data": (torch.full((9, 3), math.nan), torch.zeros(9).long())},
            FloatingPointError,
            "NaN|nan",
        ),
    ],
)
def test_hostile_arguments(measure, options, error, match):
    options = {"rho": 0.1, "data": classification(20, 3, 4)} | options
    with pytest.raises(error, match=match):
        measure(mlp((3, 5, 4)), F.cross_entropy, options.pop("data"), **options)


def test_more_hostile_arguments():
    model, batch = mlp((3, 5, 4)), classification(20, 3, 4)
    with pytest.raises(ValueError, match="m must be at least 1"):
        m_sharpness(model, F.cross_entropy, batch, rho=0.1, m=0)
    with pytest.raises(ValueError, match="of a batch have no common first dimension"):
        m_sharpness(
            model,
            lambda outputs, _: outputs.square().mean(),
            (batch[0], torch.zeros(3)),
            rho=1,
            m=2,
        )
    with pytest.raises(ValueError, match="steps must be at least 1"):
        worst_case_sharpness(model, F.cross_entropy, batch, rho=0.1, steps=0)
    with pytest.raises(ValueError, match="restarts must be at least 0"):
        worst_case_sharpness(model, F.cross_entropy, batch, rho=0.1, restarts=-1)
    with pytest.raises(ValueError, match="samples must be at least 2"):
        average_sharpness(model, F.cross_entropy, batch, rho=0.1, samples=1)
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
    with pytest.raises(ValueError, match="all chosen parameters are zero"):
        average_sharpness(model, F.cross_entropy, batch, rho=0.1, adaptive=True)

    def exploding(outputs, targets):
        return F.cross_entropy(outputs, targets) + outputs.square().sum().exp()

    with pytest.raises(FloatingPointError, match="lower rho"):
        average_sharpness(mlp((3, 5, 4)), exploding, batch, rho=1e4)
