"""Both ends of spectra whose Krylov spaces are exhausted early."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastsam.curvature import CurvatureTracker, MatrixOperator
from fastsam.curvature.ends import find_ends
from python_tests.curvature.oracles import explicit_hessian

CRITERION = nn.MSELoss()


def few_eigenvalues(n: int, seed: int) -> dict[str, Tensor]:
    """Matrices with one, two or three eigenvalues."""
    generator = torch.Generator().manual_seed(100 + seed)
    vector = torch.randn(n, generator=generator, dtype=torch.float64)
    spike = torch.ones(n, dtype=torch.float64)
    spike[0] = 3
    return {
        "multiple of the identity": 2 * torch.eye(n, dtype=torch.float64),
        "rank one": -torch.outer(vector, vector),
        "spike": torch.diag(spike),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [2, 3, 8, 33])
def test_exhausted_spaces_go_on_in_a_new_direction(n: int, dtype: torch.dtype) -> None:
    for seed in range(10):
        for name, matrix in few_eigenvalues(n, seed).items():
            values = torch.linalg.eigvalsh(matrix)
            scale = float(values.abs().max())
            found = find_ends(
                MatrixOperator(matrix.to(dtype)), start=None, tol=0.02, most_products=200, seed=seed
            )
            ends = found.smallest, found.largest
            expected = values[[0, -1]].tolist()
            assert ends == pytest.approx(expected, abs=1e-5 * scale), (name, seed)
            gram = found.vectors @ found.vectors.T
            assert torch.allclose(gram, torch.eye(len(gram), dtype=dtype), atol=1e-5), (name, seed)


def test_a_tracker_of_a_linear_model_finds_the_ends() -> None:
    """The Hessian of a linear regression repeats each eigenvalue once for each output."""
    for seed in range(3):
        torch.manual_seed(seed)
        model = nn.Linear(1, 20, bias=False).double()
        batch = torch.randn(50, 1).double(), torch.randn(50, 20).double()
        hessian = explicit_hessian(model, lambda m, b=batch: CRITERION(m(b[0]), b[1]))
        values = torch.linalg.eigvalsh(hessian)
        tracker = CurvatureTracker(model, CRITERION, batch, every=1, budget=None, seed=seed)
        (point,) = tracker.step()
        assert point.lambda_min == pytest.approx(float(values[0]), rel=1e-2)
        assert point.lambda_max == pytest.approx(float(values[-1]), rel=1e-2)
