"""A checkpoint is resumed only with the operator, the plan and the ranks that wrote it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastsam.curvature import (
    BatchLoss,
    CallableOperator,
    MatrixOperator,
    Spectrum,
    class_spectra,
    curvature_operator,
    operator_spectrum,
    spectral_density,
)
from fastsam.curvature.data import read_batches
from fastsam.curvature.lanczos.checkpoint import LanczosCheckpoint, Progress
from fastsam.curvature.lanczos.options import LanczosOptions
from fastsam.curvature.lanczos.run import lanczos
from fastsam.curvature.operators.model import ModelOperator
from fastsam.curvature.products import planning
from fastsam.distributed import World
from python_tests.curvature.oracles import classification, mlp
from python_tests.ranks import run_ranks

N = 40
OTHER = "contains a run of another operator"


class KilledError(Exception):
    """Emulates a kill."""


def symmetric(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    square = torch.randn(N, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (square + square.T).to(dtype)


def killed(matrix: Tensor, at: int = 5) -> CallableOperator:
    """An operator whose product number ``at`` is killed."""
    calls = []

    def product(rows: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == at:
            raise KilledError
        return rows @ matrix.T

    return CallableOperator(product, dimension=N, dtype=matrix.dtype)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with every product of a model's curvature."""
    calls: list[int] = []
    product = ModelOperator.matmat

    def counted(self: ModelOperator, vectors: Tensor) -> Tensor:
        calls.append(1)
        return product(self, vectors)

    monkeypatch.setattr(ModelOperator, "matmat", counted)
    return calls


def kill_at(number: int) -> None:
    """Kill the product number ``number`` of a model's curvature, once."""
    product, calls = ModelOperator.matmat, []

    def deadly(self: ModelOperator, vectors: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == number:
            raise KilledError
        return product(self, vectors)

    ModelOperator.matmat = deadly  # type: ignore[method-assign]


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("reorthogonalize", ["full", "none"])
def test_another_matrix_is_refused(tmp_path: Path, reorthogonalize: Any, finished: bool) -> None:
    first, second = MatrixOperator(symmetric(0)), MatrixOperator(symmetric(1))
    options: Any = {"steps": 12, "probes": 2, "reorthogonalize": reorthogonalize}
    options |= {"checkpoint": tmp_path / "run", "checkpoint_interval": 0, "progress": False}
    if finished:
        operator_spectrum(first, **options)
    else:
        with pytest.raises(KilledError):
            operator_spectrum(killed(symmetric(0)), **options)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    for other in (second, -1 * first, first - second, first.shifted(1e-3)):
        with pytest.raises(ValueError, match=OTHER):
            operator_spectrum(other, **options)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    whole = operator_spectrum(first, **{**options, "checkpoint": None})
    assert np.array_equal(operator_spectrum(first, **options).alpha, whole.alpha)


def test_a_small_change_beside_a_large_eigenvalue_is_refused(tmp_path: Path) -> None:
    values = torch.linspace(-1, 1, 1000)
    values[0] = 300.0  # the norm of the first product is far below that of the operator
    options: Any = {"steps": 9, "checkpoint": tmp_path / "run", "progress": False}
    operator_spectrum(MatrixOperator(torch.diag(values)), **options)
    values[1:] *= 4
    with pytest.raises(ValueError, match=OTHER):
        operator_spectrum(MatrixOperator(torch.diag(values)), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_another_rounding_of_the_products_is_accepted(tmp_path: Path, dtype: torch.dtype) -> None:
    matrix = symmetric(0, dtype)
    options: Any = {"steps": 12, "probes": 3, "checkpoint": tmp_path / "run", "progress": False}
    first = operator_spectrum(MatrixOperator(matrix), **options)
    noise = 10 * torch.finfo(dtype).eps * float(torch.linalg.matrix_norm(matrix, 2))

    def product(rows: Tensor) -> Tensor:
        return rows @ matrix + noise * rows.norm(dim=1, keepdim=True) * torch.randn_like(rows) / 6

    again = operator_spectrum(CallableOperator(product, dimension=N, dtype=dtype), **options)
    assert np.array_equal(again.alpha, first.alpha)


@pytest.mark.parametrize("content", ["zero", "exhausted", "single"])
def test_trivial_operators_are_resumed(tmp_path: Path, content: str) -> None:
    matrix = {
        "zero": torch.zeros(5, 5),
        "exhausted": 3 * torch.eye(5),
        "single": torch.tensor([[2.0]]),
    }[content]
    options: Any = {"steps": 3, "checkpoint": tmp_path / "run", "progress": False}
    for _ in range(2):
        found = operator_spectrum(MatrixOperator(matrix), **options)
        assert found.lambda_max == pytest.approx(float(matrix[0, 0]))


def test_products_that_change_are_not_compared(tmp_path: Path) -> None:
    """Nothing is refused where no product can be repeated, as with augmentation that is drawn again."""
    generator = torch.Generator().manual_seed(0)
    calls = []

    def product(rows: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 5:
            raise KilledError
        return rows + 0.1 * torch.randn(rows.shape, generator=generator, dtype=rows.dtype)

    operator = CallableOperator(product, dimension=N)
    options: Any = {"steps": 8, "verify_symmetry": False, "progress": False}
    options |= {"checkpoint": tmp_path / "run", "checkpoint_interval": 0}
    with pytest.raises(KilledError):
        operator_spectrum(operator, **options)
    assert operator_spectrum(operator, **options).order.tolist() == [8]
    assert len(calls) == 5 + 2 + 4
    with pytest.raises(ValueError, match=OTHER):
        operator_spectrum(CallableOperator(lambda rows: rows * torch.nan, dimension=N), **options)


def smoothed(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, label_smoothing=0.5)


def scaled(outputs: Tensor, targets: Tensor) -> Tensor:
    return 100 * F.cross_entropy(outputs, targets)


@pytest.mark.parametrize("other", ["smoothed", "scaled", "architecture"])
def test_another_loss_or_architecture_is_refused(tmp_path: Path, other: str) -> None:
    model, batch = mlp((4, 5, 3)), classification(30, 4, 3)
    options: Any = {"steps": 6, "checkpoint": tmp_path / "run", "progress": False}
    spectral_density(model, F.cross_entropy, batch, **options)
    changed, loss = model, {"smoothed": smoothed, "scaled": scaled}.get(other, F.cross_entropy)
    if other == "architecture":
        changed = copy.deepcopy(model)
        changed[1] = nn.ReLU()
    with pytest.raises(ValueError, match=OTHER):
        spectral_density(changed, loss, batch, **options)


def test_other_targets_of_the_sampled_fisher_matrix_are_refused(tmp_path: Path) -> None:
    model, batch = mlp((4, 5, 3)), classification(30, 4, 3)
    options: Any = {"steps": 5, "checkpoint": tmp_path / "run", "progress": False}
    first, other = (
        curvature_operator(model, F.cross_entropy, batch, kind="mc-fisher", seed=seed)
        for seed in (1, 2)
    )
    operator_spectrum(first, **options)
    with pytest.raises(ValueError, match=OTHER):
        operator_spectrum(other, **options)


def test_other_unverified_data_are_refused_and_a_new_order_is_not(tmp_path: Path) -> None:
    model, (inputs, targets) = mlp((4, 5, 3)), classification(30, 4, 3)
    options: Any = {"steps": 5, "verify_data": False, "progress": False}
    options["checkpoint"] = tmp_path / "run"

    def loader(inputs: Tensor) -> DataLoader[Any]:
        return DataLoader(TensorDataset(inputs, targets), batch_size=7, shuffle=True)

    first = spectral_density(model, F.cross_entropy, loader(inputs), **options)
    again = spectral_density(model, F.cross_entropy, loader(inputs), **options)
    assert np.array_equal(again.alpha, first.alpha)
    with pytest.raises(ValueError, match=OTHER):
        spectral_density(model, F.cross_entropy, loader(3 * inputs), **options)


def test_a_finished_class_costs_one_product(tmp_path: Path, products: list[int]) -> None:
    model, batch = mlp((4, 5, 3)), classification(30, 4, 3)
    options: Any = {"steps": 6, "checkpoint": tmp_path, "progress": False}
    first = class_spectra(model, nn.CrossEntropyLoss(), batch, **options)
    assert len(products) == 6 * len(first)
    products.clear()
    class_spectra(model, nn.CrossEntropyLoss(), batch, **options)
    assert len(products) == len(first)
    with pytest.raises(ValueError, match=OTHER):
        class_spectra(model, smoothed, batch, **options)


@pytest.mark.parametrize("strategy", ["auto", "rebuild"])
def test_a_killed_run_keeps_its_passes_with_more_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: Any
) -> None:
    model, batch = mlp((64, 256, 3)), classification(512, 64, 3)
    options: Any = {"steps": 6, "strategy": strategy, "progress": False}
    options |= {"checkpoint": tmp_path / "run", "checkpoint_interval": 0}

    def run(free: int, **more: Any) -> Spectrum:
        monkeypatch.setattr(planning, "plan_bytes", lambda device, limit: free)
        return spectral_density(model, F.cross_entropy, batch, **{**options, **more})

    whole = run(2_000_000, checkpoint=None)
    assert whole.settings["micro_batch"] < 512
    with monkeypatch.context() as patch:
        patch.setattr(ModelOperator, "matmat", ModelOperator.matmat)
        kill_at(4)
        with pytest.raises(KilledError):
            run(2_000_000)
    resumed = run(10**10)
    assert resumed.settings["micro_batch"] == whole.settings["micro_batch"]
    assert np.array_equal(resumed.alpha, whole.alpha)
    most = whole.settings["micro_batch"]
    assert np.array_equal(run(10**10, micro_batch=most).alpha, whole.alpha)
    with pytest.raises(ValueError, match=r"other settings \(micro_batch, passes"):
        run(10**10, micro_batch=most - 1)
    with pytest.raises(ValueError, match=rf"micro_batch={most}, but the memory now requires"):
        run(1_500_000)


def summed(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[1])


def smoothed_sum(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    return len(batch[1]) * smoothed(model(batch[0]), batch[1]), len(batch[1])


def uneven_ranks(rank: int, folder: str) -> None:
    """Resume a run of three batches on two ranks, and fail to resume it in several ways."""
    torch.manual_seed(0)
    model, (x, y) = mlp((4, 5, 3)), classification(60, 4, 3)
    data = [(x[i::3], y[i::3]) for i in range(3)]
    options: Any = {"steps": 6, "shard": "samples", "progress": False}
    options |= {"checkpoint": f"{folder}/run", "checkpoint_interval": 0}

    def run(loss: Callable[..., Any] = summed) -> Spectrum:
        return spectral_density(model, BatchLoss(loss), data, **options)

    kill_at(4)
    with pytest.raises(KilledError):
        run()
    with pytest.raises(ValueError, match=OTHER):
        run(smoothed_sum)
    restore = LanczosCheckpoint.restore
    if rank == 1:
        LanczosCheckpoint.restore = _no_restore  # type: ignore[method-assign]
    with pytest.raises(
        ValueError, match="^a disk" if rank else "rank 1 cannot resume the run: a disk"
    ):
        run()
    LanczosCheckpoint.restore = restore  # type: ignore[method-assign]
    alone = spectral_density(model, BatchLoss(summed), data, steps=6, progress=False)
    for _ in range(2):
        resumed = run()
        assert np.allclose(resumed.alpha, alone.alpha, atol=1e-10)


def _no_restore(*_: Any, **__: Any) -> None:
    raise ValueError("a disk is gone")


@dataclass(frozen=True)
class Pair(World):
    """One of two ranks; the other one has ``passes`` passes and fails to restore if ``fails``."""

    world_size: int = 2
    passes: int = 0
    fails: bool = False

    def all_reduce(self, tensors: Any) -> None:
        pass

    def agree(self, value: Any) -> bool:
        return True

    def all_gather(self, value: Any) -> list[Any]:
        if isinstance(value, Progress) and self.fails:
            return [value, "a disk is gone"]
        other = self.passes if type(value) is int else value
        return [value, other] if self.rank == 0 else [other, value]


def test_ranks_with_different_numbers_of_passes_have_one_identity() -> None:
    model, (x, y) = mlp((4, 5, 3)), classification(60, 4, 3)
    data = read_batches([(x[i::3], y[i::3]) for i in range(3)])
    found = []
    for rank, other in ((0, 1), (1, 2)):
        operator = ModelOperator(
            model, BatchLoss(summed), data, strategy="rebuild", world=Pair(rank=rank, passes=other)
        )
        operator.prepare(probes=1, steps=3)
        found.append(operator.identity)
    assert found[0] == found[1]
    assert found[0]["passes"] == 2


def test_a_rank_that_cannot_restore_ends_the_run_on_all(tmp_path: Path) -> None:
    operator = MatrixOperator(symmetric(0))
    options = LanczosOptions(steps=6, checkpoint=tmp_path / "run", progress=False)
    whole = lanczos(operator, options, identity={}, world=Pair())
    assert np.array_equal(lanczos(operator, options, identity={}, world=Pair()).alpha, whole.alpha)
    with pytest.raises(ValueError, match="rank 1 cannot resume the run: a disk is gone"):
        lanczos(operator, options, identity={}, world=Pair(fails=True))


@pytest.mark.slow
def test_ranks_with_different_numbers_of_passes_resume_together(tmp_path: Path) -> None:
    run_ranks(uneven_ranks, 2, str(tmp_path), timeout=timedelta(seconds=60))


def test_products_may_differ_as_much_as_between_processors(tmp_path: Path) -> None:
    """Near a minimum, float32 products of one network differed by 2e-3 between two instruction sets."""
    matrix = symmetric(0).float()
    options: Any = {"steps": 6, "checkpoint": tmp_path / "run", "progress": False}
    first = operator_spectrum(MatrixOperator(matrix), **options)
    again = operator_spectrum(MatrixOperator(1.002 * matrix), **options)
    assert np.array_equal(again.alpha, first.alpha)
    with pytest.raises(ValueError, match=OTHER):
        operator_spectrum(MatrixOperator(1.2 * matrix), **options)


def test_a_resumed_run_knows_the_asymmetry_of_its_earlier_products(tmp_path: Path) -> None:
    matrix = symmetric(0)
    matrix[0] += 1e-8
    options: Any = {"steps": 12, "checkpoint": tmp_path / "run", "checkpoint_interval": 0}
    options |= {"probes": 2, "progress": False}
    whole = operator_spectrum(killed(matrix, at=100), **{**options, "checkpoint": None})
    with pytest.raises(KilledError):
        operator_spectrum(killed(matrix, at=10), **options)
    resumed = operator_spectrum(killed(matrix, at=100), **options)
    assert whole.asymmetry > 1e-10
    assert resumed.asymmetry == whole.asymmetry
    assert operator_spectrum(killed(matrix, at=100), **options).asymmetry == whole.asymmetry
