"""Runs that measure their curvature: the measurements, the training, and resumed runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastsam.cli.main import main
from fastsam.curvature import curvature_operator, eigenpairs
from fastsam.longtail import Result, TrainConfig, Trainer, recipe
from fastsam.longtail.checkpoint import Checkpoint
from fastsam.longtail.differences import differences
from fastsam.longtail.errors import CheckpointError, LongTailError, UsageError


def short(**settings: Any) -> TrainConfig:
    """A run of 18 steps that measures the tail at every ninth."""
    values = {
        "model": "resnet8",
        "epochs": 2,
        "track_curvature": 9,
        "curvature_budget": 0.0,
        "curvature_images": 6,
        "curvature_classes": ("tail",),
        **settings,
    }
    return recipe("digits-lt", "ce", "sgd", **values).config()


class StoppedError(Exception):
    """A run that is interrupted."""


@pytest.mark.slow
def test_points_have_the_eigenvalues_of_a_converged_run() -> None:
    config = short(epochs=1, curvature_classes=("0", "tail"))
    trainer = Trainer(config, progress=False)
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    result = trainer.fit()
    points = [point for point in result.curvature if point.step == 0]
    assert [point.group for point in points] == ["0", "tail"]
    assert [point.step for point in result.curvature] == [0, 0, 9, 9]
    assert all(point.lr == result.history[0].lr for point in points)
    model = Trainer(config, progress=False).model
    model.load_state_dict(start)
    images = trainer.data.train
    tail = trainer.data.group_lists()["tail"]
    for point, labels in zip(points, ([0], tail), strict=True):
        members = np.flatnonzero(np.isin(images.targets, labels))
        if len(members) > 6:
            members = np.sort(np.random.default_rng(0).choice(members, 6, replace=False))
        (batch,) = images.batches([members], None, torch.device("cpu"))
        operator = curvature_operator(model, nn.CrossEntropyLoss(), (batch.inputs, batch.targets))
        for end, value in (("largest", point.lambda_max), ("smallest", point.lambda_min)):
            found = eigenpairs(operator, which=end, tol=1e-3, progress=False)
            assert value == pytest.approx(float(found.values[0]), rel=0.05)


def test_tracking_changes_neither_the_training_nor_the_run(tmp_path: Path) -> None:
    plain = short(track_curvature=None)
    tracked = short()
    without = Trainer(plain, out=tmp_path / "plain", progress=False).fit()
    with_points = Trainer(tracked, out=tmp_path / "tracked", progress=False).fit()
    assert without.curvature == []
    assert len(with_points.curvature) == 3  # after 0, 9 and 18 steps
    assert [e.loss for e in with_points.history] == [e.loss for e in without.history]
    assert with_points.test == without.test
    states = [Checkpoint.load(tmp_path / name).model for name in ("plain", "tracked")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert differences(plain.as_dict(), tracked.as_dict()) == []
    assert Result.load(tmp_path / "tracked" / "result.json").curvature == with_points.curvature


def test_a_resumed_run_keeps_its_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsam.longtail.training.saving.EPOCH_SECONDS", 0.0)

    def facts(result: Result) -> list[Any]:
        points = result.curvature
        return [(p.step, p.group, p.lambda_max, p.lambda_min, p.products) for p in points]

    def stop(step: Any) -> None:
        if (step.epoch, step.batch) == (2, 5):
            raise StoppedError

    config = short(track_curvature=7)
    whole = Trainer(config, progress=False).fit()
    with pytest.raises(StoppedError):
        Trainer(config, out=tmp_path, on_step=stop, progress=False).fit()
    assert Checkpoint.load(tmp_path).epoch == 1
    again = Trainer(config, out=tmp_path, resume=True, progress=False).fit()
    assert facts(again) == facts(whole)
    assert {point.step for point in again.curvature} == {0, 7, 14}


def test_a_run_is_resumed_with_other_settings_of_the_curvature(tmp_path: Path) -> None:
    Trainer(short(epochs=1, track_curvature=None), out=tmp_path, progress=False).fit()
    later = Trainer(short(epochs=1), out=tmp_path, resume=True, progress=False)
    assert later.state.curvature.points == []
    tracked = tmp_path / "tracked"
    Trainer(short(epochs=1), out=tracked, progress=False).fit()
    with pytest.raises(CheckpointError, match="groups tail, but this tracker has 1"):
        Trainer(short(epochs=1, curvature_classes=("1",)), out=tracked, resume=True, progress=False)
    off = Trainer(short(epochs=1, track_curvature=None), out=tracked, resume=True, progress=False)
    assert off.state.curvature.points == []


def test_the_loss_of_ldam_is_measured_with_its_scale() -> None:
    config = recipe(
        "digits-lt",
        "ldam-drw",
        "sgd",
        model="resnet8",
        epochs=1,
        track_curvature=100,
        curvature_classes=("tail",),
    ).config()
    trainer = Trainer(config, progress=False)
    network, images = trainer.model, trainer.data.train
    (batch,) = images.batches(
        [np.flatnonzero(np.isin(images.targets, trainer.data.group_lists()["tail"]))],
        None,
        torch.device("cpu"),
    )
    network.eval()
    with torch.no_grad():
        logits = trainer.objective.logit_scale * network(batch.inputs)
    expected = nn.functional.cross_entropy(logits, batch.targets)
    trainer.state.curvature.step(0, 0.1)
    point = next(point for point in trainer.state.curvature.points if point.group == "tail")
    assert point.loss == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"curvature_classes": ("10",)}, "10"),
        ({"curvature_classes": ("tial",)}, "tial"),
        ({"track_curvature": 0}, "track_curvature must be at least 1, got 0"),
        ({"curvature_images": 0}, "curvature_images must be at least 1"),
        ({"curvature_budget": -1.0}, "curvature_budget must be at least 0"),
        ({"curvature_classes": ()}, "curvature_classes"),
    ],
)
def test_invalid_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((UsageError, LongTailError), match=message):
        Trainer(short(**settings), progress=False)


def test_the_command_stores_the_points(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    flags = "--data digits-lt --method ce --optimizer sgd --model resnet8 --epochs 1 --quiet"
    tracking = "--track-curvature 9 --curvature-images 4 --curvature-classes all 0"
    assert main(["train", *flags.split(), *tracking.split(), "--out", str(out)]) == 0
    found = json.loads((out / "result.json").read_text())["curvature"]
    assert [(point["step"], point["group"]) for point in found][:2] == [(0, "all"), (0, "0")]
    assert "track_curvature: 9" in (out / "run.yaml").read_text()
    capsys.readouterr()
