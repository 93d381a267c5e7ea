"""Loss surfaces: closed forms, normalization, files, and hostile input."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastsam.curvature import (
    BatchLoss,
    OutputLoss,
    Surface,
    curvature_operator,
    eigenpairs,
    loss_surface,
    negative_curvature,
    random_directions,
)
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


def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs.argmax(dim=1) == targets).double().mean()


def test_a_plane_through_a_quadratic():
    model, batch = regression(5, 13)
    loss, gradient, hessian = taylor(model, batch)
    loader = DataLoader(TensorDataset(*batch), batch_size=4)  # an uneven last batch
    flat = torch.randn(2, 5, dtype=torch.float64)
    surface = loss_surface(model, QUADRATIC, loader, flat, span=1.5, points=4)
    assert surface.losses.shape == (4, 4)
    assert np.allclose(surface.coordinates[0], np.linspace(-1.5, 1.5, 4))
    for i, a in enumerate(surface.coordinates[0]):
        for j, b in enumerate(surface.coordinates[1]):
            expected = loss + increase(gradient, hessian, a * flat[0] + b * flat[1])
            assert surface.losses[i, j] == pytest.approx(expected, rel=1e-12)
    assert surface.loss == pytest.approx(loss, rel=1e-12)
    assert surface.norms == pytest.approx(flat.norm(dim=1).tolist())
    assert surface.cosine == pytest.approx(float(F.cosine_similarity(flat[0], flat[1], dim=0)))
    assert surface.metrics is None


def test_a_line_along_an_eigenvector():
    """Along an eigenvector of a quadratic, the second difference is the eigenvalue."""
    model, batch = regression(6, 17)
    hessian = curvature_operator(model, QUADRATIC, batch)
    pairs = eigenpairs(hessian, 1, tol=1e-10, progress=False)
    for direction in (pairs.vectors, pairs.vectors[0], hessian.split(pairs.vectors[0])):
        surface = loss_surface(model, QUADRATIC, batch, direction, span=0.5, points=3)
        before, here, after = surface.losses
        assert (before - 2 * here + after) / 0.25 == pytest.approx(float(pairs.values[0]))
        assert here == pytest.approx(surface.loss)
        assert surface.cosine is None


def test_a_direction_of_chosen_parameters():
    model, batch = mlp((3, 5, 4)), classification(20, 3, 4)
    found = negative_curvature(model, F.cross_entropy, batch, params=["2"], progress=False)
    partial = loss_surface(model, F.cross_entropy, batch, found.direction, points=3)
    flat = torch.cat([piece.reshape(-1) for piece in found.direction.values()])
    chosen = loss_surface(model, F.cross_entropy, batch, flat, points=3, params=["2"])
    assert np.allclose(partial.losses, chosen.losses, rtol=1e-13)
    assert partial.norms == pytest.approx((1.0,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_filters_of_random_directions_have_the_norms_of_the_weights(dtype, seed):
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(20, 3))
    model.to(dtype)
    with torch.no_grad():
        model[3].weight[1] = 0
    directions = random_directions(model, 3, seed=seed)
    for direction in directions:
        assert list(direction) == [name for name, _ in model.named_parameters()]
        for name, value in model.named_parameters():
            piece = direction[name]
            assert piece.dtype is torch.float32
            if value.ndim > 1:
                wanted = value.detach().float().flatten(1).norm(dim=1)
                assert torch.allclose(piece.flatten(1).norm(dim=1), wanted, rtol=1e-5)
            else:
                assert not piece.any()
    raw = random_directions(model, 1, seed=seed, normalize="none")[0]
    layer = random_directions(model, 1, seed=seed, normalize="layer")[0]
    for name, value in model.named_parameters():
        assert float(layer[name].norm()) == pytest.approx(
            float(value.detach().float().norm()), rel=1e-4
        )
        if value.ndim > 1 and name != "3.weight":
            cosine = F.cosine_similarity(raw[name].flatten(1), directions[0][name].flatten(1))
            assert torch.allclose(cosine, torch.ones(len(value)), atol=1e-5)
    again = random_directions(model, 1, seed=seed)[0]
    assert same([*again.values()], [*directions[0].values()])
    assert not torch.equal(directions[0]["0.weight"], directions[1]["0.weight"])


def test_random_directions_are_gaussian(seed):
    model = nn.Linear(100, 100)
    drawn = random_directions(model, 2, seed=seed, normalize="none")
    values = torch.cat([piece.reshape(-1) for found in drawn for piece in found.values()])
    assert abs(float(values.mean())) < 5 / math.sqrt(len(values))
    assert abs(float(values.square().mean()) - 1) < 5 * math.sqrt(2 / len(values))


def test_normalization_of_given_directions(seed):
    """Normalizing raw draws in the surface is the same as drawing normalized directions."""
    model, batch = mlp((3, 5, 4)), classification(20, 3, 4)
    raw = random_directions(model, 2, seed=seed, normalize="none")
    ready = random_directions(model, 2, seed=seed)
    first = loss_surface(model, F.cross_entropy, batch, raw, points=3, normalize="filter")
    second = loss_surface(model, F.cross_entropy, batch, ready, points=3)
    assert np.allclose(first.losses, second.losses, rtol=1e-13)
    again = loss_surface(model, F.cross_entropy, batch, ready, points=3, normalize="filter")
    assert np.allclose(first.losses, again.losses, rtol=1e-13)


def test_filter_normalization_removes_the_scale_of_layers(seed):
    """Li et al., section 4: rescaled ReLU networks have the same surface."""
    inputs, targets = classification(20, 3, 4)
    model = nn.Sequential(
        nn.Linear(3, 6, bias=False), nn.ReLU(), nn.Linear(6, 4, bias=False)
    ).double()
    before = loss_surface(
        model, F.cross_entropy, (inputs, targets), random_directions(model, seed=seed), points=3
    )
    with torch.no_grad():
        model[0].weight *= 7
        model[2].weight /= 7
    after = loss_surface(
        model, F.cross_entropy, (inputs, targets), random_directions(model, seed=seed), points=3
    )
    assert np.allclose(before.losses, after.losses, rtol=1e-10)


def test_metrics_in_every_form():
    model, (inputs, targets) = mlp((3, 5, 4)), classification(20, 3, 4)
    direction = random_directions(model, 1)
    expected = []
    for a in (-1.0, 0.0, 1.0):
        moved = {
            name: value.detach() + a * direction[0][name]
            for name, value in model.named_parameters()
        }
        outputs = torch.func.functional_call(model, moved, (inputs,))
        expected.append(float(accuracy(outputs, targets)))
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=7)
    outputs_of = OutputLoss(lambda m, b: m(b[0]), lambda b: b[1], nn.CrossEntropyLoss())
    summed = BatchLoss(lambda m, b: (F.cross_entropy(m(b[0]), b[1], reduction="sum"), len(b[1])))
    counted = BatchLoss(lambda m, b: (accuracy(m(b[0]), b[1]) * len(b[1]), len(b[1])))
    losses = []
    for loss_fn, metric in (
        (nn.CrossEntropyLoss(), accuracy),
        (outputs_of, accuracy),
        (summed, counted),
        (nn.CrossEntropyLoss(), counted),
    ):
        surface = loss_surface(model, loss_fn, loader, direction, points=3, metric=metric)
        assert np.allclose(surface.metrics, expected)
        losses.append(surface.losses)
    assert np.allclose(losses, losses[0])
    with pytest.raises(TypeError, match="which a BatchLoss does not have"):
        loss_surface(model, summed, loader, direction, metric=accuracy)
    with pytest.raises(TypeError, match="metric must be a function"):
        loss_surface(model, nn.CrossEntropyLoss(), loader, direction, metric=0.5)


def test_the_model_does_not_change():
    model = network()
    batch = classification(20, 3, 4, dtype=torch.float32)
    loader = DataLoader(TensorDataset(*batch), batch_size=8, shuffle=True)
    before = everything(model)
    directions = random_directions(model)
    assert "0.bias" not in directions[0]
    surface = loss_surface(model, F.cross_entropy, loader, directions, points=3, metric=accuracy)
    assert same(before, everything(model))
    reference = F.cross_entropy(model.eval()(batch[0]), batch[1]).detach()
    assert surface.losses[1, 1] == pytest.approx(float(reference), rel=1e-5)

    def fails(outputs, targets):
        raise KeyboardInterrupt

    model.train()
    before = everything(model)
    with pytest.raises(KeyboardInterrupt):
        loss_surface(model, fails, loader, directions)
    assert same(before, everything(model))


def test_an_interrupted_surface_continues(tmp_path):
    model, batch = mlp((3, 5, 4)), classification(20, 3, 4)
    directions = random_directions(model)
    whole_loss, whole_calls = interrupted_at(0, KeyboardInterrupt)
    whole = loss_surface(model, whole_loss, batch, directions, points=4)
    path = tmp_path / "new" / "surface.json"
    loss, _ = interrupted_at(10, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        loss_surface(model, loss, batch, directions, points=4, path=path)
    done = sum(value is not None for value in json.loads(path.read_text())["losses"])
    assert 0 < done < 16
    with pytest.raises(ValueError, match=f"has {done} of 16 points; repeat the call"):
        Surface.load(path)
    rest_loss, rest_calls = interrupted_at(0, KeyboardInterrupt)
    rest = loss_surface(model, rest_loss, batch, directions, points=4, path=path)
    assert len(rest_calls) == len(whole_calls) - done
    assert np.array_equal(rest.losses, whole.losses)
    read = Surface.load(path)
    assert np.array_equal(read.losses, whole.losses)
    assert (read.norms, read.cosine, read.fingerprint) == (
        whole.norms,
        whole.cosine,
        whole.fingerprint,
    )


def error_rate(outputs, targets):
    return (outputs.argmax(dim=1) != targets).double().mean()


def test_a_file_with_another_metric_is_refused(tmp_path):
    model, batch = mlp((3, 5, 4)), classification(21, 3, 4)
    direction = random_directions(model, 1)
    path = tmp_path / "surface.json"
    options = {"points": 3, "path": path, "progress": False}
    found = loss_surface(model, F.cross_entropy, batch, direction, metric=accuracy, **options)
    expected = float(accuracy(model(batch[0]), batch[1]))
    assert found.metric == found.metrics[1] == pytest.approx(expected)
    before = path.read_bytes()
    for metric in (error_rate, None):
        with pytest.raises(ValueError, match="other points"):
            loss_surface(model, F.cross_entropy, batch, direction, metric=metric, **options)
    assert path.read_bytes() == before
    found.save(path)  # a saved surface can be continued, too
    again = loss_surface(model, F.cross_entropy, batch, direction, metric=accuracy, **options)
    assert np.array_equal(again.metrics, found.metrics)
    assert Surface.load(path).metric == found.metric


def test_a_file_of_another_surface_is_refused(tmp_path):
    model, batch = mlp((3, 5, 4)), classification(20, 3, 4)
    directions = random_directions(model)
    path = tmp_path / "surface.json"
    common = {"points": 3, "path": path}
    first = loss_surface(model, F.cross_entropy, batch, directions, **common)
    content = path.read_bytes()
    other = mlp((3, 5, 4))
    more = (batch[0] + 1, batch[1])
    for arguments, options in (
        ((other, F.cross_entropy, batch, directions), {}),
        ((model, F.cross_entropy, more, directions), {}),
        ((model, F.cross_entropy, batch, random_directions(model, seed=1)), {}),
        ((model, F.cross_entropy, batch, directions[:1]), {}),
        ((model, nn.CrossEntropyLoss(label_smoothing=0.1), batch, directions), {}),
        ((model, F.cross_entropy, batch, directions), {"span": 2.0}),
        ((model, F.cross_entropy, batch, directions), {"metric": accuracy}),
        ((model, F.cross_entropy, batch, directions), {"dtype": torch.float32}),
    ):
        with pytest.raises(ValueError, match="holds the losses of other points"):
            loss_surface(*arguments, **common, **options)
    assert path.read_bytes() == content
    again = loss_surface(model, F.cross_entropy, batch, directions, **common)
    assert np.array_equal(first.losses, again.losses)


def test_damaged_and_foreign_files(tmp_path):
    model, batch = mlp((3, 5, 4)), classification(20, 3, 4)
    path = tmp_path / "surface.json"
    surface = loss_surface(model, F.cross_entropy, batch, random_directions(model, 1), points=3)
    surface.save(path)
    assert np.array_equal(Surface.load(path).losses, surface.losses)
    text = path.read_text()
    for damaged in (text[:-20], text.replace('"loss"', '"lost"'), "[]", "{}", '{"losses": []}'):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"surface\.json was not written by fastsam"):
            Surface.load(path)
        with pytest.raises(ValueError, match=r"surface\.json was not written by fastsam"):
            loss_surface(model, F.cross_entropy, batch, random_directions(model, 1), path=path)
    path.write_text('{"fastsam_surface": 1, "losses": [1.0]}')
    with pytest.raises(ValueError, match=r"surface\.json is damaged: KeyError"):
        Surface.load(path)
    with pytest.raises(FileNotFoundError):
        Surface.load(tmp_path / "none.json")
    for name in ("surface.npz", "surface"):
        with pytest.raises(ValueError, match=r"must be a \.json file"):
            surface.save(tmp_path / name)


def test_losses_that_are_not_finite_are_kept_and_masked(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    model = nn.Linear(2, 1, bias=False).double()
    batch = torch.ones(3, 2, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
    direction = torch.ones(2, dtype=torch.float64)

    def loss(outputs, targets):  # infinite for large outputs, NaN for very large ones
        value = outputs.square().mean()
        far = torch.where(value > 1e4, torch.nan, torch.inf).to(value)
        return torch.where(value < 100, value, far)

    surface = loss_surface(model, loss, batch, direction, span=100, points=41)
    assert np.isnan(surface.losses).any()
    assert np.isinf(surface.losses).any()
    assert np.isfinite(surface.losses).any()
    surface.save(tmp_path / "s.json")
    assert np.array_equal(Surface.load(tmp_path / "s.json").losses, surface.losses, equal_nan=True)
    (drawn,) = [line for line in surface.plot().lines if len(line.get_xdata()) == 41]
    assert np.ma.masked_invalid(drawn.get_ydata()).count() == np.isfinite(surface.losses).sum()
    second = torch.tensor([1.0, -2.0], dtype=torch.float64)
    loss_surface(model, loss, batch, [direction, second], span=100, points=5).plot()
    with torch.no_grad():
        model.weight.fill_(1e9)
    nowhere = loss_surface(model, loss, batch, direction, points=3)
    with pytest.raises(ValueError, match="no value is finite"):
        nowhere.plot()


def test_figures(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    model, batch = mlp((3, 5, 4)), classification(20, 3, 4)
    directions = random_directions(model)
    surface = loss_surface(model, F.cross_entropy, batch, directions, points=5, metric=accuracy)
    axes = surface.plot(levels=7)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("direction 0", "direction 1")
    assert surface.plot(axes.figure.subplots(), metric=True).figure is axes.figure
    line = loss_surface(model, F.cross_entropy, batch, directions[0], points=5)
    drawn = line.plot().lines[0]
    assert np.array_equal(drawn.get_ydata(), line.losses)
    with pytest.raises(ValueError, match="no metric"):
        line.plot(metric=True)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"points": 1}, ValueError, "points must be at least 2, got 1"),
        ({"points": 2.0}, TypeError, "points must be an integer"),
        ({"span": 0}, ValueError, "span must be above 0, got 0"),
        ({"span": -1.0}, ValueError, "span must be"),
        ({"span": math.inf}, ValueError, "span must be"),
        ({"span": math.nan}, ValueError, "span must be"),
        ({"span": "1"}, TypeError, "span must be a number"),
        ({"normalize": "filters"}, ValueError, "normalize must be one of none, filter, layer"),
        ({"path": "surface.npz"}, ValueError, r"path must be a \.json file"),
        ({"params": ["5"]}, ValueError, "no parameter or layer named '5'"),
        ({"dtype": torch.float16}, ValueError, "dtype must be"),
        ({"data": []}, ValueError, "data has no batch"),
        ({"data": (torch.zeros(0, 3), torch.zeros(0).long())}, ValueError, "with samples"),
        ({"data": (torch.zeros(2, 3), torch.full((2,), -100))}, ValueError, "total weight 0"),
        ({"directions": []}, ValueError, "one or two directions, got 0"),
        ({"directions": torch.ones(3, 44)}, ValueError, "one or two directions, got 3"),
        ({"directions": torch.ones(43)}, ValueError, r"shape \(43,\), expected \(44,\)"),
        ({"directions": torch.zeros(44)}, ValueError, "direction 0 has the norm 0.0"),
        ({"directions": torch.full((44,), math.nan)}, ValueError, "has the norm nan"),
        ({"directions": [torch.ones(44), -2 * torch.ones(44)]}, ValueError, "are parallel"),
        ({"directions": ["0.weight"]}, TypeError, "direction 0 must be a mapping"),
        ({"directions": {"0.wait": torch.ones(5, 3)}}, ValueError, "named '0.wait'; they are 0.w"),
        ({"directions": {"0.weight": torch.ones(3, 5)}}, ValueError, r"shape \(3, 5\), expected"),
        (
            {"directions": {"0.bias": torch.ones(5)}, "normalize": "filter"},
            ValueError,
            "norm 0.0 after normalize='filter'",
        ),
    ],
)
def test_hostile_arguments(options, error, match):
    options = dict(options)
    model = mlp((3, 5, 4))
    data = options.pop("data", classification(20, 3, 4))
    directions = options.pop("directions", random_directions(model))
    with pytest.raises(error, match=match):
        loss_surface(model, F.cross_entropy, data, directions, **options)


def test_hostile_random_directions():
    model = mlp((3, 5, 4))
    with pytest.raises(ValueError, match="count must be at least 1"):
        random_directions(model, 0)
    with pytest.raises(ValueError, match="normalize must be one of"):
        random_directions(model, normalize="weights")
    with pytest.raises(ValueError, match="named 'x'"):
        random_directions(model, params=["x"])


def test_a_random_loss_is_refused():
    model, batch = mlp((3, 5, 4)), classification(20, 3, 4)

    def noisy(outputs, targets):
        return F.cross_entropy(F.dropout(outputs), targets)

    with pytest.raises(ValueError, match="the loss is random"):
        loss_surface(model, noisy, batch, random_directions(model))
