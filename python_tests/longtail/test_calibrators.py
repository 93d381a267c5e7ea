"""Calibrators against their formulas in float64, and a fine grid of temperatures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from fastsam.longtail import Trainer, recipe
from fastsam.longtail.calibrators import CALIBRATORS, TrainedHead
from fastsam.longtail.errors import DataError, TrainingError
from fastsam.longtail.features import Features
from fastsam.longtail.models import CosineHead
from fastsam.longtail.trained import (
    TrainedRun,
    calibrate_run,
    export_run,
    head_scores,
    load_weights,
)
from fastsam.longtail.trained.head_scores import HeadScores

Array = NDArray[np.float64]
COUNTS = np.array([40, 15, 6, 3])
WIDTH = 7
CPU = torch.device("cpu")
TRANSFORMS = ("un", "l2n", "cl2n")


def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape)


def trained_head(scale: float = 1.0) -> TrainedHead:
    head = nn.Linear(WIDTH, len(COUNTS))
    with torch.no_grad():
        head.weight.mul_(torch.tensor([[4.0], [2.0], [1.0], [0.3]]))
    return TrainedHead(head.requires_grad_(requires_grad=False), scale, COUNTS)


def training_features() -> Features:
    """Features as after a ReLU, far from the origin, so that the transforms differ."""
    targets = torch.from_numpy(np.repeat(np.arange(len(COUNTS)), COUNTS))
    middles = 3 + normal(len(COUNTS), WIDTH)
    return Features((middles[targets] + normal(len(targets), WIDTH)).relu(), targets)


def none_needed() -> Features:
    raise AssertionError("this calibrator needs no training features")


def weights_of(trained: TrainedHead) -> tuple[Array, Array]:
    head = trained.module
    assert isinstance(head, nn.Linear)
    return head.weight.double().numpy(), head.bias.double().numpy()


def built(name: str, parameters: dict[str, Any], trained: TrainedHead, values: Any) -> Array:
    return CALIBRATORS[name].build(parameters, trained)(values).double().numpy()


def test_the_calibrators_and_their_grids() -> None:
    assert set(CALIBRATORS) >= {"none", "logit-adjustment", "tau-norm", "nearest-class-mean"}
    wide = (3.5, 4, 5, 6, 8, 10, 12, 16)
    for name, last, steps, more in (("logit-adjustment", 3, 60, wide), ("tau-norm", 2, 20, ())):
        found = list(CALIBRATORS[name].candidates(trained_head(), none_needed))
        expected = [*np.linspace(0, last, steps + 1), *more]
        assert [c["tau"] for c in found] == pytest.approx(expected)
    assert list(CALIBRATORS["none"].candidates(trained_head(), none_needed)) == [{}]


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_none_and_logit_adjustment(scale: float) -> None:
    trained, values = trained_head(scale), normal(9, WIDTH)
    weight, bias = weights_of(trained)
    logits = scale * (values.double().numpy() @ weight.T + bias)
    np.testing.assert_allclose(built("none", {}, trained, values), logits, rtol=1e-5, atol=1e-4)
    for tau in (0.0, 0.35, 3.0):
        expected = logits - tau * np.log(COUNTS / COUNTS.sum())
        found = built("logit-adjustment", {"tau": tau}, trained, values)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_tau_norm_divides_class_vectors_and_leaves_the_bias_out(scale: float) -> None:
    trained, values = trained_head(scale), normal(9, WIDTH)
    weight = weights_of(trained)[0]
    before = {name: value.clone() for name, value in trained.module.state_dict().items()}
    for tau in (0.0, 0.7, 1.0, 2.0):
        vectors = np.stack([w / np.sqrt((w**2).sum()) ** tau for w in weight])
        expected = scale * values.double().numpy() @ vectors.T
        found = built("tau-norm", {"tau": tau}, trained, values)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    after = trained.module.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_tau_normalized_run_has_the_entries_of_its_trained_head(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    config = recipe("digits-lt", "ce", "sgd", epochs=1, model="resnet8").config()
    Trainer(config, out=tmp_path / "run", progress=False).fit()
    found = calibrate_run(TrainedRun.load(tmp_path / "run"), method="tau-norm")
    found.save(tmp_path / "run" / "calibration.json")
    run = TrainedRun.load(tmp_path / "run")
    loaded = load_weights(export_run(run, tmp_path / "model", format="safetensors"))
    images = normal(5, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(loaded.network(images), run.network(images))
    plain = TrainedHead(nn.Linear(WIDTH, 4, bias=False), 1.0, COUNTS)
    assert CALIBRATORS["tau-norm"].build({"tau": 1.0}, plain).state_dict().keys() == {"weight"}


def test_tau_norm_of_a_class_vector_of_zeros() -> None:
    trained = trained_head()
    assert isinstance(trained.module, nn.Linear)
    trained.module.weight[2] = 0
    found = built("tau-norm", {"tau": 1.5}, trained, normal(3, WIDTH))
    assert np.isfinite(found).all()
    assert (found[:, 2] == 0).all()


def test_tau_norm_is_refused_where_it_has_no_meaning() -> None:
    class Wider(nn.Linear):
        """A head that uses the weights of a linear layer differently."""

    refuses = CALIBRATORS["tau-norm"].refuses
    assert refuses(trained_head()) is None
    cosine = refuses(TrainedHead(CosineHead(WIDTH, 4), 30.0, COUNTS))
    assert cosine is not None
    assert "cosine head already" in cosine
    wider = refuses(TrainedHead(Wider(WIDTH, 4), 1.0, COUNTS))
    assert wider is not None
    assert "requires a linear head (nn.Linear), but this run has Wider" in wider
    for name in ("none", "logit-adjustment", "nearest-class-mean"):
        assert CALIBRATORS[name].refuses(TrainedHead(CosineHead(WIDTH, 4), 30.0, COUNTS)) is None


def unit(values: Array) -> Array:
    return np.stack([row / np.sqrt((row**2).sum()) for row in values])


@pytest.mark.parametrize("place", TRANSFORMS)
def test_nearest_class_mean(place: str) -> None:
    trained, training = trained_head(), training_features()
    candidates = list(CALIBRATORS["nearest-class-mean"].candidates(trained, lambda: training))
    assert [c["transform"] for c in candidates] == list(TRANSFORMS)
    values = (3 + normal(9, WIDTH)).relu()
    known, new = training.values.double().numpy(), values.double().numpy()
    if place == "cl2n":
        center = known.mean(axis=0)
        known, new = known - center, new - center
    if place != "un":
        known, new = unit(known), unit(new)
    labels = training.targets.numpy()
    means = [known[labels == c].mean(axis=0) for c in range(len(COUNTS))]
    expected = [[-((row - mean) ** 2).sum() for mean in means] for row in new]
    parameters = candidates[TRANSFORMS.index(place)]
    found = built("nearest-class-mean", parameters, trained, values)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_distances_far_from_the_origin_do_not_cancel() -> None:
    means = 1000 + normal(4, WIDTH, scale=0.1)
    values = 1000 + normal(9, WIDTH, scale=0.1)
    found = built("nearest-class-mean", {"transform": "un", "means": means}, trained_head(), values)
    far = values.double().numpy()[:, None] - means.double().numpy()
    np.testing.assert_allclose(found, -(far**2).sum(axis=2), rtol=1e-2)


def test_a_class_without_a_training_feature_has_no_mean() -> None:
    training = training_features()
    kept = training.targets != 2
    fewer = Features(training.values[kept], training.targets[kept])
    with pytest.raises(DataError, match="class 2 has no readable training image"):
        list(CALIBRATORS["nearest-class-mean"].candidates(trained_head(), lambda: fewer))


# --- scores of heads ----------------------------------------------------------------------------------


def likelihood(logits: Array, targets: NDArray[np.int64], temperature: float) -> float:
    scaled = logits / temperature
    top = scaled.max(axis=1)
    sums = np.log(np.exp(scaled - top[:, None]).sum(axis=1)) + top
    return float((sums - scaled[np.arange(len(targets)), targets]).mean())


def noisy(images: int, classes: int, scale: float) -> tuple[HeadScores, Array]:
    """Scores of informative but imperfect logits; the head is the identity."""
    targets = torch.arange(images) % classes
    logits = normal(images, classes) + 2 * nn.functional.one_hot(targets, classes)
    logits *= scale
    return HeadScores(Features(logits, targets), classes, CPU), logits.double().numpy()


@pytest.mark.parametrize("classes", [2, 10, 300])
@pytest.mark.parametrize("scale", [1e-4, 0.3, 1.0, 25.0, 1e4])
def test_the_temperature_is_the_best_of_a_fine_grid(classes: int, scale: float) -> None:
    scores, logits = noisy(600, classes, scale)
    targets = scores.features.targets.numpy()
    fit = scores.fit_temperature(nn.Identity())
    assert fit.temperature is not None
    coarse = scale * np.exp(np.arange(-3, 3, 0.1))
    best = coarse[int(np.argmin([likelihood(logits, targets, t) for t in coarse]))]
    fine = best * np.exp(np.arange(-0.15, 0.15, 0.001))
    values = [likelihood(logits, targets, t) for t in fine]
    assert fit.temperature == pytest.approx(fine[int(np.argmin(values))], rel=1.1e-3)
    assert fit.nll <= min(values)
    assert fit.nll == pytest.approx(likelihood(logits, targets, fit.temperature), rel=1e-12)


def test_one_wrong_image_by_a_hair_has_a_temperature() -> None:
    logits = torch.tensor([[3.0, 0.0], [0.0, 3.0], [0.0, 1e-6]])
    scores = HeadScores(Features(logits, torch.tensor([0, 1, 0])), 2, CPU)
    fit = scores.fit_temperature(nn.Identity())
    assert fit.temperature is not None
    # The slope is zero where 2 * 3 / (1 + exp(3 / T)) = 1e-6 / (1 + exp(-1e-6 / T)).
    inverse = 1 / fit.temperature
    assert 6 / (1 + np.exp(3 * inverse)) == pytest.approx(1e-6 / (1 + np.exp(-1e-6 * inverse)))


@pytest.mark.parametrize(
    ("logits", "why"),
    [
        ([[1.0, 0.0], [0.0, 1.0]], "every image is right"),
        ([[0.0, 1.0], [1.0, 0.0]], "every image is wrong"),
        ([[0.0, 0.0], [0.0, 0.0]], "the logits say nothing"),
    ],
)
def test_there_may_be_no_best_temperature(logits: list[list[float]], why: str) -> None:
    values = torch.tensor(logits)
    fit = HeadScores(Features(values, torch.arange(2)), 2, CPU).fit_temperature(nn.Identity())
    assert fit.temperature is None, why
    assert fit.nll == pytest.approx(likelihood(values.double().numpy(), np.arange(2), 1.0))


def test_balanced_accuracy_is_the_mean_over_classes_with_images() -> None:
    targets = torch.tensor([0, 0, 0, 0, 2, 2, 2])
    answers = torch.tensor([0, 0, 0, 1, 2, 0, 1])
    logits = nn.functional.one_hot(answers, 4).float()
    found = HeadScores(Features(logits, targets), 4, CPU).balanced_accuracy(nn.Identity())
    assert found == pytest.approx(100 * (3 / 4 + 1 / 3) / 2)


def test_chunks_do_not_change_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, _ = noisy(601, 10, 1.0)
    whole = (scores.balanced_accuracy(nn.Identity()), scores.fit_temperature(nn.Identity()))
    shapes: list[int] = []
    head = nn.Identity()
    head.register_forward_pre_hook(lambda module, inputs: shapes.append(len(inputs[0])))
    monkeypatch.setattr(head_scores, "_LOGITS", 70)
    parts = (scores.balanced_accuracy(head), scores.fit_temperature(head))
    assert max(shapes) == 7
    assert parts[0] == whole[0]
    assert parts[1] == pytest.approx(whole[1], rel=1e-9)


def test_infinite_or_nan_logits_are_not_evaluated() -> None:
    scores, _ = noisy(20, 4, 1.0)
    scores.features.values[3, 2] = float("nan")
    with pytest.raises(TrainingError, match="infinite or NaN"):
        scores.balanced_accuracy(nn.Identity())
