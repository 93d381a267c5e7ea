"""The fused Lanczos step equals its reference and an explicit matrix, on all backends."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastsam.kernels import reference
from fastsam.kernels.lanczos import Recurrence, orthogonalize
from fastsam.threads import cpu_threads
from python_tests.backend import is_native

Draw = Callable[..., Tensor]


def orthonormal_rows(draw: Draw, probes: int, count: int, size: int, dtype: torch.dtype) -> Tensor:
    rows = torch.linalg.qr(draw(probes, size, count, dtype=torch.float64)).Q
    return rows.transpose(1, 2).to(dtype).contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("probes", "count", "size"), [(1, 1, 2), (1, 3, 33), (3, 5, 255), (2, 4, 1025), (2, 9, 2051)]
)
def test_step_equals_the_reference(
    probes: int, count: int, size: int, dtype: torch.dtype, draw: Draw, device: torch.device
) -> None:
    eps = torch.finfo(dtype).eps
    # Rows of a wider block, so that wrong strides show, with a NaN row on each side of the target.
    basis = torch.full((probes, count + 2, size), math.nan, dtype=dtype, device=device)
    basis[:, :count] = orthonormal_rows(draw, probes, count, size, dtype)
    product = draw(probes, size, dtype=dtype)
    outcomes = []
    for step_function in (orthogonalize, reference.orthogonalize):
        rows, vector = basis.clone(), product.clone()
        recurrence = Recurrence.start(probes, count, device=device)
        if count > 1:
            recurrence.beta[:, count - 2] = 0.5
        step_function(rows[:, :count], vector, rows[:, count], recurrence, step=count - 1, eps=eps)
        outcomes.append((rows, vector, recurrence))
    (rows, vector, recurrence), (rows_0, vector_0, expected) = outcomes
    tolerance = 100 * eps
    torch.testing.assert_close(recurrence.alpha, expected.alpha, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(recurrence.beta, expected.beta, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(recurrence.bound, expected.bound, rtol=tolerance, atol=tolerance)
    assert torch.equal(recurrence.active, expected.active)
    assert torch.equal(recurrence.steps_taken, expected.steps_taken)
    torch.testing.assert_close(vector, vector_0, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(rows[:, count], rows_0[:, count], rtol=tolerance, atol=tolerance)
    assert torch.equal(rows[:, :count], basis[:, :count])
    assert rows[:, count + 1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_full_run_reproduces_the_matrix(
    dtype: torch.dtype, draw: Draw, device: torch.device
) -> None:
    """Q stays orthonormal and Q A Q^T is the tridiagonal matrix, to rounding."""
    probes, steps, size = 2, 12, 300
    half = draw(size, size, dtype=torch.float64)
    matrix = ((half + half.T) / math.sqrt(size)).to(dtype)
    basis = torch.zeros(probes, steps, size, dtype=dtype, device=device)
    basis[:, :1] = orthonormal_rows(draw, probes, 1, size, dtype)
    recurrence = Recurrence.start(probes, steps, device=device)
    eps = torch.finfo(dtype).eps
    for step in range(steps):
        product = (basis[:, step] @ matrix).contiguous()
        successor = basis[:, step + 1] if step + 1 < steps else None
        orthogonalize(basis[:, : step + 1], product, successor, recurrence, step=step, eps=eps)
    q = basis.double()
    identity = torch.eye(steps, dtype=torch.float64, device=device).expand(probes, -1, -1)
    torch.testing.assert_close(q @ q.mT, identity, rtol=0, atol=100 * eps)
    off_diagonal = recurrence.beta[:, :-1]
    tridiagonal = (
        torch.diag_embed(recurrence.alpha)
        + torch.diag_embed(off_diagonal, 1)
        + torch.diag_embed(off_diagonal, -1)
    )
    torch.testing.assert_close(q @ matrix.double() @ q.mT, tridiagonal, rtol=0, atol=200 * eps)
    assert recurrence.steps_taken.tolist() == [steps] * probes


def test_breakdown_is_masked_per_probe(draw: Draw, device: torch.device) -> None:
    """A probe that starts in an eigenvector stops after one step; its neighbor continues unaffected."""
    diagonal = torch.arange(1.0, 8.0, dtype=torch.float64, device=device)
    basis = torch.zeros(2, 4, 7, dtype=torch.float64, device=device)
    basis[0, 0, 3] = 1.0
    basis[1, 0] = orthonormal_rows(draw, 1, 1, 7, torch.float64)[0, 0]
    recurrence = Recurrence.start(2, 4, device=device)
    for step in range(4):
        product = basis[:, step] * diagonal
        successor = basis[:, step + 1] if step < 3 else None
        orthogonalize(basis[:, : step + 1], product, successor, recurrence, step=step, eps=2.0**-52)
    assert recurrence.steps_taken.tolist() == [1, 4]
    assert recurrence.active.tolist() == [0, 1]
    assert recurrence.alpha[0].tolist() == [4.0, 0.0, 0.0, 0.0]
    assert recurrence.beta[0].tolist() == [0.0, 0.0, 0.0, 0.0]
    assert (basis[0, 1:] == 0.0).all()
    assert basis.isfinite().all()


def test_an_inactive_probe_may_contain_inf_and_nan(draw: Draw, device: torch.device) -> None:
    basis = orthonormal_rows(draw, 2, 2, 50, torch.float32)
    product = draw(2, 50)
    product[0] = math.inf
    recurrence = Recurrence.start(2, 2, device=device)
    recurrence.active[0] = 0
    successor = torch.full((2, 50), math.nan, device=device)
    orthogonalize(basis[:, :1], product, successor, recurrence, step=0, eps=1e-7)
    assert (successor[0] == 0.0).all()
    assert successor[1].norm().item() == pytest.approx(1.0, rel=1e-5)
    assert recurrence.alpha[0, 0].item() == 0.0


def test_nan_reaches_the_recurrence(draw: Draw, device: torch.device) -> None:
    """A product that is not finite must show in the recurrence, which the monitor polls."""
    basis = orthonormal_rows(draw, 1, 1, 50, torch.float32)
    product = draw(1, 50)
    product[0, 7] = math.nan
    recurrence = Recurrence.start(1, 1, device=device)
    orthogonalize(basis, product, None, recurrence, step=0, eps=1e-7)
    assert recurrence.alpha.isnan().all()
    assert recurrence.bound.isnan().all()


def test_the_same_bits_on_every_run_and_thread_count(
    draw: Draw, device: torch.device, request: pytest.FixtureRequest
) -> None:
    # Many tiles on each backend; the emulation needs a millisecond for a tile and row.
    size = 3_001 if "cuda-on-host" in request.node.name else 40_001
    basis = orthonormal_rows(draw, 2, 6, size, torch.float32)
    product = draw(2, size)
    outcomes = []
    for count in (1, 2, 3, 1):
        vector = product.clone()
        recurrence = Recurrence.start(2, 6, device=device)
        with cpu_threads(count):
            orthogonalize(basis, vector, None, recurrence, step=5, eps=1e-7)
        outcomes.append((vector, recurrence))
    for vector, recurrence in outcomes[1:]:
        assert torch.equal(vector, outcomes[0][0])
        assert torch.equal(recurrence.alpha, outcomes[0][1].alpha)
        assert torch.equal(recurrence.beta, outcomes[0][1].beta)


@pytest.mark.parametrize("full", [True, False], ids=["full", "one row"])
def test_scratch_is_allocated_a_few_times_a_run(
    full: bool, draw: Draw, device: torch.device
) -> None:
    """A run of 40 steps used to allocate at nearly every step. One row never needs more than one."""
    steps = 40
    basis = orthonormal_rows(draw, 1, steps, 64, torch.float64)
    recurrence = Recurrence.start(1, steps, device=device)
    kept = []
    for step in range(steps):
        rows = basis[:, : step + 1] if full else basis[:, :1]
        orthogonalize(
            rows, draw(1, 64, dtype=torch.float64), None, recurrence, step=step, eps=1e-16
        )
        kept.append(recurrence._scratch)
    assert len({id(scratch) for scratch in kept}) <= (7 if full else 1)


@pytest.mark.parametrize("scale", [1e-40, 1e-37, 1e-30, 1e30, 1e38])
def test_the_successor_of_a_very_small_or_large_product(
    scale: float, draw: Draw, device: torch.device
) -> None:
    """A beta that is subnormal or infinite in float32 still gives a unit vector."""
    basis = torch.zeros(1, 1, 50, device=device)
    basis[0, 0, 0] = 1.0
    product = (draw(1, 50, dtype=torch.float64) * scale).float()
    product[0, 0] = 0.0
    expected = product.double() / product.double().norm()
    successor = torch.full((1, 50), math.nan, device=device)
    recurrence = Recurrence.start(1, 2, device=device)
    orthogonalize(basis, product, successor, recurrence, step=0, eps=1e-7)
    if not is_native() and scale == 1e38:  # its norm is infinite in float32, and the probe ends
        expected = torch.zeros_like(expected)
    torch.testing.assert_close(successor.double(), expected, rtol=1e-6, atol=1e-7)


def rejected() -> list[tuple[dict[str, object], str]]:
    good: dict[str, object] = {
        "rows": torch.zeros(2, 3, 5),
        "vector": torch.zeros(2, 5),
        "successor": torch.zeros(2, 5),
        "recurrence": Recurrence.start(2, 3),
        "step": 2,
    }
    return [
        (good | {"rows": torch.zeros(2, 3, 5, dtype=torch.float16)}, "float32 or float64"),
        (good | {"rows": torch.zeros(3, 5)}, r"\[probes, count, n\]"),
        (good | {"rows": torch.zeros(2, 0, 5)}, "at least one basis vector"),
        (good | {"rows": torch.zeros(2, 5, 3).mT}, "last dimension of rows"),
        (good | {"vector": torch.zeros(2, 4)}, "vector must be"),
        (good | {"vector": torch.zeros(2, 5, dtype=torch.float64)}, "vector must be"),
        (good | {"vector": torch.zeros(2, 2, 5)[:, 0]}, "vector must be contiguous"),
        (good | {"successor": torch.zeros(5)}, "successor must be"),
        (good | {"step": 3}, "does not match"),
        (good | {"recurrence": Recurrence.start(1, 3)}, "does not match"),
    ]


@pytest.mark.parametrize(("arguments", "message"), rejected())
def test_arguments_that_do_not_fit_are_refused(arguments: dict[str, object], message: str) -> None:
    vector = arguments["vector"]
    assert isinstance(vector, Tensor)
    before = vector.clone()
    with pytest.raises(ValueError, match=message):
        orthogonalize(
            arguments["rows"],  # type: ignore[arg-type]
            vector,
            arguments["successor"],  # type: ignore[arg-type]
            arguments["recurrence"],  # type: ignore[arg-type]
            step=arguments["step"],  # type: ignore[arg-type]
            eps=1e-7,
        )
    assert torch.equal(vector, before)


def test_kernels_refuse_a_recurrence_in_float32(draw: Draw) -> None:
    if not is_native():
        pytest.skip("PyTorch operations may use float32")
    basis = orthonormal_rows(draw, 1, 1, 50, torch.float32)
    recurrence = Recurrence.start(1, 1, dtype=torch.float32)
    with pytest.raises(ValueError, match="float64"):
        orthogonalize(basis, draw(1, 50), None, recurrence, step=0, eps=1e-7)
