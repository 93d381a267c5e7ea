"""The loss between two checkpoints: closed forms, buffers, files, and hostile input."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastsam.curvature import LossPath, loss_path
from python_tests.curvature.landscapes import (
    QUADRATIC,
    everything,
    increase,
    network,
    regression,
    same,
    taylor,
)
from python_tests.curvature.oracles import classification, interrupted_at, mlp


def other_network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Another network of the same architecture with other statistics."""
    model = network(dtype)
    model.train()(3 * torch.randn(16, 3, dtype=dtype) + 1)
    return model


def reference(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(copy.deepcopy(model).eval()(batch[0]), batch[1]))


def test_a_path_through_a_quadratic():
    (model, batch), (end, _) = regression(5, 13), regression(5, 13)
    loss, gradient, hessian = taylor(model, batch)
    difference = (end.weight - model.weight).detach()[0]
    states = model.state_dict(), end.state_dict()
    path = loss_path(nn.Linear(5, 1, bias=False), QUADRATIC, batch, *states, points=7)
    expected = [loss + increase(gradient, hessian, t * difference) for t in path.positions]
    # The model has float32 weights, so the run is in float32.
    assert np.allclose(path.losses, expected, rtol=1e-5)
    path = loss_path(model, QUADRATIC, batch, *states, points=7)
    assert np.allclose(path.losses, expected, rtol=1e-12)
    assert path.distance == pytest.approx(float(difference.norm()), rel=1e-12)
    assert np.allclose(path.positions, np.linspace(0, 1, 7))
    # A convex loss is below the line: the excess is -t (1 - t) / 2 d'Hd.
    bend = float(difference @ hessian @ difference) / 2
    assert np.allclose(path.excess, -path.positions * (1 - path.positions) * bend, atol=1e-10)
    assert path.barrier == 0


def test_a_barrier_between_two_minima():
    """w -> (w^2 - 1)^2 has minima of height 0 at -1 and 1, and a barrier of height 1 at 0."""
    model = nn.Linear(1, 1, bias=False).double()
    batch = torch.ones(2, 1, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)

    def loss(outputs, targets):
        return (outputs.square() - targets).square().mean()

    ends = ({"weight": torch.full((1, 1), value, dtype=torch.float64)} for value in (-1.0, 1.0))
    path = loss_path(model, loss, batch, *ends, points=11)
    assert path.barrier == pytest.approx(1)
    assert path.barrier_position == pytest.approx(0.5)


@pytest.mark.parametrize("buffers", ["interpolate", "first", "second", "model"])
def test_buffers(buffers):
    first, second, model = (other_network() for _ in range(3))
    batch = classification(20, 3, 4)
    path = loss_path(
        model, F.cross_entropy, batch, first.state_dict(), second.state_dict(), points=4,
        buffers=buffers,
    )  # fmt: skip
    parameters = dict(first.named_parameters())
    for t, loss in zip(path.positions, path.losses, strict=True):
        state = {}
        for name, start in first.state_dict().items():
            end = second.state_dict()[name]
            if name in parameters or (buffers == "interpolate" and start.is_floating_point()):
                state[name] = (1 - t) * start + t * end
            else:
                source = {"first": first, "second": second, "model": model}.get(buffers, first)
                state[name] = source.state_dict()[name]
        moved = copy.deepcopy(model)
        moved.load_state_dict(state)
        assert loss == pytest.approx(reference(moved, batch), rel=1e-10)
    ends = reference(first, batch), reference(second, batch)
    exact = [path.losses[0] == pytest.approx(ends[0]), path.losses[-1] == pytest.approx(ends[1])]
    expected = {"interpolate": [True, True], "first": [True, False], "second": [False, True]}
    assert exact == expected.get(buffers, [False, False])
    assert path.buffers == buffers


def test_a_frozen_parameter_moves_and_a_tied_one_once():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3, bias=False)
            self.second = nn.Linear(3, 3, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x).tanh())

    first, second, middle = (Tied().double() for _ in range(3))
    first.first.weight.requires_grad_(False)
    batch = classification(20, 3, 3)
    path = loss_path(
        first, F.cross_entropy, batch, first.state_dict(), second.state_dict(), points=3
    )
    with torch.no_grad():
        middle.first.weight.copy_((first.first.weight + second.first.weight) / 2)
    assert path.losses[1] == pytest.approx(reference(middle, batch))
    difference = (first.first.weight - second.first.weight).detach()
    assert path.distance == pytest.approx(float(difference.norm()))


def test_the_model_and_the_states_do_not_change():
    model, end = network(), other_network(torch.float32)
    states = dict(model.named_parameters()) | dict(model.named_buffers()), end.state_dict()
    copies = copy.deepcopy(states)
    batch = classification(20, 3, 4, dtype=torch.float32)
    before = everything(model)
    loss_path(model, F.cross_entropy, batch, *states, points=3)
    assert same(before, everything(model))
    assert same(copies, states)


def test_an_interrupted_path_continues(tmp_path):
    first, second = mlp((3, 5, 4)), mlp((3, 5, 4))
    batch = classification(20, 3, 4)
    states = first.state_dict(), second.state_dict()
    file = tmp_path / "path.json"
    whole = loss_path(first, interrupted_at(0, KeyboardInterrupt)[0], batch, *states, points=6)
    loss = interrupted_at(7, KeyboardInterrupt)[0]
    with pytest.raises(KeyboardInterrupt):
        loss_path(first, loss, batch, *states, points=6, path=file)
    with pytest.raises(ValueError, match="of 6 points"):
        LossPath.load(file)
    # The weights of the model do not matter.
    rest_loss, calls = interrupted_at(0, KeyboardInterrupt)
    rest = loss_path(mlp((3, 5, 4)), rest_loss, batch, *states, points=6, path=file)
    assert len(calls) < 6 + 3
    assert np.array_equal(rest.losses, whole.losses)
    read = LossPath.load(file)
    assert np.array_equal(read.losses, whole.losses)
    assert (read.distance, read.buffers) == (whole.distance, whole.buffers)
    whole.save(tmp_path / "saved.json")
    assert np.array_equal(LossPath.load(tmp_path / "saved.json").excess, whole.excess)
    for changed, options in ((reversed(states), {}), (states, {"buffers": "first"})):
        with pytest.raises(ValueError, match="holds the losses of other points"):
            loss_path(first, rest_loss, batch, *changed, points=6, path=file, **options)


def test_metric_and_figure(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    first, second = mlp((3, 5, 4)), mlp((3, 5, 4))
    batch = classification(20, 3, 4)
    path = loss_path(
        first, F.cross_entropy, batch, first.state_dict(), second.state_dict(), points=3,
        metric=lambda outputs, targets: (outputs.argmax(1) == targets).double().mean(),
    )  # fmt: skip
    expected = (second(batch[0]).argmax(1) == batch[1]).double().mean()
    assert path.metrics[-1] == pytest.approx(float(expected))
    axes = path.plot(label="$a$")
    assert np.array_equal(axes.lines[0].get_ydata(), path.losses)
    assert axes.get_legend().get_texts()[0].get_text() == r"\$a\$"


def test_hostile_arguments():
    model, batch = mlp((3, 5, 4)), classification(20, 3, 4)
    state = model.state_dict()

    def call(first=state, second=state, **options):
        return loss_path(model, F.cross_entropy, batch, first, second, **options)

    with pytest.raises(ValueError, match="points must be at least 2, got 1"):
        call(points=1)
    with pytest.raises(ValueError, match="buffers must be one of interpolate, first"):
        call(buffers="both")
    with pytest.raises(TypeError, match="first must be a state"):
        call(first=model)
    with pytest.raises(ValueError, match=r"second state has no tensor '2\.weight'"):
        call(second={name: value for name, value in state.items() if name != "2.weight"})
    with pytest.raises(ValueError, match=r"first state has an unknown tensor 'module"):
        call(first=state | {"module.0.weight": torch.zeros(1)})
    with pytest.raises(
        ValueError, match=r"'0\.bias' of the second state has shape \(4,\), expected"
    ):
        call(second=state | {"0.bias": torch.zeros(4)})
    with pytest.raises(ValueError, match=r"\.json"):
        call(path="path.txt")
    broken = call(second=state | {"0.bias": torch.full((5,), torch.nan)}, points=3)
    assert np.isnan(broken.losses[1:]).all()
    assert np.isnan(broken.barrier)


def accuracy(outputs, targets):
    return (outputs.argmax(dim=1) == targets).double().mean()


def error_rate(outputs, targets):
    return 1 - accuracy(outputs, targets)


def test_a_file_with_another_metric_is_refused(tmp_path):
    first, second = mlp((3, 5, 4)), mlp((3, 5, 4))
    batch = classification(21, 3, 4)
    states = first.state_dict(), second.state_dict()
    file = tmp_path / "path.json"
    options = {"points": 3, "path": file, "progress": False}
    found = loss_path(first, F.cross_entropy, batch, *states, metric=accuracy, **options)
    assert found.metrics[0] == pytest.approx(float(accuracy(first(batch[0]), batch[1])))
    before = file.read_bytes()
    for metric in (error_rate, None):
        with pytest.raises(ValueError, match="other points"):
            loss_path(first, F.cross_entropy, batch, *states, metric=metric, **options)
    assert file.read_bytes() == before
    found.save(file)  # a saved path can be continued, too
    again = loss_path(first, F.cross_entropy, batch, *states, metric=accuracy, **options)
    assert np.array_equal(again.metrics, found.metrics)
