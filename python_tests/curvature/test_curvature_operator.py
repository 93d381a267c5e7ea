"""The public operator: products and arithmetic against explicit matrices in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

import fastsam
from fastsam.curvature import (
    BatchLoss,
    MatrixOperator,
    OutputLoss,
    curvature_operator,
    eigenpairs,
    operator_spectrum,
)
from fastsam.curvature.data import Batches
from fastsam.curvature.losses import make_model_loss
from fastsam.curvature.sharding import shard_of_samples
from fastsam.distributed import World
from python_tests.curvature.oracles import classification, explicit_hessian, mlp


class Convolutional(nn.Module):
    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.head = nn.Linear(2 * 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).tanh().flatten(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(2, 3, batch_first=True)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x)[0].mean(dim=1))


class Tied(nn.Module):
    """Next tokens, with one matrix for embedding and head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens).tanh())


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: mlp((4, 5, 3)), (4,)),
    "cnn": (Convolutional, (1, 5, 5)),
    "channels-last": (
        lambda: Convolutional(channels=3).to(memory_format=torch.channels_last),
        (3, 5, 5),
    ),
    "rnn": (Recurrent, (4, 2)),
    "attention": (Attention, (3, 4)),
}
CRITERION = nn.CrossEntropyLoss(ignore_index=-100)


def jacobian(function: Callable[[nn.Module], Tensor], model: nn.Module) -> tuple[Tensor, Tensor]:
    """Return outputs, flattened to ``[N, C]``, and their Jacobian ``[N, C, n]``."""
    values = {name: value.detach() for name, value in model.named_parameters()}

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return function(self.model)

    def outputs(parameters: dict[str, Tensor]) -> Tensor:
        state = {f"model.{name}": value for name, value in parameters.items()}
        return functional_call(Whole(), state, ())

    found = torch.func.jacrev(outputs)(values)
    out = outputs(values)
    return out, torch.cat([piece.reshape(*out.shape, -1) for piece in found.values()], dim=-1)


def explicit(
    kind: str, function: Callable[[nn.Module], Tensor], targets: Tensor, model: Any
) -> Tensor:
    """The matrix of a kind for the mean cross-entropy of outputs ``[N, C]`` over valid targets."""
    valid = targets != -100
    count = int(valid.sum())
    if kind == "hessian":
        return explicit_hessian(model, lambda m: CRITERION(function(m), targets))
    out, jac = jacobian(function, model)
    probabilities = out.softmax(dim=-1).detach()
    total = torch.zeros(jac.shape[-1], jac.shape[-1], dtype=torch.float64)
    for p, j, target in zip(probabilities[valid], jac[valid], targets[valid], strict=True):
        if kind == "ggn":
            total += j.T @ (torch.diag(p) - torch.outer(p, p)) @ j
        else:
            slope = (p - F.one_hot(target, len(p))) @ j
            total += torch.outer(slope, slope)
    return (total / count).detach()


@pytest.mark.parametrize("kind", ["hessian", "ggn", "empirical-fisher"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("form", ["tensors", "loader", "dict"])
def test_every_kind_of_every_model_is_the_explicit_matrix(form, name, kind):
    make, shape = MODELS[name]
    model = make().double().eval()
    inputs = torch.randn(7, *shape, dtype=torch.float64)
    targets = torch.tensor([0, 1, 2, -100, 1, 0, 2])
    loss: Any = CRITERION
    data: Any = (inputs, targets)
    if form == "loader":
        data = DataLoader(TensorDataset(inputs, targets), batch_size=3)  # 3, 3, 1
    if form == "dict":
        data = [{"x": inputs[:4], "y": targets[:4]}, {"x": inputs[4:], "y": targets[4:]}]
        loss = OutputLoss(lambda m, batch: m(batch["x"]), lambda batch: batch["y"], CRITERION)
    operator = curvature_operator(model, loss, data, kind=kind)
    expected = explicit(kind, lambda m: m(inputs), targets, model)
    assert operator.kind == kind
    assert operator.weight == 6
    assert torch.allclose(operator.to_dense(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["hessian", "ggn", "empirical-fisher"])
def test_tokens_with_ignored_labels_and_tied_weights(kind):
    model = Tied().double()
    tokens = torch.randint(5, (3, 6))
    labels = tokens.masked_fill(torch.rand(3, 6) < 0.3, -100)
    loss = OutputLoss(
        outputs=lambda m, batch: m(batch["tokens"])[:, :-1].mT,
        targets=lambda batch: batch["labels"][:, 1:],
        criterion=CRITERION,
    )
    operator = curvature_operator(model, loss, {"tokens": tokens, "labels": labels}, kind=kind)
    expected = explicit(
        kind, lambda m: m(tokens)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), model
    )
    assert operator.shape == (15, 15)
    assert torch.allclose(operator.to_dense(), expected, rtol=0, atol=1e-12)


WEIGHTED = nn.CrossEntropyLoss(weight=torch.tensor([1, 5, 20], dtype=torch.float64), ignore_index=0)


@pytest.mark.parametrize("criterion", [CRITERION, WEIGHTED], ids=["plain", "weighted, ignoring"])
@pytest.mark.slow
def test_the_sampled_fisher_matrix_approaches_the_gauss_newton_matrix(criterion):
    """They are equal for cross-entropy; here the mean of 400 samples has 5 % of error left."""
    model, batch = mlp((3, 4, 3)), classification(8, 3, 3)
    ggn = curvature_operator(model, criterion, batch, kind="ggn").to_dense()
    drawn = [
        curvature_operator(model, criterion, batch, kind="mc-fisher", seed=seed).to_dense()
        for seed in range(400)
    ]
    assert float((torch.stack(drawn).mean(dim=0) - ggn).norm() / ggn.norm()) < 0.1
    assert not torch.equal(drawn[0], drawn[1])


def test_drawn_classes_have_the_weight_of_the_true_target():
    """A drawn class that is ignored as a target counts, and one that is rare is not worth more."""
    model, (inputs, _) = mlp((3, 4, 3)), classification(4, 3, 3)
    targets, drawn = torch.tensor([0, 1, 2, 2]), torch.tensor([1, 0, 2, 0])
    loss = make_model_loss(model, WEIGHTED)
    losses, weights = loss.sample_losses((inputs, targets), drawn)
    assert weights.tolist() == [0, 5, 20, 20]
    plain = -model(inputs).log_softmax(dim=1)[range(4), drawn]
    assert torch.allclose(losses, weights * plain, rtol=0, atol=1e-12)


class Agreeing(World):
    """One of several ranks that all read the same."""

    def agree(self, value: object) -> bool:
        return True


def test_batches_without_a_common_length_are_whole_or_refused():
    """Nodes and edges of a graph, for instance: a part of them would be another graph."""
    model, (inputs, targets) = mlp((3, 4, 3)), classification(6, 3, 3)
    batch = {"x": inputs, "edges": torch.zeros(2, 9), "y": targets}
    loss = OutputLoss(outputs=lambda m, b: m(b["x"]), targets=lambda b: b["y"], criterion=CRITERION)
    operator = curvature_operator(model, loss, batch)
    expected = explicit("hessian", lambda m: m(inputs), targets, model)
    assert torch.allclose(operator.to_dense(), expected, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"no common first dimension.*micro_batch requires"):
        curvature_operator(model, loss, batch, micro_batch=4)
    data = Batches([batch, batch], held=True, samples=2, fingerprint="")
    ranks = [Agreeing(rank=rank, world_size=2) for rank in (0, 1)]
    shares = [list(shard_of_samples(data, rank, separable=True)) for rank in ranks]
    assert [[len(part["x"]) for part in share] for share in shares] == [[6], [6]]


def test_vectors_columns_and_dicts():
    model, batch = mlp((3, 4, 3)), classification(8, 3, 3)
    operator = fastsam.curvature_operator(model, CRITERION, batch)
    dense = operator.to_dense()
    vector = torch.randn(len(dense), dtype=torch.float64)
    assert torch.allclose(operator @ vector, dense @ vector, atol=1e-12)
    columns = torch.randn(len(dense), 3, dtype=torch.float64)
    assert torch.allclose(operator @ columns, dense @ columns, atol=1e-12)
    pieces = operator.split(vector)
    assert {name: piece.shape for name, piece in pieces.items()} == {
        name: value.shape for name, value in model.named_parameters()
    }
    assert torch.equal(operator.join(pieces), vector)
    product = operator @ pieces
    assert torch.allclose(operator.join(product), dense @ vector, atol=1e-12)
    scipy = operator.to_scipy()
    assert torch.allclose(torch.from_numpy(scipy @ vector.numpy()), dense @ vector, atol=1e-12)
    with pytest.raises(ValueError, match="multiplies"):
        operator @ vector[:-1]
    with pytest.raises(ValueError, match=r"no tensor for '2\.bias'"):
        operator @ {name: piece for name, piece in pieces.items() if name != "2.bias"}
    with pytest.raises(ValueError, match="named 'other'"):
        operator @ {**pieces, "other": vector}
    with pytest.raises(ValueError, match=r"'0\.bias' has shape"):
        operator @ {**pieces, "0.bias": vector}
    with pytest.raises(ValueError, match="exceeds the limit of 10"):
        operator.to_dense(limit=10)


def test_arithmetic_is_that_of_matrices():
    model, batch = mlp((3, 4, 3)), classification(8, 3, 3)
    a = curvature_operator(model, CRITERION, batch)
    b = curvature_operator(model, CRITERION, batch, kind="ggn")
    x, y = a.to_dense(), b.to_dense()
    eye = torch.eye(len(x), dtype=torch.float64)
    for operator, matrix in (
        (a + b, x + y),
        (a - b, x - y),
        (2.5 * a, 2.5 * x),
        (-(a * 3.0), -3 * x),
        (a.shifted(0.5), x + 0.5 * eye),
        ((a - b).shifted(-1.0) * 2, 2 * (x - y - eye)),
        (a.block(slice(2, 9)), x[2:9, 2:9]),
        (a.block(torch.tensor([7, 0, 3])), x[[7, 0, 3]][:, [7, 0, 3]]),
    ):
        assert torch.allclose(operator.to_dense(), matrix, rtol=0, atol=1e-12)
    directions = torch.randn(2, len(x), dtype=torch.float64)
    basis = torch.linalg.qr(directions.T).Q
    project = eye - basis @ basis.T
    assert torch.allclose(a.deflated(directions).to_dense(), project @ x @ project, atol=1e-12)
    twice = torch.cat([directions, directions[:1], 0 * directions[:1]])
    assert torch.allclose(a.deflated(twice).to_dense(), project @ x @ project, atol=1e-12)
    with pytest.raises(TypeError, match=r"added to an operator, got int; operator\.shifted"):
        a + 1  # type: ignore[operator]
    with pytest.raises(TypeError, match="multiplied by a number"):
        a * b  # type: ignore[operator]
    with pytest.raises(ValueError, match="indices must be distinct"):
        a.block(torch.tensor([1, 2, 1]))
    with pytest.raises(ValueError, match="different shape"):
        a + MatrixOperator(torch.eye(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="different dtype"):
        a + MatrixOperator(torch.eye(len(x)))
    with pytest.raises(ValueError, match="vectors must have shape"):
        a.deflated(directions.T)


def test_blocks_by_layer_are_the_operators_of_their_parameters():
    model, batch = mlp((3, 4, 3)), classification(8, 3, 3)
    whole = curvature_operator(model, CRITERION, batch)
    alone = curvature_operator(model, CRITERION, batch, params=["2"])
    assert torch.allclose(whole.block_of("2").to_dense(), alone.to_dense(), atol=1e-12)
    both = whole.block_of("0.bias", "2.weight")
    assert both.shape == (4 + 12, 4 + 12)
    with pytest.raises(ValueError, match="named 'nothing'"):
        whole.block_of("nothing")


def test_products_leave_no_trace_and_belong_to_the_weights_of_their_making():
    model = Convolutional().double().train()
    inputs, targets = torch.randn(6, 1, 5, 5).double(), torch.randint(3, (6,))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    operator = curvature_operator(model, CRITERION, (inputs, targets))
    first = operator.to_dense()
    random = torch.get_rng_state()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        again = operator.to_dense()
    assert torch.equal(first, again)
    assert model.training
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        model.head.weight.mul_(2)
    assert torch.equal(operator.to_dense(), first)


def test_spectra_and_eigenpairs_take_the_operator():
    model, batch = mlp((3, 6, 4)), classification(20, 3, 4)
    operator = curvature_operator(model, CRITERION, batch)
    values = torch.linalg.eigvalsh(operator.to_dense())
    assert operator_spectrum(operator, steps=60).lambda_max == pytest.approx(float(values[-1]))
    pairs = eigenpairs(operator, 3, tol=1e-10)
    assert pairs.values.tolist() == pytest.approx(values.flip(0)[:3].tolist())
    rest = eigenpairs(operator.deflated(pairs.vectors), 1, tol=1e-10)
    assert float(rest.values[0]) == pytest.approx(float(values[-4]))


def test_kinds_that_need_outputs_refuse_a_batch_loss():
    model, batch = mlp((3, 4, 3)), classification(8, 3, 3)
    loss = BatchLoss(lambda m, data: (F.cross_entropy(m(data[0]), data[1]), 1.0))
    assert curvature_operator(model, loss, batch).shape == (31, 31)
    with pytest.raises(ValueError, match="OutputLoss"):
        curvature_operator(model, loss, batch, kind="ggn")
    with pytest.raises(ValueError, match="kind must be one of"):
        curvature_operator(model, loss, batch, kind="fisher")
    with pytest.raises(ValueError, match="shard='samples'"):
        curvature_operator(model, loss, batch, shard="probes")
