"""Lanczos on operators with known spectra."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsam.curvature import CallableOperator, MatrixOperator, merge, operator_spectrum

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
DTYPES = list(TOLERANCE)


def rotated(eigenvalues: Tensor | list[float], dtype: torch.dtype = torch.float64) -> Tensor:
    """Return a symmetric matrix with the given eigenvalues and random eigenvectors."""
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    basis, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))
    matrix = (basis * values) @ basis.T
    return ((matrix + matrix.T) / 2).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e8, 1e-8])
@pytest.mark.parametrize("probes", [1, 4])
def test_all_eigenvalues_of_a_random_matrix(dtype, scale, probes):
    eigenvalues = scale * torch.linspace(-1, 2, 37, dtype=torch.float64).pow(3).sort().values
    matrix = rotated(eigenvalues, dtype)
    spectrum = operator_spectrum(MatrixOperator(matrix), steps=37, probes=probes)
    norm = float(eigenvalues.abs().max())
    assert spectrum.lambda_max == pytest.approx(float(eigenvalues[-1]), abs=TOLERANCE[dtype] * norm)
    assert spectrum.lambda_min == pytest.approx(float(eigenvalues[0]), abs=TOLERANCE[dtype] * norm)
    for weights in spectrum.weights:
        assert np.sum(weights) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_operator(dtype):
    operator = CallableOperator(torch.zeros_like, dimension=9, dtype=dtype)
    spectrum = operator_spectrum(operator, steps=5, probes=2)
    assert (spectrum.lambda_min, spectrum.lambda_max) == (0, 0)
    assert (spectrum.trace, spectrum.trace_stderr) == (0, 0)
    assert spectrum.order.tolist() == [1, 1]
    below = spectrum.mass_below()
    assert (below.threshold, below.value, below.lower) == (0, 0, 0)
    assert below.upper <= 0.25
    assert np.isfinite(spectrum.density(spectrum.grid())).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [3.0, -0.25])
def test_multiple_of_the_identity(dtype, factor):
    operator = CallableOperator(lambda rows: factor * rows, dimension=11, dtype=dtype)
    spectrum = operator_spectrum(operator, steps=11)
    assert spectrum.order.tolist() == [1]
    assert spectrum.lambda_min == pytest.approx(factor, rel=TOLERANCE[dtype])
    assert spectrum.lambda_max == pytest.approx(factor, rel=TOLERANCE[dtype])
    assert spectrum.trace == pytest.approx(11 * factor, rel=TOLERANCE[dtype])
    assert spectrum.outer_bounds() == pytest.approx((factor, factor), rel=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("steps", [30, 50])
def test_low_rank_positive_operator_has_no_negative_ritz_value(dtype, rank, steps):
    factor = torch.randn(200, rank, dtype=torch.float64)
    matrix = (factor @ factor.T).to(dtype)
    spectrum = operator_spectrum(MatrixOperator(matrix), steps=steps, probes=3)
    largest = float(torch.linalg.eigvalsh(matrix.double())[-1])
    assert spectrum.lambda_max == pytest.approx(largest, rel=TOLERANCE[dtype])
    assert spectrum.lambda_min >= -TOLERANCE[dtype] * largest
    assert spectrum.mass_below().upper <= 0.02
    # the rank plus the null space, plus a few values if rounding splits a cluster
    assert spectrum.order.max() <= rank + 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_values_under_a_rotation(dtype):
    matrix = rotated([1.0] * 120 + [50.0] * 80, dtype)
    spectrum = operator_spectrum(MatrixOperator(matrix), steps=100, probes=2)
    for nodes in spectrum.nodes:
        distance = np.minimum(np.abs(nodes - 1), np.abs(nodes - 50))
        assert distance.max() <= 50 * TOLERANCE[dtype]
    assert spectrum.lambda_min == pytest.approx(1, abs=50 * TOLERANCE[dtype])
    assert spectrum.lambda_max == pytest.approx(50, rel=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_opposite_extremes(dtype):
    inner = torch.linspace(-0.5, 0.5, 148, dtype=torch.float64)
    eigenvalues = torch.cat([inner, torch.tensor([-7.0, 7.0], dtype=torch.float64)])
    spectrum = operator_spectrum(MatrixOperator(rotated(eigenvalues, dtype)), steps=40)
    assert spectrum.lambda_max == pytest.approx(7, rel=TOLERANCE[dtype])
    assert spectrum.lambda_min == pytest.approx(-7, rel=TOLERANCE[dtype])
    assert spectrum.ratio == pytest.approx(1, rel=TOLERANCE[dtype])


def test_one_dimension_and_more_steps_than_dimensions():
    operator = CallableOperator(lambda rows: -2 * rows, dimension=1)
    spectrum = operator_spectrum(operator, steps=80, probes=3)
    assert spectrum.lambda_min == spectrum.lambda_max == -2
    assert spectrum.trace == pytest.approx(-2)
    assert spectrum.trace_stderr == pytest.approx(0, abs=1e-12)
    assert spectrum.settings["steps"] == 80
    assert spectrum.order.tolist() == [1, 1, 1]


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_gauss_quadrature_is_exact_up_to_degree_2m_minus_1(steps):
    matrix = rotated(torch.randn(60, dtype=torch.float64))
    from fastsam.curvature.lanczos.probes import sphere_probes

    start = sphere_probes(60, range(2), seed=3, dtype=torch.float64, device=torch.device("cpu"))
    spectrum = operator_spectrum(MatrixOperator(matrix), steps=steps, probes=2, seed=3)
    for probe in range(2):
        image = start[probe]
        for degree in range(2 * steps + 1):
            moment = float(start[probe] @ image)
            quadrature = float(spectrum.weights[probe] @ spectrum.nodes[probe] ** degree)
            if degree <= 2 * steps - 1:
                assert quadrature == pytest.approx(moment, abs=1e-9 * max(1, abs(moment)))
            else:
                assert abs(quadrature - moment) > 1e-9  # and takes no more steps
            image = matrix @ image


def test_batched_equals_serial():
    matrix = rotated(torch.randn(50, dtype=torch.float64))
    together = operator_spectrum(MatrixOperator(matrix), steps=20, probes=3)
    alone = merge(
        [
            operator_spectrum(MatrixOperator(matrix), steps=20, probe_indices=range(i, i + 1))
            for i in range(3)
        ]
    )
    assert np.allclose(together.alpha, alone.alpha, atol=1e-10)
    assert together.trace == pytest.approx(alone.trace, rel=1e-10)


def test_same_seed_same_bits():
    matrix = rotated(torch.randn(40, dtype=torch.float64))
    runs = [operator_spectrum(MatrixOperator(matrix), steps=30, seed=5) for _ in range(2)]
    assert np.array_equal(runs[0].alpha, runs[1].alpha)
    assert np.array_equal(runs[0].beta, runs[1].beta)
    other = operator_spectrum(MatrixOperator(matrix), steps=30, seed=6)
    assert not np.allclose(runs[0].alpha[0, 0], other.alpha[0, 0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reorthogonalize", ["full", "none"])
@pytest.mark.parametrize("seed", range(3))
def test_every_ritz_interval_holds_an_eigenvalue(dtype, reorthogonalize, seed):
    matrix = rotated(torch.randn(80, dtype=torch.float64).pow(3), dtype)
    eigenvalues = torch.linalg.eigvalsh(matrix.double()).numpy()
    spectrum = operator_spectrum(
        MatrixOperator(matrix),
        steps=40,
        probes=2,
        seed=seed,
        reorthogonalize=reorthogonalize,
    )
    for nodes, residuals in zip(spectrum.nodes, spectrum.residuals, strict=True):
        distance = np.abs(nodes[:, None] - eigenvalues).min(axis=1)
        assert (distance <= residuals).all()
    low, high = spectrum.outer_bounds(0.99)
    assert low <= eigenvalues[0]
    assert high >= eigenvalues[-1]


def test_extremes_without_reorthogonalization():
    inner = torch.linspace(-1, 1, 296, dtype=torch.float64)
    outer = torch.tensor([-9.0, 6.0, 20.0, 50.0], dtype=torch.float64)
    matrix = rotated(torch.cat([inner, outer]))
    spectrum = operator_spectrum(
        MatrixOperator(matrix), steps=120, probes=2, reorthogonalize="none"
    )
    assert spectrum.lambda_max == pytest.approx(50, rel=1e-8)
    assert spectrum.lambda_min == pytest.approx(-9, rel=1e-8)
    copies = [int(np.sum(np.abs(nodes - 50) < 1e-6)) for nodes in spectrum.nodes]
    assert max(copies) > 1  # the known drawback


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(20))
def test_full_reorthogonalization_survives_outliers(dtype, seed):
    """Ten outliers over a tiny bulk: converged Ritz values must not occur again."""
    generator = torch.Generator().manual_seed(seed)
    values = 1e-3 * torch.randn(2000, generator=generator, dtype=torch.float64)
    values[:10] = torch.linspace(5, 50, 10, dtype=torch.float64)
    diagonal = values.to(dtype)
    operator = CallableOperator(lambda rows: rows * diagonal, dimension=2000, dtype=dtype)
    spectrum = operator_spectrum(operator, steps=100, seed=seed)
    assert spectrum.lambda_max == pytest.approx(50, rel=TOLERANCE[dtype])
    assert np.sum(spectrum.nodes[0] > 1) == 10
    with pytest.raises(ValueError, match="must be 'full' or 'none', got 'selective'"):
        operator_spectrum(operator, steps=100, seed=seed, reorthogonalize="selective")


@pytest.mark.parametrize("probes", [1, 3])
def test_products_of_every_kind_of_memory(probes):
    """The argument itself, a transposed view, memory that the operator reuses, a graph."""
    matrix = rotated(torch.randn(11, dtype=torch.float64))
    again = torch.empty(probes, 11, dtype=torch.float64)
    leaf = matrix.clone().requires_grad_()
    products = [
        lambda rows: (matrix @ rows.T).T,
        lambda rows: torch.matmul(rows, matrix, out=again),
        lambda rows: rows @ leaf,
    ]
    largest = float(torch.linalg.eigvalsh(matrix)[-1])
    for product in products:
        operator = CallableOperator(product, dimension=11)
        spectrum = operator_spectrum(operator, steps=11, probes=probes)
        assert spectrum.lambda_max == pytest.approx(largest, abs=1e-8)
    itself = operator_spectrum(
        CallableOperator(lambda rows: rows, dimension=11), steps=5, probes=probes
    )
    assert (itself.lambda_min, itself.lambda_max) == pytest.approx((1, 1))


class Careless:
    """A user's operator without checks."""

    shape, dtype, device = (5, 5), torch.float64, torch.device("cpu")

    def __init__(self, product):
        self.matmat = product


@pytest.mark.parametrize(
    "product", [lambda rows: rows[:1], lambda rows: rows.float(), lambda rows: rows.T]
)
def test_products_of_another_shape_or_dtype_are_refused(product):
    with pytest.raises(ValueError, match="same shape and dtype"):
        operator_spectrum(Careless(product), steps=3, probes=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reorthogonalize", ["full", "none"])
def test_an_operator_that_is_not_symmetric_is_refused(dtype, reorthogonalize):
    skew = torch.randn(40, 40, dtype=dtype)
    matrix = rotated(torch.randn(40, dtype=torch.float64), dtype) + 0.1 * (skew - skew.T)
    operator = CallableOperator(lambda rows: rows @ matrix, dimension=40, dtype=dtype)
    options = {"steps": 20, "probes": 2, "reorthogonalize": reorthogonalize}
    with pytest.raises(ValueError, match="not symmetric"):
        operator_spectrum(operator, **options)
    operator_spectrum(operator, **options, verify_symmetry=False)


def test_a_product_with_nan_is_an_error():
    calls = []

    def product(rows: Tensor) -> Tensor:
        calls.append(1)
        return rows * (float("nan") if len(calls) == 3 else torch.arange(1.0, 8.0))

    operator = CallableOperator(product, dimension=7, dtype=torch.float32)
    with pytest.raises(FloatingPointError, match="step 3"):
        operator_spectrum(operator, steps=7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"probes": 0}, "probes must be at least 1"),
        ({"reorthogonalize": "sometimes"}, "must be 'full' or 'none', got 'sometimes'"),
        ({"reorthogonalize": "selective"}, "must be 'full' or 'none', got 'selective'"),
        ({"tolerance": -1.0}, "tolerance"),
        ({"basis": ""}, "basis must be 'device', 'host' or the path of a folder"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        operator_spectrum(MatrixOperator(torch.eye(3)), **options)


def test_bad_matrices():
    with pytest.raises(ValueError, match="square"):
        MatrixOperator(torch.ones(2, 3))
    with pytest.raises(ValueError, match="symmetric"):
        MatrixOperator(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="NaN"):
        MatrixOperator(torch.full((2, 2), torch.nan))
