"""Trackers receive epochs, results and settings; invalid options are rejected before training."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fastsam.cli import main
from fastsam.longtail import recipe
from fastsam.longtail.errors import UsageError
from fastsam.longtail.metrics import Metrics
from fastsam.longtail.results import Result
from fastsam.longtail.tracking import TRACKERS, Tracked, check_tracker, tracker

NAMED = ["--project", "tails", "--name", "first", "--tags", "paper", "kind=ablation"]
CONFIG = recipe("digits-lt", "ce", "sgd", epochs=2).config()


def train(name: str, out: Path) -> Result:
    """Train two epochs with tracking and return the result."""
    settings = [
        "--method",
        "ce",
        "--optimizer",
        "sgd",
        "--epochs",
        "2",
        "--lr-factors",
        "0.5",
        "0.25",
    ]
    options = ["--track", name, *NAMED, "--quiet", "--out", str(out)]
    assert main(["train", *settings, *options]) == 0
    return Result.load(out / "result.json")


def figures(metrics: Metrics) -> dict[str, float | None]:
    return {
        "accuracy": metrics.accuracy,
        "head": metrics.groups["head"],
        "mid": metrics.groups["mid"],
        "tail": metrics.groups["tail"],
        "ece": metrics.ece,
        "nll": metrics.nll,
        "top5": metrics.top5,
        "macro_f1": metrics.macro_f1,
        "balanced": metrics.balanced,
        "worst_class": metrics.worst_class,
        "harmonic_mean": metrics.harmonic_mean,
    }


def expected(result: Result) -> dict[str, float]:
    assert result.validation is not None
    sets = {"test": result.test, "validation": result.validation}
    named = {f"{s}/{name}": v for s, m in sets.items() for name, v in figures(m).items()}
    assert result.gradients is not None
    return {name: v for name, v in named.items() if v is not None} | {
        "gradients_total": result.gradients
    }


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip(
        "tensorboard", reason="tensorboard is not installed: pip install tensorboard"
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    result = train("tensorboard", tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    logged = events.Scalars("loss")
    assert [event.step for event in logged] == [1, 2]
    assert [event.value for event in logged] == pytest.approx(
        [epoch.loss for epoch in result.history], rel=1e-6
    )
    for name, value in expected(result).items():
        assert {event.step for event in events.Scalars(name)} == {2}
        assert events.Scalars(name)[-1].value == pytest.approx(value, rel=1e-6), name
    (text,) = events.Tensors("run/text_summary")
    assert text.tensor_proto.string_val[0] == b"tails / first, tags: paper, kind=ablation"
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    session = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert session["method"].string_value == "ce"
    assert session["lr"].number_value == 0.1
    assert session["lr_factors"].string_value == "0.5 0.25"


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip(
        "mlflow", reason="mlflow is not installed: pip install mlflow-skinny"
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    result = train("mlflow", tmp_path / "run")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("tails")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "first"
    assert run.info.status == "FINISHED"
    assert {name: run.data.tags[name] for name in ("paper", "kind")} == {
        "paper": "true",
        "kind": "ablation",
    }
    assert run.data.params["lr_factors"] == "0.5 0.25"
    assert run.data.params["method"] == "ce"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(e.epoch, e.loss) for e in result.history]
    metrics = run.data.metrics
    assert {name: metrics[name] for name in expected(result)} == expected(result)
    with pytest.raises(RuntimeError), tracker(Tracked(track="mlflow", project="tails"), CONFIG):
        raise RuntimeError
    statuses = [run.info.status for run in client.search_runs([experiment.experiment_id])]
    assert sorted(statuses) == ["FAILED", "FINISHED"]


def test_mlflow_without_a_place_to_store(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed: pip install mlflow-skinny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    assert main(["train", "--track", "mlflow", "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "Set MLFLOW_TRACKING_URI to a server" in line
    assert not (tmp_path / "run").exists()


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    begun: list[Any] = []
    summary: dict[str, Any] = {}
    original = wandb.init

    def init(**settings: Any) -> Any:
        run = original(**settings)
        begun.append(run)
        finish = run.finish

        def finished(exit_code: int) -> None:
            assert exit_code == 0
            summary.update(run.summary)  # later it is gone
            finish(exit_code=exit_code)

        monkeypatch.setattr(run, "finish", finished)
        return run

    monkeypatch.setattr(wandb, "init", init)
    result = train("wandb", tmp_path / "run")
    (run,) = begun
    assert (run.project, run.name, set(run.tags)) == ("tails", "first", {"paper", "kind=ablation"})
    assert run.config["method"] == "ce"
    assert run.config["lr_factors"] == "0.5 0.25"
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert {name: summary[name] for name in expected(result)} == expected(result)
    assert summary["loss"] == result.history[-1].loss


def test_the_folder_names_the_run(tmp_path: Path) -> None:
    assert Tracked(out=tmp_path / "a" / "b").shown_name == "b"
    assert Tracked(out=tmp_path, name="given").shown_name == "given"
    assert Tracked().shown_name is None


def test_impossible_settings_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UsageError, match="unknown tracker 'tensorbord', did you mean 'tensorboard'"
    ):
        check_tracker(Tracked(track="tensorbord", out=tmp_path))
    with pytest.raises(UsageError, match="pass --out"):
        check_tracker(Tracked(track="tensorboard"))
    assert TRACKERS == ("none", "tensorboard", "wandb", "mlflow")
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=rf'pip install "\.\[{name}\]" in a checkout'):
            check_tracker(Tracked(track=name))


def test_a_file_names_the_tracker(tmp_path: Path) -> None:
    pytest.importorskip(
        "tensorboard", reason="tensorboard is not installed: pip install tensorboard"
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    file, out = tmp_path / "run.yaml", tmp_path / "run"
    file.write_text(
        json.dumps({"epochs": 1, "track": "tensorboard", "project": "p", "tags": ["t"]})
    )
    assert main(["train", "--config", str(file), "--name", "n", "--quiet", "--out", str(out)]) == 0
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert events.Tensors("run/text_summary")[0].tensor_proto.string_val[0] == b"p / n, tags: t"
