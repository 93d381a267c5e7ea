"""The estimated diagonal against explicit matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from fastsam import curvature_operator
from fastsam.curvature import CallableOperator, MatrixOperator, diagonal
from fastsam.curvature.estimators.diagonal import known_diagonal
from fastsam.curvature.estimators.products import checked_products
from fastsam.curvature.estimators.sketch import krylov_sketch
from python_tests.curvature.oracles import classification, explicit_hessian, mlp

N = 150


def matrix_of(values: np.ndarray, seed: int) -> Tensor:
    """Return a symmetric matrix with these eigenvalues."""
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))
    matrix = (rotation * values) @ rotation.T
    return torch.from_numpy((matrix + matrix.T) / 2)


SPECTRA = {
    "power law": 1 / np.arange(1, N + 1.0),
    "normal": np.random.default_rng(0).normal(size=N),
    "opposite extremes": np.concatenate([[7.0, -7.0], np.linspace(-1, 1, N - 2)]),
}


def coverage(name: str, seeds: int) -> float:
    """Return the share of entries and seeds whose interval holds the entry."""
    matrix = matrix_of(SPECTRA[name], 0)
    operator, exact = MatrixOperator(matrix), matrix.diagonal()
    covers = []
    for seed in range(seeds):
        low, high = diagonal(operator, products=40, seed=seed).interval(0.95)
        covers.append(((low <= exact) & (exact <= high)).double().mean())
    return float(torch.stack(covers).mean())


@pytest.mark.parametrize("name", SPECTRA)
def test_error_bars_cover(name):
    assert 0.92 <= coverage(name, 10) <= 0.98


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECTRA)
def test_error_bars_cover_over_200_seeds(name):
    assert 0.93 <= coverage(name, 200) <= 0.97


def test_known_part_and_rest_add_up(seed):
    matrix = matrix_of(SPECTRA["normal"], seed)
    with (
        checked_products(
            MatrixOperator(matrix), name="", products=20, seed=seed, progress=False
        ) as operator,
        krylov_sketch(operator, products=20, seed=seed) as known,
    ):
        rest = known.complement(known.complement(matrix).T)
        assert len(known.basis) > 1
        assert torch.allclose(known_diagonal(known) + rest.diagonal(), matrix.diagonal())


def test_the_sketch_reduces_the_error(seed):
    matrix = matrix_of(SPECTRA["power law"] ** 2, seed)
    found = diagonal(MatrixOperator(matrix), products=40, seed=seed)
    signs = torch.randint(2, (40, N), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    plain = (signs * (signs.double() @ matrix)).mean(dim=0)
    error = (found.values - matrix.diagonal()).norm()
    assert error < (plain - matrix.diagonal()).norm() / 4


def test_enough_products_are_exact():
    values = torch.linspace(-1, 1, 80, dtype=torch.float64)
    for products in (80, 200):
        found = diagonal(MatrixOperator(torch.diag(values)), products=products)
        assert torch.equal(found.values, values)
        assert found.stderr.max() == 0
        assert found.degrees == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_one_dimension_and_rank_one(dtype, seed):
    zero = diagonal(CallableOperator(torch.zeros_like, dimension=90, dtype=dtype))
    assert not zero.values.any()
    assert not zero.stderr.any()
    one = diagonal(CallableOperator(lambda rows: -3 * rows, dimension=1, dtype=dtype))
    assert one.values.tolist() == [-3]
    vector = torch.randn(90, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    outer = CallableOperator(
        lambda rows: (rows @ vector)[:, None] * vector, dimension=90, dtype=dtype
    )
    found = diagonal(outer, seed=seed)
    assert torch.allclose(found.values.double(), vector.double().square(), atol=1e-4)
    assert float(found.stderr.max()) < 1e-4


def test_entries_by_parameter_name(seed):
    torch.manual_seed(seed)
    model, (x, y) = mlp((4, 9, 5)), classification(20, 4, 5)
    criterion = nn.CrossEntropyLoss()
    exact = explicit_hessian(model, lambda network: criterion(network(x), y)).diagonal()
    operator = curvature_operator(model, criterion, (x, y))
    found = diagonal(operator, products=60, seed=seed)
    assert {name: part.shape for name, part in found.by_name.items()} == {
        name: value.shape for name, value in model.named_parameters()
    }
    assert torch.equal(operator.join(found.by_name), found.values)
    assert torch.equal(operator.join(found.stderr_by_name), found.stderr)
    scores = (found.values - exact) / found.stderr
    assert 0.7 < float(scores.square().mean().sqrt()) < 1.5


def test_interval_is_that_of_student():
    found = diagonal(MatrixOperator(matrix_of(SPECTRA["normal"], 1)), products=12)
    half = scipy.stats.t.ppf(0.95, found.degrees) * found.stderr
    low, high = found.interval(0.9)
    assert torch.allclose(high - low, 2 * half)
    assert torch.allclose((high + low) / 2, found.values)


def test_wrong_arguments():
    operator = MatrixOperator(torch.eye(300, dtype=torch.float64))
    with pytest.raises(TypeError, match="expected an operator"):
        diagonal(torch.eye(3))
    with pytest.raises(ValueError, match="products must be at least 2"):
        diagonal(operator, products=1)
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        diagonal(CallableOperator(lambda rows: rows / 0, dimension=300))
    found = diagonal(operator)
    with pytest.raises(TypeError, match="no parameter names"):
        _ = found.by_name
    with pytest.raises(ValueError, match="confidence must be between 0 and 1"):
        found.interval(1.0)
