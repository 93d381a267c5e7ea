"""Stochastic estimators against explicit matrices: error, coverage of error bars, hostile input."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from fastsam import curvature_operator
from fastsam.curvature import (
    CallableOperator,
    Estimate,
    Operator,
    diagonal,
    frobenius_norm,
    log_determinant,
    operator_spectrum,
    trace,
    trace_of,
)
from fastsam.curvature.estimators import sketch
from fastsam.curvature.lanczos.quadrature import Quadrature
from fastsam.curvature.student import student_quantile
from python_tests.curvature.oracles import classification, explicit_hessian, mlp

N = 200
SAMPLED = (trace, frobenius_norm)
"""Estimators with the option ``products``."""


def spectra(generator: np.random.Generator) -> dict[str, np.ndarray]:
    uniform = generator.uniform
    return {
        "power law": 1 / np.arange(1, N + 1.0),
        "normal": generator.normal(size=N),
        "outliers": np.concatenate([uniform(1, 10, 7), 0.1 * generator.normal(size=N - 7)]),
        "opposite extremes": np.concatenate([[7.0, -7.0], uniform(-1, 1, N - 2)]),
    }


def diagonal_operator(values: np.ndarray) -> CallableOperator:
    """Return a diagonal operator, which is general because all random vectors are isotropic."""
    tensor = torch.from_numpy(values)
    return CallableOperator(lambda rows: rows * tensor, dimension=len(values))


def rotated(values: np.ndarray, seed: int) -> Tensor:
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))
    matrix = (rotation * values) @ rotation.T
    return torch.from_numpy((matrix + matrix.T) / 2)


Case = tuple[Callable[[np.ndarray], float], Callable[[Operator, int], Estimate]]
ESTIMATORS: dict[str, Case] = {
    "trace": (np.sum, lambda a, seed: trace(a, products=30, seed=seed)),
    "hutchinson": (
        np.sum,
        lambda a, seed: trace(a, products=10, method="hutchinson", seed=seed),
    ),
    "frobenius norm": (
        lambda values: float(np.linalg.norm(values)),
        lambda a, seed: frobenius_norm(a, products=30, seed=seed),
    ),
    "log-determinant": (
        lambda values: float(np.log(values + 10).sum()),
        lambda a, seed: log_determinant(a, shift=10.0, steps=15, probes=2, seed=seed),
    ),
    "exponential": (
        lambda values: float(np.exp(-values / 3).sum()),
        lambda a, seed: trace_of(
            a, lambda x: np.exp(-x / 3), alternating=True, steps=15, probes=2, seed=seed
        ),
    ),
}


def coverage(values: np.ndarray, case: Case, seeds: int) -> float:
    exact, estimate = case
    operator, truth = diagonal_operator(values), exact(values)
    limits = [estimate(operator, seed).interval(0.95) for seed in range(seeds)]
    return float(np.mean([low <= truth <= high for low, high in limits]))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", ["power law", "outliers"])
def test_error_bars_cover(name, estimator):
    values = spectra(np.random.default_rng(0))[name]
    assert coverage(values, ESTIMATORS[estimator], 30) >= 0.85


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", spectra(np.random.default_rng(0)))
def test_error_bars_cover_over_200_seeds(name, estimator):
    values = spectra(np.random.default_rng(0))[name]
    assert coverage(values, ESTIMATORS[estimator], 200) >= 0.9


def rms(operator: Operator, exact: float, method: str, products: int, seeds: int = 20) -> float:
    found = [
        trace(operator, products=products, method=method, seed=seed).value for seed in range(seeds)
    ]
    return float(np.sqrt(np.mean((np.array(found) - exact) ** 2)))


def test_sketch_reduces_the_error_where_few_eigenvalues_dominate(seed):
    values = 1 / np.arange(1, 401.0) ** 1.5
    operator = diagonal_operator(values)
    plain = rms(operator, values.sum(), "hutchinson", 60)
    assert rms(operator, values.sum(), "hutch++", 60) < plain / 4


def test_sketch_stays_small_where_it_holds_little():
    values = np.random.default_rng(0).normal(size=1000)
    found = trace(diagonal_operator(values), products=60)
    assert found.degrees >= 60 - 15 - 1


def test_trace_is_unbiased_whether_the_sketch_grows_or_stops():
    for name in ("outliers", "normal"):
        values = spectra(np.random.default_rng(0))[name]
        found = [trace(diagonal_operator(values), products=12, seed=seed) for seed in range(60)]
        errors = np.array([one.value for one in found]) - values.sum()
        assert abs(errors.mean()) < 4 * errors.std() / math.sqrt(len(errors)), name


def test_square_of_the_frobenius_norm_is_unbiased():
    values = np.random.default_rng(0).normal(size=20)
    operator = diagonal_operator(values)
    found = [frobenius_norm(operator, products=16, seed=seed).value ** 2 for seed in range(100)]
    errors = np.array(found) - np.sum(values**2)
    assert abs(errors.mean()) < 4 * errors.std() / math.sqrt(len(errors))


def test_curvature_of_a_model(seed):
    torch.manual_seed(seed)
    model, (x, y) = mlp((4, 9, 5)), classification(20, 4, 5)
    criterion = nn.CrossEntropyLoss()
    hessian = explicit_hessian(model, lambda network: criterion(network(x), y))
    operator = curvature_operator(model, criterion, (x, y))
    for found, exact in (
        (trace(operator, seed=seed), float(hessian.trace())),
        (frobenius_norm(operator, seed=seed), float(hessian.norm())),
    ):
        assert 0 < found.stderr < 0.1 * abs(exact)
        assert abs(found.value - exact) < 5 * found.stderr
    ggn = curvature_operator(model, criterion, (x, y), kind="ggn")
    exact = float(torch.logdet(ggn.to_dense() + 0.1 * torch.eye(ggn.shape[0]).double()))
    found = log_determinant(ggn, shift=0.1, lowest=0.0, steps=20, seed=seed)
    assert math.isfinite(found.quadrature_error)
    assert abs(found.value - exact) < 5 * found.stderr


@pytest.mark.parametrize("n", [1, 2, 7, 60])
def test_enough_products_are_exact(n, seed):
    matrix = rotated(np.random.default_rng(seed).normal(size=n), seed)
    calls: list[int] = []

    def product(rows: Tensor) -> Tensor:
        calls.append(len(rows))
        return rows @ matrix

    operator = CallableOperator(product, dimension=n)
    values = torch.linalg.eigvalsh(matrix)
    assert trace(operator) == pytest.approx((float(values.sum()), 0, 0, math.inf))
    assert sum(calls) == n
    assert frobenius_norm(operator) == pytest.approx((float(values.norm()), 0, 0, math.inf))
    exact = float((values + 10).log().sum())
    assert log_determinant(operator, shift=10.0) == pytest.approx((exact, 0, 0, math.inf))
    assert trace_of(operator, np.exp).value == pytest.approx(float(values.exp().sum()))
    assert sum(calls) == 4 * n


@pytest.mark.parametrize("method", ["hutch++", "hutchinson"])
@pytest.mark.parametrize("products", [2, 3, 4, 17])
def test_number_of_products(products, method, seed):
    calls: list[int] = []

    def product(rows: Tensor) -> Tensor:
        calls.append(len(rows))
        return 3 * rows

    found = trace(CallableOperator(product, dimension=50), products=products, method=method)
    assert sum(calls) == products
    assert found.value == pytest.approx(150)
    assert found.stderr == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_and_rank_one(dtype, seed):
    vector = torch.randn(90, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    one = CallableOperator(
        lambda rows: (rows @ vector)[:, None] * vector, dimension=90, dtype=dtype
    )
    zero = CallableOperator(torch.zeros_like, dimension=90, dtype=dtype)
    square = float(vector.double().square().sum())
    for estimate in SAMPLED:
        assert estimate(zero)[:2] == (0.0, 0.0)
        assert estimate(one, seed=seed).value == pytest.approx(square, rel=1e-5)
        assert estimate(one, seed=seed).stderr < 1e-5 * square
    assert log_determinant(zero, shift=2.0, lowest=0.0, steps=5).value == pytest.approx(
        90 * math.log(2), rel=1e-5
    )


def test_same_seed_same_numbers():
    operator = diagonal_operator(np.linspace(0, 1, 100) ** 5)
    for estimate in (trace, frobenius_norm):
        assert estimate(operator, seed=3) == estimate(operator, seed=3)
        assert estimate(operator, seed=3) != estimate(operator, seed=4)


@pytest.mark.parametrize("estimate", [*SAMPLED, log_determinant])
def test_wrong_arguments(estimate):
    operator = diagonal_operator(np.ones(500))
    with pytest.raises(TypeError, match=r"expected an operator .* got Tensor; wrap a matrix"):
        estimate(torch.eye(3))
    with pytest.raises(ValueError, match="seed must be at least 0"):
        estimate(operator, seed=-1)
    if estimate is log_determinant:
        return
    with pytest.raises(TypeError, match="products must be an integer"):
        estimate(operator, products=2.5)
    for products in (0, 1):
        with pytest.raises(ValueError, match="products must be at least 2"):
            estimate(operator, products=products)


def test_unknown_method():
    with pytest.raises(ValueError, match=r"method must be one of hutch\+\+, hutchinson, got 'x'"):
        trace(diagonal_operator(np.ones(5)), method="x")


@pytest.mark.parametrize("estimate", [*SAMPLED, log_determinant])
@pytest.mark.parametrize("n", [5, 500])
@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_products_that_are_not_finite(factor, n, estimate):
    operator = CallableOperator(lambda rows: factor * rows, dimension=n)
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        estimate(operator)


@pytest.mark.parametrize("estimate", [*SAMPLED, log_determinant])
def test_operators_that_are_not_symmetric(estimate, seed):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(200, 200, dtype=torch.float64, generator=generator)
    with pytest.raises(ValueError, match="not symmetric"):
        estimate(CallableOperator(lambda rows: rows @ matrix, dimension=200))


@pytest.mark.parametrize("n", [20, 400])
def test_log_determinant_refuses_what_is_not_positive_definite(n):
    for values in (np.linspace(-1, 1, n), np.linspace(0, 1, n) * (np.arange(n) % 2)):
        lowest = float(values.min())
        with pytest.raises(ValueError, match=r"not positive definite .* pass a shift above"):
            log_determinant(diagonal_operator(values), lowest=lowest)
    with pytest.raises(ValueError, match="not positive definite"):
        log_determinant(diagonal_operator(np.linspace(-1, 1, n)), shift=0.9)
    with pytest.raises(ValueError, match="beyond rounding"):
        log_determinant(diagonal_operator(np.repeat([1e-17, 1.0], n // 2)))
    with pytest.raises(ValueError, match=r"not finite at the eigenvalue .* H \+ shift I"):
        trace_of(diagonal_operator(np.linspace(-1, 1, n)), np.log)


@pytest.mark.parametrize("n", [20, 400])
def test_lowest_must_be_a_lower_bound(n):
    """Also where so many products are allowed that all eigenvalues are exact."""
    operator = diagonal_operator(np.linspace(-1, 1, n))
    message = "lowest must be at most the smallest eigenvalue, got 0"
    for alternating in (True, False):
        with pytest.raises(ValueError, match=message):
            trace_of(operator, np.exp, lowest=0.0, alternating=alternating)
    with pytest.raises(ValueError, match=message):
        log_determinant(operator, shift=5.0, lowest=0.0)
    expected = float(np.log(np.linspace(-1, 1, n) + 5).sum())
    assert log_determinant(operator, shift=5.0, lowest=-1.0).value == pytest.approx(
        expected, rel=0.1
    )


def test_a_sketch_that_does_not_fit_names_options_that_exist(monkeypatch):
    monkeypatch.setattr(sketch, "plan_bytes", lambda device, limit: 10)
    for estimate in (*SAMPLED, diagonal):
        with pytest.raises(ValueError, match="pass fewer products") as caught:
            estimate(diagonal_operator(np.ones(N)))
        has_method = "method" in inspect.signature(estimate).parameters
        assert ("method='hutchinson'" in str(caught.value)) == has_method


FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "log": lambda x: np.log(x + 1e-3),
    "square root": np.sqrt,
    "inverse": lambda x: 1 / (x + 1e-2),
    "exponential": lambda x: np.exp(-5 * x),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("steps", [1, 2, 5, 12])
def test_bounds_of_the_quadrature_always_hold(steps, function):
    f = FUNCTIONS[function]
    for seed in range(10):
        generator = np.random.default_rng(seed)
        values = generator.uniform(0, 1, 60) ** generator.integers(1, 9)
        spectrum = operator_spectrum(diagonal_operator(values), steps=steps, seed=seed)
        rule = Quadrature(spectrum.alpha[0], spectrum.beta[0], spectrum.resolution)
        # The exact integral, by a run that exhausts the space.
        whole = operator_spectrum(diagonal_operator(values), steps=60, seed=seed)
        exact = float(whole.weights[0] @ f(np.maximum(whole.nodes[0], 0)))
        value, error = rule.bracket(f, 0.0)
        assert abs(value - exact) <= error + 1e-12 * abs(exact)


def test_bounds_narrow_with_the_steps():
    operator = diagonal_operator(np.linspace(0, 1, 500) ** 3)
    errors = [
        log_determinant(operator, shift=1e-2, lowest=0.0, steps=steps, probes=2).quadrature_error
        for steps in (5, 10, 20, 40)
    ]
    assert all(later < earlier / 3 for earlier, later in pairwise(errors))


def test_quantiles_are_those_of_scipy():
    for degrees in (1, 2, 3, 4, 9, 30, 201, 1000, 2.5e5, 1e9):
        for confidence in (0.5, 0.9, 0.95, 0.999):
            expected = scipy.stats.t.ppf(0.5 + confidence / 2, degrees)
            assert student_quantile(confidence, degrees) == pytest.approx(expected, rel=1e-9)
    assert student_quantile(0.95, math.inf) == pytest.approx(1.959964, abs=1e-6)


def test_interval_of_an_estimate():
    low, high = Estimate(1.0, 0.5, quadrature_error=0.1, degrees=4).interval(0.9)
    half = 0.1 + scipy.stats.t.ppf(0.95, 4) * 0.4
    assert (low, high) == pytest.approx((1 - half, 1 + half))
    for confidence in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="confidence must be between 0 and 1"):
            Estimate(1.0, 0.5).interval(confidence)
    assert Estimate(1.0, math.inf, math.inf).interval() == (-math.inf, math.inf)
