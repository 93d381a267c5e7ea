"""Eigenvectors, SciPy, and the gradients of SGD and SAM along a direction of negative curvature."""

from __future__ import annotations

from typing import get_type_hints

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fastsam.curvature import (
    BatchLoss,
    MatrixOperator,
    escape_report,
    from_scipy,
    group_spectra,
    layer_spectra,
    negative_curvature,
    operator_spectrum,
    spectral_density,
    to_scipy,
)
from fastsam.curvature.lanczos.options import LanczosKeywords, LanczosOptions
from fastsam.curvature.options import OperatorKeywords, SpectrumKeywords, SpectrumOptions
from python_tests.curvature.oracles import classification, explicit_hessian, mlp


def symmetric(n: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    matrix = torch.randn(n, n, dtype=torch.float64)
    return ((matrix + matrix.T) / 2).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scipy_both_ways(dtype):
    from scipy.sparse.linalg import aslinearoperator, eigsh

    matrix = symmetric(40, dtype)
    ours = operator_spectrum(
        from_scipy(aslinearoperator(matrix.numpy()), symmetric=True), steps=40, probes=2
    )
    theirs = eigsh(to_scipy(MatrixOperator(matrix)), k=1, which="LA", return_eigenvectors=False)
    assert ours.settings["dtype"] == str(dtype).removeprefix("torch.")
    assert ours.lambda_max == pytest.approx(float(theirs[0]), rel=1e-4)
    linear = to_scipy(MatrixOperator(matrix))
    block = np.random.default_rng(0).standard_normal((40, 3)).astype(matrix.numpy().dtype)
    assert np.allclose(linear @ block, matrix.numpy() @ block, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="symmetric=True"):
        from_scipy(aslinearoperator(matrix.numpy()), symmetric=False)
    with pytest.raises(ValueError, match="square"):
        from_scipy(aslinearoperator(np.ones((2, 3))), symmetric=True)
    with pytest.raises(ValueError, match="real"):
        from_scipy(aslinearoperator(np.eye(2, dtype=complex)), symmetric=True)


def test_negative_curvature_of_a_network():
    model, batch = mlp((3, 5, 4)), classification(30, 3, 4)
    hessian = explicit_hessian(model, lambda m: F.cross_entropy(m(batch[0]), batch[1]))
    values, vectors = torch.linalg.eigh(hessian)
    found = negative_curvature(model, F.cross_entropy, batch, tol=1e-10)
    assert values[0] < 0
    assert found.value == pytest.approx(float(values[0]), rel=1e-8)
    flat = torch.cat([piece.reshape(-1) for piece in found.direction.values()])
    assert abs(float(flat @ vectors[:, 0])) == pytest.approx(1, abs=1e-8)
    gradient = torch.cat(
        [
            g.reshape(-1)
            for g in torch.autograd.grad(
                F.cross_entropy(model(batch[0]), batch[1]), model.parameters()
            )
        ]
    )
    assert found.gradient_component == pytest.approx(float(gradient @ flat), abs=1e-10)
    assert found.gradient_norm == pytest.approx(float(gradient.norm()))


def test_negative_curvature_takes_the_options_of_the_operator():
    model, (inputs, targets) = mlp((3, 5, 4)), classification(30, 3, 4)
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=11)
    plain = negative_curvature(model, F.cross_entropy, (inputs, targets), tol=1e-10)
    cut = negative_curvature(
        model, F.cross_entropy, loader, tol=1e-10, micro_batch=4, data_memory=64, verify_data=False
    )
    assert cut.value == pytest.approx(plain.value, rel=1e-8)
    convex = negative_curvature(
        model, F.cross_entropy, loader, tol=1e-10, kind="ggn", measurements=None
    )
    assert convex.value == pytest.approx(0, abs=1e-10)
    with pytest.raises(TypeError, match=r"unexpected option 'steps'; an operator has .*kind"):
        negative_curvature(model, F.cross_entropy, loader, steps=60)
    with pytest.raises(ValueError, match="shard='samples'"):
        negative_curvature(model, F.cross_entropy, loader, shard="probes")


def test_keywords_are_the_fields_of_the_options():
    """Type checkers read the former, Python the latter."""
    for keywords, options in (
        (LanczosKeywords, LanczosOptions),
        (SpectrumKeywords, SpectrumOptions),
    ):
        assert get_type_hints(keywords) == get_type_hints(options)
    assert set(OperatorKeywords.__annotations__) < set(get_type_hints(SpectrumOptions))


class Quadratic(nn.Module):
    """w'Aw / 2 + z'w: the gradient of a minibatch is Aw + z, its Hessian A."""

    def __init__(self, eigenvalues: list[float]) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.diag(torch.tensor(eigenvalues).double()))
        self.w = nn.Parameter(torch.randn(len(eigenvalues)).double() * 0.1)

    def forward(self, z):
        return self.w @ self.matrix @ self.w / 2 + z @ self.w


QUADRATIC_LOSS = BatchLoss(lambda model, batch: (model(batch[0]), 1.0))


@pytest.mark.parametrize("lowest", [-0.5, -7.0, -15.0, -30.0])
def test_the_theorem_is_exact_on_a_quadratic_and_says_nothing_about_escape(lowest):
    model, rho = Quadratic([3.0, 1.0, 0.5, lowest]), 0.1
    batches = [(torch.randn(4).double(),) for _ in range(40)]
    found = negative_curvature(model, QUADRATIC_LOSS, batches)
    assert found.value == pytest.approx(lowest)
    report = escape_report(model, QUADRATIC_LOSS, batches, found.direction, rho=rho)
    assert report.curvature == pytest.approx(lowest)
    assert report.predicted_factor == pytest.approx((1 + rho * lowest) ** 2)
    assert report.factor == pytest.approx(report.predicted_factor, rel=1e-9)
    assert report.factor_normalized == pytest.approx(report.predicted_factor_normalized, rel=1e-9)
    assert report.taylor_error == pytest.approx(0, abs=1e-20)
    assert report.hessian_error == pytest.approx(0, abs=1e-20)
    assert report.mean_factor == pytest.approx(1 + rho * lowest)
    assert report.amplifies == (lowest < -2 / rho)
    # The warning of the report: where the second moment grows, the mean step points back to the saddle.
    assert report.attracts == (lowest < -1 / rho)
    assert report.sgd == pytest.approx(
        float(np.mean([(lowest * model.w[3].item() + z[0][3].item()) ** 2 for z in batches]))
    )


def test_errors_of_the_theorem_on_a_network():
    model = mlp((3, 6, 4))
    batches = [classification(5, 3, 4) for _ in range(12)]
    found = negative_curvature(model, F.cross_entropy, batches)
    small = escape_report(model, F.cross_entropy, batches, found.direction, rho=1e-3)
    large = escape_report(model, F.cross_entropy, batches, found.direction, rho=0.5)
    assert small.batches == 12
    assert small.taylor_error < 1e-6 < large.taylor_error
    assert large.hessian_error > small.hessian_error > 0
    again = escape_report(model, F.cross_entropy, batches, found.direction, rho=0.0)
    assert again.factor == pytest.approx(1)
    assert again.factor_normalized == pytest.approx(1)
    # An independent measurement of E<v, g>^2 and of E<v, g(w + rho g)>^2.
    flat = torch.cat([piece.reshape(-1) for piece in found.direction.values()])
    sgd, sam = [], []
    for inputs, targets in batches:
        grads = torch.autograd.grad(F.cross_entropy(model(inputs), targets), model.parameters())
        sgd.append(float(torch.cat([g.reshape(-1) for g in grads]) @ flat) ** 2)
        moved = mlp((3, 6, 4))
        moved.load_state_dict(model.state_dict())
        with torch.no_grad():
            for value, g in zip(moved.parameters(), grads, strict=True):
                value += 0.5 * g
        grads = torch.autograd.grad(F.cross_entropy(moved(inputs), targets), moved.parameters())
        sam.append(float(torch.cat([g.reshape(-1) for g in grads]) @ flat) ** 2)
    assert large.sgd == pytest.approx(np.mean(sgd))
    assert large.sam == pytest.approx(np.mean(sam))
    assert set(large.as_dict()) > {"factor", "amplifies", "attracts"}


def test_negative_curvature_respects_the_memory_limit():
    model, batch = mlp((30, 40, 3)), classification(2000, 30, 3)
    n = sum(value.numel() for value in model.parameters())
    basis = 21 * (n + 15) * 8
    free = negative_curvature(model, F.cross_entropy, batch)
    tight = negative_curvature(model, F.cross_entropy, batch, memory_limit=basis + 3_000_000)
    assert tight.value == pytest.approx(free.value, rel=1e-8)
    with pytest.raises(ValueError, match="a pass over 1 samples needs"):
        negative_curvature(model, F.cross_entropy, batch, memory_limit=basis + 100)


def test_escape_bad_input():
    model, batches = Quadratic([1.0, -1.0]), [(torch.ones(2).double(),)]
    direction = {"w": torch.tensor([0.0, 1.0]).double()}
    for rho in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="rho"):
            escape_report(model, QUADRATIC_LOSS, batches, direction, rho=rho)
    with pytest.raises(ValueError, match="norm above 0"):
        escape_report(model, QUADRATIC_LOSS, batches, {"w": torch.zeros(2)}, rho=0.1)
    with pytest.raises(ValueError, match="shape"):
        escape_report(model, QUADRATIC_LOSS, batches, {"w": torch.ones(3)}, rho=0.1)
    with pytest.raises(ValueError, match="no parameter or layer"):
        escape_report(model, QUADRATIC_LOSS, batches, {"u": torch.ones(2)}, rho=0.1)


def test_layers_give_the_diagonal_blocks():
    model, batch = mlp((3, 4, 3)), classification(12, 3, 3)
    hessian = explicit_hessian(model, lambda m: F.cross_entropy(m(batch[0]), batch[1]))
    blocks = layer_spectra(model, F.cross_entropy, batch, steps=99)
    assert list(blocks) == ["0", "2"]
    for block, part in zip(blocks.values(), (hessian[:16, :16], hessian[16:, 16:]), strict=True):
        values = torch.linalg.eigvalsh(part)
        scale = float(values.abs().max())
        assert block.lambda_max == pytest.approx(float(values[-1]), abs=1e-8 * scale)
        assert block.lambda_min == pytest.approx(float(values[0]), abs=1e-8 * scale)
    assert list(layer_spectra(model, F.cross_entropy, batch, ["2.bias"], steps=3)) == ["2.bias"]
    with pytest.raises(ValueError, match="layers="):
        layer_spectra(model, F.cross_entropy, batch, params=["0"])


class Counted(Dataset):
    """Samples that count their reads."""

    def __init__(self, inputs, targets):
        self.inputs, self.targets, self.reads = inputs, targets, 0

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        self.reads += 1
        return self.inputs[index], self.targets[index]


def test_the_data_of_all_layers_are_read_once():
    model, batch = mlp((3, 4, 5, 3)), classification(12, 3, 3)
    expected = layer_spectra(model, F.cross_entropy, [batch], steps=9)
    found = layer_spectra(model, F.cross_entropy, iter([batch]), steps=9)
    dataset = Counted(*batch)
    loaded = layer_spectra(model, F.cross_entropy, DataLoader(dataset, batch_size=12), steps=9)
    assert dataset.reads == 2 * 12  # the second read verifies the data
    for layer in ("0", "2", "4"):
        assert np.array_equal(found[layer].alpha, expected[layer].alpha)
        assert np.array_equal(loaded[layer].alpha, expected[layer].alpha)
        assert loaded[layer].settings["data_verified"]
    with torch.inference_mode():  # data read under inference_mode can still be differentiated
        layer_spectra(model, F.cross_entropy, DataLoader(dataset, batch_size=5), steps=2)


def test_groups_of_classes():
    model = mlp((3, 4, 4))
    inputs, targets = classification(40, 3, 4)
    groups = {"head": [0, 1], "tail": [3]}
    spectra = group_spectra(model, F.cross_entropy, (inputs, targets), groups, steps=99)
    for name, classes in groups.items():
        mask = torch.isin(targets, torch.tensor(classes))
        whole = spectral_density(model, F.cross_entropy, (inputs[mask], targets[mask]), steps=99)
        assert spectra[name].weight == int(mask.sum())
        assert spectra[name].lambda_max == pytest.approx(whole.lambda_max, rel=1e-8)
    with pytest.raises(ValueError, match="class 9 has no sample"):
        group_spectra(model, F.cross_entropy, (inputs, targets), {"rest": [3, 9]})


def test_one_layer_may_be_given_as_text():
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(12)]).double()
    batch = torch.randn(5, 2).double(), torch.randn(5, 2).double()
    (found,) = layer_spectra(model, nn.MSELoss(), batch, layers="10", steps=2).items()
    expected = spectral_density(model, nn.MSELoss(), batch, params="10", steps=2)
    assert found[0] == "10"
    assert np.array_equal(found[1].alpha, expected.alpha)


@pytest.mark.parametrize(
    ("subspace", "error", "message"),
    [
        ("a", TypeError, "subspace must be an integer"),
        (-5, ValueError, "subspace must be at least 1"),
    ],
)
def test_the_subspace_of_negative_curvature_is_checked(subspace, error, message):
    with pytest.raises(error, match=message):
        negative_curvature(mlp(), F.cross_entropy, classification(9, 3, 4), subspace=subspace)
