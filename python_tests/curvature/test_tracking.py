"""The curvature during training against dense eigenvalues, and what a tracker costs and changes."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastsam.curvature import BatchLoss, CurvatureTracker, MatrixOperator, read_points
from fastsam.curvature.ends import find_ends
from fastsam.curvature.pace import Pace
from fastsam.curvature.plots import plot_tracking
from python_tests.curvature.oracles import classification, explicit_hessian, mlp

CRITERION = nn.CrossEntropyLoss()


def train(
    model: nn.Module, data: tuple[Tensor, Tensor], steps: int, *, lr: float = 0.2
) -> Iterator[int]:
    """Yield before each step of full-batch gradient descent, whose learning rate is ``lr``."""
    for step in range(steps):
        yield step
        model.zero_grad()
        CRITERION(model(data[0]), data[1]).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= lr * parameter.grad


def dense_ends(
    model: nn.Module, data: tuple[Tensor, Tensor], names: list[str] | None = None
) -> tuple[float, float]:
    """Return the largest and the smallest eigenvalue of the explicit Hessian in float64."""
    inputs, targets = data
    hessian = explicit_hessian(
        copy.deepcopy(model).double().eval(),
        lambda net: CRITERION(net(inputs.double()), targets),
        names,
    )
    values = torch.linalg.eigvalsh(hessian)
    return float(values[-1]), float(values[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_point_has_the_eigenvalues_of_the_explicit_hessian(dtype):
    model, data = mlp(dtype=dtype), classification(30, 3, 4, dtype=dtype)
    tracker = CurvatureTracker(model, CRITERION, data, every=20, budget=None)
    for step in train(model, data, 101):
        for point in tracker.step(lr=0.2):
            largest, smallest = dense_ends(model, data)
            assert point.lambda_max == pytest.approx(largest, rel=0.05)
            assert point.lambda_min == pytest.approx(smallest, rel=0.05)
            assert point.converged
            assert point.step == step
    assert [point.step for point in tracker.points] == [0, 20, 40, 60, 80, 100]
    assert {point.group for point in tracker.points} == {"all"}


def test_groups_of_classes_and_of_layers_are_measured_separately():
    model, (inputs, targets) = mlp(), classification(40, 3, 4)
    tracker = CurvatureTracker(
        model,
        CRITERION,
        (inputs, targets),
        every=1,
        classes={"head": [0, 1], "tail": [3]},
        params={"first": ["0"], "bias": ["2.bias"]},
        tol=1e-6,
    )
    points = {point.group: point for point in tracker.step()}
    assert tuple(points) == tracker.groups
    for group, members in (("head", [0, 1]), ("tail", [3])):
        chosen = torch.isin(targets, torch.tensor(members))
        data = inputs[chosen], targets[chosen]
        for part, names in (("first", ["0.weight", "0.bias"]), ("bias", ["2.bias"])):
            point = points[f"{group}, {part}"]
            largest, smallest = dense_ends(model, data, names)
            assert point.lambda_max == pytest.approx(largest, rel=1e-6)
            assert point.lambda_min == pytest.approx(smallest, abs=1e-6 * largest)
            loss = CRITERION(model(data[0]), data[1])
            assert point.loss == pytest.approx(loss.item())
            gradients = torch.autograd.grad(
                loss, [p for name, p in model.named_parameters() if name in names]
            )
            norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
            assert point.gradient_norm == pytest.approx(float(norm))


def test_samples_are_drawn_once_and_read_once(seed):
    class Once(TensorDataset):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            return super().__getitem__(index)

    model = mlp()
    data = Once(*classification(60, 3, 4))
    tracker = CurvatureTracker(
        model, CRITERION, data, every=1, classes=[1], samples=5, budget=None, seed=seed
    )
    tracker.step()
    read = data.reads
    same = [next(iter(tracker.step())).loss for _ in range(3)]
    assert data.reads == read == 5
    assert len(set(same)) == 1


class Noisy(nn.Module):
    """A network with everything that a measurement could disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 4)
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.norm(self.first(inputs))
        if self.training:
            hidden = hidden + 0.1 * torch.randn_like(hidden)
        return self.last(self.drop(torch.tanh(hidden)))


def test_training_has_the_same_bits_with_and_without_a_tracker(seed):
    inputs, targets = classification(48, 3, 4, dtype=torch.float32)

    def trajectory(tracked: bool) -> list[Any]:
        torch.manual_seed(seed)
        model = Noisy()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        loader = DataLoader(TensorDataset(inputs, targets), batch_size=16, shuffle=True)
        tracker = CurvatureTracker(
            model, CRITERION, loader, every=2, budget=None, classes=[0, 1] if tracked else None
        )
        losses = []
        for _ in range(4):
            for x, y in loader:
                loss = CRITERION(model(x), y)
                loss.backward()
                if tracked:
                    gradients = [p.grad.clone() for p in model.parameters()]
                    tracker.step(lr=0.1)
                    assert all(map(torch.equal, gradients, (p.grad for p in model.parameters())))
                    assert model.training
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        assert len(tracker.points) == (12 if tracked else 0)
        return [losses, model.state_dict(), torch.get_rng_state()]

    plain, tracked = trajectory(False), trajectory(True)
    assert plain[0] == tracked[0]
    assert torch.equal(plain[2], tracked[2])
    for name, value in plain[1].items():
        assert torch.equal(value, tracked[1][name]), name


def test_a_warm_start_needs_fewer_products_than_a_cold_one():
    model, data = mlp((6, 20, 20, 4)), classification(60, 6, 4)
    options = {"every": 10, "budget": None}
    warm = CurvatureTracker(model, CRITERION, data, **options)
    cold = 0
    for step in train(model, data, 101, lr=0.5):
        warm.step()
        if step % 10 == 0 and step > 0:
            (point,) = CurvatureTracker(model, CRITERION, data, **options).step()
            cold += point.products
    assert sum(point.products for point in warm.points[1:]) < 0.9 * cold


def test_an_eigenvector_that_moved_inwards_does_not_hide_the_new_end(seed):
    generator = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(generator.normal(size=(300, 300)))
    values = np.concatenate([[-3.0, -2.0, 8.0, 10.0], generator.uniform(-0.5, 0.5, 296)])
    matrix = torch.from_numpy((rotation * values) @ rotation.T)
    inner = torch.from_numpy(rotation[:, 1:3].T.copy())  # of -2 and 8
    found = find_ends(
        MatrixOperator((matrix + matrix.T) / 2), start=inner, tol=0.02, most_products=200, seed=seed
    )
    assert found.largest == pytest.approx(10, rel=0.02)
    assert found.smallest == pytest.approx(-3, rel=0.02)


@pytest.mark.parametrize("n", [1, 2, 3, 33, 34, 80])
def test_ends_of_operators_of_every_size(n, seed):
    generator = np.random.default_rng(seed)
    square = generator.normal(size=(n, n))
    matrix = torch.from_numpy(square + square.T)
    found = find_ends(MatrixOperator(matrix), start=None, tol=1e-6, most_products=400, seed=seed)
    values = torch.linalg.eigvalsh(matrix)
    scale = float(values.abs().max())
    assert found.converged
    assert found.largest == pytest.approx(float(values[-1]), abs=1e-6 * scale)
    assert found.smallest == pytest.approx(float(values[0]), abs=1e-6 * scale)
    again = find_ends(
        MatrixOperator(matrix), start=found.vectors, tol=1e-6, most_products=400, seed=seed
    )
    assert again.products <= found.products


def test_ends_of_zero_and_of_too_few_products():
    zero = find_ends(
        MatrixOperator(torch.zeros(40, 40)), start=None, tol=0.02, most_products=50, seed=0
    )
    assert (zero.largest, zero.smallest, zero.converged) == (0, 0, True)
    few = find_ends(
        MatrixOperator(torch.diag(torch.linspace(-1, 1, 90))),
        start=None,
        tol=1e-6,
        most_products=5,
        seed=0,
    )
    assert few.products == 5
    assert not few.converged


def test_a_perfectly_fitted_class_is_measured_in_float64():
    """In float32 its curvature is below the resolution, which must not end the training."""
    model = mlp((5, 8, 3), dtype=torch.float32)
    with torch.no_grad():
        model[2].bias.copy_(torch.tensor([16.5, 0.0, 0.0]))
    data = torch.randn(16, 5), torch.zeros(16, dtype=torch.long)
    options = {"every": 1, "tol": 1e-3}
    (point,) = CurvatureTracker(model, CRITERION, data, **options).step()
    largest, smallest = dense_ends(model, data)
    assert largest < 1e-4
    assert point.lambda_max == pytest.approx(largest, rel=1e-3)
    assert point.lambda_min == pytest.approx(smallest, rel=0.05)


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("every", "cost", "budget"), [(5, 3.0, 0.05), (1, 0.5, 0.2), (40, 1.0, 1)])
def test_measurements_wait_until_they_fit_the_budget(every, cost, budget):
    clock = Clock()
    pace = Pace(every=every, budget=budget, clock=clock)
    measured: list[int] = []
    for step in range(1000):
        pace.train()
        due = pace.is_due(step)
        fits = cost * (len(measured) + 1) <= budget * step
        wanted = not measured or (fits and step // every > measured[-1] // every)
        assert due == wanted, step
        if due:
            with pace.measurement(step):
                clock.now += cost
            measured.append(step)
        clock.now += 1.0
        if len(measured) > 1:
            assert pace.measuring_seconds <= budget * (step + 1)
    assert len(measured) > 3
    pace.train()
    assert pace.training_seconds == 1000
    assert pace.overhead == pytest.approx(cost * len(measured) / 1000)


def test_the_tracker_counts_its_own_time():
    clock = Clock()

    def slow(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        clock.now += 0.0 if model.training else 0.1
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum"), 30

    model, data = mlp(), classification(30, 3, 4)
    tracker = CurvatureTracker(model, BatchLoss(slow), data, every=10, budget=0.05, clock=clock)
    assert tracker.overhead == 0
    for _ in train(model, data, 400):
        tracker.step()
        clock.now += 0.1
    assert tracker.points[0].seconds > 0.1
    assert 3 <= len(tracker.points) < 40
    assert 0.02 < tracker.overhead <= 0.05
    gaps = np.diff([point.step for point in tracker.points])
    assert gaps.min() >= 10


def test_a_resumed_run_has_the_points_of_an_uninterrupted_one(tmp_path: Path):
    start, data = mlp(), classification(30, 3, 4)

    def tracker_of(model: nn.Module, name: str) -> CurvatureTracker:
        return CurvatureTracker(
            model,
            CRITERION,
            data,
            every=4,
            budget=None,
            path=tmp_path / name,
            classes=[0, 1],
            clock=Clock(),
        )

    whole = copy.deepcopy(start)
    tracker = tracker_of(whole, "whole")
    for _ in train(whole, data, 30):
        tracker.step(lr=0.2)

    cut = copy.deepcopy(start)
    first = tracker_of(cut, "cut")
    stored = io.BytesIO()
    for step in train(cut, data, 20):
        first.step(lr=0.2)
        if step == 13:
            torch.save([first.state_dict(), cut.state_dict()], stored)
    stored.seek(0)
    state, weights = torch.load(stored, weights_only=True)
    cut.load_state_dict(weights)
    again = tracker_of(cut, "cut")
    again.load_state_dict(state)
    for step in train(cut, data, 30 - 13):
        if step > 0:  # step 13 was tracked before the cut
            again.step(lr=0.2)
    assert again.points == tracker.points
    assert read_points(tmp_path / "cut") == read_points(tmp_path / "whole") == tracker.points


def test_files_of_other_runs_are_kept(tmp_path: Path):
    path = tmp_path / "points.jsonl"
    path.write_text("{}\n")
    tracker = CurvatureTracker(mlp(), CRITERION, classification(9, 3, 4), every=1, path=path)
    with pytest.raises(FileExistsError, match="load_state_dict"):
        tracker.step()
    assert path.read_text() == "{}\n"
    with pytest.raises(ValueError, match=r"line 1 .* step is missing"):
        read_points(path)


def test_a_state_of_another_tracker_is_refused():
    model, data = mlp(), classification(30, 3, 4)
    one = CurvatureTracker(model, CRITERION, data, every=1)
    one.step()
    other = CurvatureTracker(model, CRITERION, data, every=1, classes=[0])
    with pytest.raises(ValueError, match=r"groups all, .* has class 0"):
        other.load_state_dict(one.state_dict())
    smaller = CurvatureTracker(model, CRITERION, data, every=1, params=["0"])
    with pytest.raises(ValueError, match="vectors of 44 parameters for all"):
        smaller.load_state_dict(one.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be at least 1"),
        ({"budget": -0.1}, "budget must be in"),
        ({"budget": float("nan")}, "budget must be in"),
        ({"budget": 0}, "budget must be above 0"),
        ({"tol": 1.0}, "tol must be in"),
        ({"max_products": 0}, "max_products must be at least 1"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"classes": [7]}, "class 7 has no sample"),
        ({"classes": []}, "classes has no class"),
        ({"classes": {"tail": []}}, "no class for the group 'tail'"),
        ({"params": ["3"]}, "no parameter or layer named '3'"),
        ({"params": []}, "selects no parameter"),
        ({"params": {}}, "params has no entry"),
        ({"kind": "fisher"}, "kind must be one of"),
    ],
)
def test_invalid_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        CurvatureTracker(mlp(), CRITERION, classification(9, 3, 2), **{"every": 5, **options})


def test_a_model_without_gradients_and_steps_that_go_back():
    model, data = mlp(), classification(9, 3, 4)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        CurvatureTracker(model.requires_grad_(False), CRITERION, data, every=1)
    tracker = CurvatureTracker(model.requires_grad_(), CRITERION, data, every=1)
    tracker.step(5)
    with pytest.raises(ValueError, match=r"step must be at least 6, .* got 5"):
        tracker.step(5)


def test_the_figure_shows_every_group_the_limit_and_the_marks(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    model, data = mlp(), classification(30, 3, 4)
    tracker = CurvatureTracker(model, CRITERION, data, every=1, budget=None, classes=[0, 2])
    for step in range(3):
        tracker.step(lr=0.1 / (step + 1))
    upper, lower = tracker.plot(marks={"deferral at $2": 1.5}).axes
    drawn = {line.get_label(): line.get_ydata() for line in upper.lines}
    for number, name in enumerate(tracker.groups):
        own = [point for point in tracker.points if point.group == name]
        assert list(drawn[name]) == [point.lambda_max for point in own]
        assert list(lower.lines[number].get_ydata()) == [point.lambda_min for point in own]
    assert list(drawn["2/lr"]) == [20, 40, 60]
    assert [text.get_text() for text in upper.texts] == [r"deferral at \$2"]
    with pytest.raises(ValueError, match="at least one point"):
        plot_tracking([])
