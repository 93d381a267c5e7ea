"""The forms of models, losses and data in the test suites of curvlinops and hessian-eigenthings.

The oracles are explicit float64 matrices of the loss over all data at once, and closed forms.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from fastsam import curvature_operator
from fastsam.curvature import OutputLoss, eigenpairs

SIZES = (3, 4)
"""Batches of different sizes, as a mean of their means would be wrong."""


def network(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 5), nn.ReLU(), nn.Linear(5, outputs))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(2, 3, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(3 * 4 * 4, 10),
    )


def classes(count: int) -> Callable[..., Tensor]:
    return lambda *shape: torch.randint(count, shape)


def binary(outputs: int) -> Callable[..., Tensor]:
    return lambda *shape: torch.randint(2, (*shape, outputs)).double()


def real(outputs: int) -> Callable[..., Tensor]:
    return lambda *shape: torch.randn(*shape, outputs, dtype=torch.float64)


Case = tuple[Callable[[], nn.Module], tuple[int, ...], Callable[..., Tensor], nn.Module, bool]
CASES: dict[str, Case] = {
    "cross-entropy": (lambda: network(10, 3), (10,), classes(3), nn.CrossEntropyLoss(), False),
    "binary, one output": (lambda: network(10, 1), (10,), binary(1), nn.BCEWithLogitsLoss(), False),
    "binary, two outputs": (
        lambda: network(10, 2),
        (10,),
        binary(2),
        nn.BCEWithLogitsLoss(),
        False,
    ),
    "regression": (lambda: network(8, 3), (8,), real(3), nn.MSELoss(), False),
    "cross-entropy, sequences": (
        lambda: network(10, 3),
        (5, 10),
        classes(3),
        nn.CrossEntropyLoss(),
        True,
    ),
    "binary, sequences": (
        lambda: network(10, 2),
        (5, 10),
        binary(2),
        nn.BCEWithLogitsLoss(),
        False,
    ),
    "regression, sequences": (lambda: network(8, 3), (5, 8), real(3), nn.MSELoss(), False),
    "CNN": (convolutional, (1, 28, 28), classes(10), nn.CrossEntropyLoss(), False),
}
"""Model, shape of an input, targets, criterion, whether outputs are ``[N, T, C]`` for ``[N, C, T]``."""


def drawn(case: Case) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    make, shape, targets, *_ = case
    batches = [
        (torch.rand(size, *shape, dtype=torch.float64), targets(size, *shape[:-1]))
        if len(shape) < 3
        else (torch.rand(size, *shape, dtype=torch.float64), targets(size))
        for size in SIZES
    ]
    return make().double(), batches


def explicit(
    kind: str, case: Case, model: nn.Module, batches: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """Return the Hessian, or ``J' H J`` with the Hessian of the loss by all outputs at once."""
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    criterion, transposed = case[3], case[4]
    names = [name for name, _ in model.named_parameters()]
    shapes = [value.shape for value in model.parameters()]

    def outputs(vector: Tensor) -> Tensor:
        pieces = vector.split([shape.numel() for shape in shapes])
        state = {n: p.reshape(s) for n, p, s in zip(names, pieces, shapes, strict=True)}
        return functional_call(model, state, (inputs,))

    def loss(found: Tensor) -> Tensor:
        return criterion(found.mT if transposed else found, targets)

    weights = nn.utils.parameters_to_vector(model.parameters()).detach()
    if kind == "hessian":
        return torch.func.hessian(lambda vector: loss(outputs(vector)))(weights)
    out = outputs(weights)
    jacobian = torch.func.jacrev(outputs)(weights).flatten(0, -2)
    inner = torch.func.hessian(lambda flat: loss(flat.reshape(out.shape)))(out.flatten())
    return jacobian.T @ inner @ jacobian


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("form", ["tensors", "mapping"])
@pytest.mark.parametrize("name", CASES)
def test_matrices_of_each_form(name: str, form: str, kind: str) -> None:
    case = CASES[name]
    model, batches = drawn(case)
    criterion, transposed = case[3], case[4]

    def form_of(out: Tensor) -> Tensor:
        return out.mT if transposed else out

    loss: Any = criterion
    data: Any = batches
    if form == "mapping":
        data = [UserDict({"x": batches[0][0], "y": batches[0][1]})]
        data += [{"x": x, "y": y} for x, y in batches[1:]]
        loss = OutputLoss(lambda m, batch: form_of(m(batch["x"])), lambda b: b["y"], criterion)
    elif transposed:
        loss = OutputLoss(lambda m, batch: form_of(m(batch[0])), lambda b: b[1], criterion)
    found = curvature_operator(model, loss, data, kind=kind)
    expected = explicit(kind, case, model, batches)
    vector = torch.randn(len(expected), 2, dtype=torch.float64)
    scale = float(expected.norm())
    assert torch.allclose(found @ vector, expected @ vector, rtol=0, atol=1e-12 * max(scale, 1))


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize(
    "name", ["cross-entropy", "binary, two outputs", "regression", "regression, sequences"]
)
def test_a_sum_is_divided_by_the_number_of_samples(name: str, kind: str) -> None:
    make, shape, targets, criterion, transposed = CASES[name]
    case = (make, shape, targets, type(criterion)(reduction="sum"), transposed)
    model, batches = drawn(case)
    found = curvature_operator(model, case[3], batches, kind=kind)
    expected = explicit(kind, case, model, batches) / sum(SIZES)
    assert torch.allclose(found.to_dense(), expected, rtol=0, atol=1e-12 * expected.norm())


def test_linear_regression() -> None:
    inputs, targets = torch.randn(40, 6, dtype=torch.float64), torch.randn(40, 1).double()
    model = nn.Linear(6, 1, bias=False).double()
    exact = 2 * inputs.T @ inputs / 40
    for kind in ("hessian", "ggn"):
        found = curvature_operator(model, nn.MSELoss(), (inputs, targets), kind=kind)
        assert torch.allclose(found.to_dense(), exact, rtol=0, atol=1e-12)
    values = torch.linalg.eigvalsh(exact).flip(0)
    assert torch.allclose(eigenpairs(found, 6).values, values, rtol=0, atol=1e-12)


def test_logistic_regression() -> None:
    inputs, targets = torch.randn(40, 6, dtype=torch.float64), torch.randint(2, (40, 1)).double()
    model = nn.Linear(6, 1, bias=False).double()
    found = curvature_operator(model, nn.BCEWithLogitsLoss(), (inputs, targets))
    p = model(inputs).sigmoid().detach()
    exact = inputs.T @ (p * (1 - p) * inputs) / 40
    assert torch.allclose(found.to_dense(), exact, rtol=0, atol=1e-12)


def test_softmax_regression() -> None:
    inputs, targets = torch.randn(30, 4, dtype=torch.float64), torch.randint(3, (30,))
    model = nn.Linear(4, 3, bias=False).double()
    found = curvature_operator(model, nn.CrossEntropyLoss(), (inputs, targets))
    p = model(inputs).softmax(dim=1).detach()
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    exact = torch.einsum("nij,nk,nl->ikjl", inner, inputs, inputs).reshape(12, 12) / 30
    assert torch.allclose(found.to_dense(), exact, rtol=0, atol=1e-12)


def test_dropout_is_off_in_products() -> None:
    model = nn.Sequential(nn.Linear(10, 5), nn.Dropout(), nn.ReLU(), nn.Linear(5, 2)).double()
    inputs, targets = torch.rand(12, 10, dtype=torch.float64), torch.randint(2, (12,))
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=3)
    found = curvature_operator(model, nn.CrossEntropyLoss(), loader)
    vector = torch.randn(found.shape[0], dtype=torch.float64)
    assert torch.equal(found @ vector, found @ vector)


def test_a_loader_that_drops_other_samples_each_time_is_refused() -> None:
    model = network(10, 2).double()
    inputs, targets = torch.rand(12, 10, dtype=torch.float64), torch.randint(2, (12,))
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=5, shuffle=True, drop_last=True)
    with pytest.raises(ValueError, match=r"shuffle|differ|same"):
        curvature_operator(model, nn.CrossEntropyLoss(), loader)


def test_a_shuffled_loader_of_batch_normalization_has_the_matrix_of_the_running_statistics() -> (
    None
):
    norm = nn.BatchNorm1d(5)
    nn.init.uniform_(norm.weight)
    model = nn.Sequential(nn.Linear(10, 5), norm, nn.ReLU(), nn.Linear(5, 2)).double()
    inputs, targets = torch.rand(12, 10, dtype=torch.float64), torch.randint(2, (12,))
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=3, shuffle=True)
    whole = curvature_operator(model, nn.CrossEntropyLoss(), (inputs, targets))
    found = curvature_operator(model, nn.CrossEntropyLoss(), loader)
    assert torch.allclose(found.to_dense(), whole.to_dense(), rtol=0, atol=1e-12)
