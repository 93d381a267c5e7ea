"""Eigenpairs against dense factorizations, for spectra of every form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsam.curvature import CallableOperator, ConvergenceWarning, MatrixOperator, eigenpairs

N = 150
ENDS = ("largest", "smallest", "magnitude", "ends")


def spectra(generator: np.random.Generator) -> dict[str, NDArray[np.float64]]:
    uniform = generator.uniform
    return {
        "normal": generator.normal(size=N),
        "uniform": uniform(-1, 1, N),
        "outliers": np.concatenate([0.1 * generator.normal(size=N - 7), uniform(1, 10, 7)]),
        "one cluster": np.concatenate(
            [1 + 1e-6 * generator.normal(size=5), uniform(0, 0.9, N - 5)]
        ),
        "every value twice": np.repeat(uniform(-1, 1, N // 2), 2),
        "triple extremes": np.concatenate([[5.0] * 3, [-4.0] * 3, uniform(-3, 4, N - 6)]),
        "rank 30": np.concatenate([np.zeros(N - 30), uniform(0.5, 3, 30)]),
        "zero": np.zeros(N),
        "a multiple of the identity": np.full(N, -2.5),
        "two values": np.repeat([1.0, 50.0], N // 2),
        "opposite extremes": np.concatenate([[7.0, -7.0], uniform(-1, 1, N - 2)]),
        "geometric": 0.7 ** np.arange(N),
        "scaled up": 1e8 * generator.normal(size=N),
        "scaled down": 1e-8 * generator.normal(size=N),
    }


def rotated(values: NDArray[np.float64], generator: np.random.Generator) -> Tensor:
    rotation, _ = np.linalg.qr(generator.normal(size=(len(values), len(values))))
    matrix = (rotation * values) @ rotation.T
    return torch.from_numpy((matrix + matrix.T) / 2)


def best(matrix: Tensor, k: int, which: str) -> Tensor:
    values = torch.linalg.eigvalsh(matrix.double())
    if which == "ends":
        return torch.stack([values.flip(0), values], dim=1).flatten()[:k]
    key = {"largest": -values, "smallest": values, "magnitude": -values.abs()}[which]
    return values[key.argsort(stable=True)[:k]]


@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("name", spectra(np.random.default_rng(0)))
def test_pairs_are_those_of_a_dense_factorization(name, k, which, seed):
    generator = np.random.default_rng(seed)
    matrix = rotated(spectra(generator)[name], generator)
    norm = float(torch.linalg.eigvalsh(matrix).abs().max())
    # Gaps of 1e-20 between the smallest values of the geometric spectrum need a larger subspace.
    subspace = 60 if name == "geometric" else None
    options = {"which": which, "tol": 1e-9, "subspace": subspace, "seed": seed}
    found = eigenpairs(MatrixOperator(matrix), k, **options)
    true = (found.vectors @ matrix - found.values[:, None] * found.vectors).norm(dim=1)
    assert found.converged
    assert float(true.max()) <= 1.01e-9 * norm + 1e-14 * norm
    assert torch.allclose(found.vectors @ found.vectors.T, torch.eye(k).double(), atol=1e-10)
    expected = best(matrix, k, which)
    if which == "magnitude":  # values of equal magnitude have no order
        assert torch.allclose(found.values.abs(), expected.abs(), rtol=0, atol=1e-8 * norm)
    else:
        assert torch.allclose(found.values, expected, rtol=0, atol=1e-8 * norm)


@pytest.mark.parametrize("n", [1, 2, 3, 21])
@pytest.mark.parametrize("which", ENDS)
def test_small_operators_and_all_pairs(n, which, seed):
    generator = np.random.default_rng(seed)
    matrix = rotated(generator.normal(size=n), generator)
    found = eigenpairs(MatrixOperator(matrix), n, which=which)
    assert torch.allclose(found.values, best(matrix, n, which), atol=1e-12)
    assert found.products == n


@pytest.mark.parametrize("values", [[-1.0, 2, 5, 5], [3.0, 3, 3, 3, 1], [0.0, 0, 1], [2.0, 2]])
@pytest.mark.parametrize("which", ENDS)
def test_multiple_eigenvalues_of_small_operators(values, which, seed):
    matrix = rotated(np.array(values), np.random.default_rng(seed))
    for k in range(1, len(values) + 1):
        found = eigenpairs(MatrixOperator(matrix), k, which=which)
        assert torch.allclose(found.values, best(matrix, k, which), atol=1e-12)


def test_float32_and_the_error_of_its_residuals(seed):
    generator = np.random.default_rng(seed)
    matrix = rotated(generator.normal(size=N), generator)
    norm = float(torch.linalg.eigvalsh(matrix).abs().max())
    found = eigenpairs(MatrixOperator(matrix.float()), 3, tol=1e-5)
    assert found.vectors.dtype is torch.float32
    assert torch.allclose(found.values, best(matrix, 3, "largest"), rtol=0, atol=1e-5 * norm)
    vectors = found.vectors.double()
    true = (vectors @ matrix - found.values[:, None] * vectors).norm(dim=1)
    assert float((true - found.residuals).abs().max()) <= 1e-5 * norm


def test_products_are_those_counted_and_fewer_from_a_near_start(seed):
    generator = np.random.default_rng(seed)
    matrix = rotated(generator.normal(size=N), generator)
    calls = []

    def product(rows: Tensor) -> Tensor:
        calls.append(len(rows))
        return rows @ matrix

    operator = CallableOperator(product, dimension=N)
    cold = eigenpairs(operator, 2, tol=1e-8)
    assert sum(calls) == cold.products
    moved = matrix + 1e-3 * rotated(generator.normal(size=N), generator)
    near = eigenpairs(MatrixOperator(moved), 2, tol=1e-8, start=cold.vectors)
    far = eigenpairs(MatrixOperator(moved), 2, tol=1e-8)
    assert near.products < far.products
    assert torch.allclose(near.values, best(moved, 2, "largest"))


def test_same_seed_same_bits(seed):
    matrix = rotated(np.linspace(-1, 1, N), np.random.default_rng(seed))
    first, second = (eigenpairs(MatrixOperator(matrix), 2, seed=3) for _ in range(2))
    assert torch.equal(first.vectors, second.vectors)
    assert torch.equal(first.values, second.values)


def test_too_few_products_warn_and_return_honest_residuals(seed):
    matrix = rotated(np.linspace(-1, 1, N), np.random.default_rng(seed))
    with pytest.warns(ConvergenceWarning, match=r"0 of 3 eigenpairs .* Raise max_products"):
        found = eigenpairs(MatrixOperator(matrix), 3, tol=1e-12, max_products=12)
    assert found.products == 12
    assert not found.converged
    true = (found.vectors @ matrix - found.values[:, None] * found.vectors).norm(dim=1)
    assert torch.allclose(found.residuals, true, rtol=1e-6)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("count", "tolerance"), [(2, 1e-5), (3, 1e-2), (5, 1e-4)])
def test_residuals_of_pairs_that_several_searches_found(count, tolerance, device, seed):
    """Second copies are found after the first pairs have converged; their residuals are measured."""
    values = np.concatenate([[10, 10, 9, 9, 8.5], np.linspace(-1, 8, 295)])
    matrix = rotated(values, np.random.default_rng(seed))
    found = eigenpairs(MatrixOperator(matrix.to(device)), count, tol=tolerance)
    vectors = found.vectors.cpu()
    gaps = vectors @ matrix - found.values[:, None] * vectors
    assert torch.allclose(found.residuals, gaps.norm(dim=1), rtol=1e-5, atol=1e-11)


def test_basis_in_a_file_gives_the_same_bits(tmp_path, seed):
    matrix = rotated(np.linspace(-1, 1, N), np.random.default_rng(seed))
    places = ("device", tmp_path, str(tmp_path))
    kept = [eigenpairs(MatrixOperator(matrix), basis=place) for place in places]
    assert torch.equal(kept[0].vectors, kept[1].vectors)
    assert torch.equal(kept[0].vectors, kept[2].vectors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be"),
        ({"k": 7}, "k must be at most"),
        ({"which": "LA"}, "which must be one of largest, smallest, magnitude, ends, got 'LA'"),
        ({"tol": -1.0}, "tol must be"),
        ({"tol": float("nan")}, "tol must be"),
        ({"k": 3, "subspace": 3}, "subspace must be larger than k"),
        ({"max_products": 0}, "max_products"),
        ({"start": torch.zeros(6)}, "must not be zero"),
        ({"start": torch.ones(5)}, r"start must have shape \[6\]"),
    ],
)
def test_bad_arguments(options, message):
    operator = MatrixOperator(torch.eye(6, dtype=torch.float64))
    with pytest.raises(ValueError, match=message):
        eigenpairs(operator, **options)


def test_operators_that_are_not_symmetric_or_not_finite():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(50, 50, dtype=torch.float64, generator=generator)
    with pytest.raises(ValueError, match="not symmetric"):
        eigenpairs(CallableOperator(lambda rows: rows @ matrix, dimension=50))
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        eigenpairs(CallableOperator(lambda rows: rows / 0, dimension=50))
