"""Epochs reach TensorBoard and Weights & Biases as they finish; what cannot work is refused early."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastsam.longtail import Trainer, recipe
from fastsam.longtail.errors import UsageError
from fastsam.longtail.results import Result
from fastsam.longtail.tracking import check_tracker, tracker

CONFIG = recipe("digits-lt", "ce", "sgd", epochs=2).config()


def train(name: str, out: Path) -> Result:
    trainer = Trainer(CONFIG, out=out, progress=False)
    with tracker(name, config=CONFIG, out=out) as trainer.on_epoch:
        return trainer.fit()


def test_tensorboard_holds_every_epoch(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train("tensorboard", tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    logged = events.Scalars("loss")
    assert [event.step for event in logged] == [1, 2]
    assert [event.value for event in logged] == pytest.approx(
        [epoch.loss for epoch in result.history], rel=1e-6
    )


def test_wandb_gets_settings_and_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    run = SimpleNamespace(
        log=lambda numbers, step: seen.append((step, numbers)),
        finish=lambda: seen.append("finished"),
    )

    def init(**settings: Any) -> SimpleNamespace:
        seen.append(settings)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    result = train("wandb", tmp_path / "run")
    assert seen[0]["config"]["method"] == "ce"
    assert [(step, numbers["loss"]) for step, numbers in seen[1:3]] == [
        (epoch.epoch, epoch.loss) for epoch in result.history
    ]
    assert "rho" not in seen[1][1]  # SGD has none
    assert seen[3] == "finished"


def test_what_cannot_work_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="unknown tracker 'mlflow'; valid: none, tensorboard"):
        check_tracker("mlflow", out=tmp_path)
    with pytest.raises(UsageError, match="give --out"):
        check_tracker("tensorboard", out=None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"pip install \"\.\[wandb\]\" in a checkout"):
        check_tracker("wandb", out=None)
