"""Commands on runs in stages: a finished run whose head is not linear, tuning, sweeps and reproductions."""

from __future__ import annotations

import csv
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastsam.cli.main import main
from fastsam.longtail import Checkpoint, Result
from fastsam.longtail.build import load_configured
from fastsam.longtail.errors import UsageError
from fastsam.longtail.landscape import ClassSpectrum
from fastsam.longtail.reproduce import reproduce_figure, reproduce_table
from fastsam.longtail.sweeps import plan_grid
from fastsam.longtail.trained import TrainedRun, evaluate_run, load_weights

HEADS = {"lws": "lws", "mislas": "lws", "disalign": "disalign"}
TRAIN = [
    *("--data", "digits-lt", "--method", "ce", "--optimizer", "sgd", "--model", "resnet8"),
    *("--epochs", "1", "--stage-set", "classifier.epochs=1"),
]


@pytest.fixture(scope="module", params=HEADS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def out(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run whose last stage has a head that is not linear."""
    folder = tmp_path_factory.mktemp("runs") / name
    options = ["--stages", name, "--quiet", "--out", str(folder)]
    assert main(["train", *TRAIN, *options]) == 0
    return folder


def by_formula(weights: dict[str, Tensor], features: Tensor, head: str) -> Tensor:
    """Return the logits of a head, written out."""
    logits = features @ weights["head.linear.weight"].T + weights["head.linear.bias"]
    if head == "lws":
        return weights["head.scale"] * logits
    confidence = features @ weights["head.confidence.weight"].T + weights["head.confidence.bias"]
    confidence = 1 / (1 + torch.exp(-confidence))
    return logits + confidence * (weights["head.scale"] * logits + weights["head.offset"])


@pytest.mark.slow
def test_a_run_with_another_head_is_evaluated_predicted_and_exported(
    out: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = TrainedRun.load(out)
    data = load_configured(run.checkpoint.config, progress=False)
    [batch] = data.test.batches([np.arange(12)], None, torch.device("cpu"))
    with torch.no_grad():
        features = run.network.eval().features(batch.inputs)
        expected = by_formula(Checkpoint.load(out).model, features, HEADS[name])
        torch.testing.assert_close(run.network(batch.inputs), expected)

    result = Result.load(out / "result.json")
    assert evaluate_run(run, bootstrap=0).metrics.accuracy == result.test.accuracy
    assert main(["evaluate", str(out), "--quiet"]) == 0
    assert f"{result.test.accuracy:.1f}" in capsys.readouterr().out

    pixels = data.test.images[:12, 0].numpy()  # type: ignore[attr-defined]
    for place, image in enumerate(pixels):
        scaled = np.round(image * (255 / data.test.white)).astype(np.uint8)  # type: ignore[attr-defined]
        Image.fromarray(scaled).save(tmp_path / f"{place:02}.png")
    found = tmp_path / "found.csv"
    assert main(["predict", str(out), str(tmp_path), "--out", str(found)]) == 0
    with found.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    labels = [data.class_names[label] for label in expected.argmax(dim=1).tolist()]
    assert [row["class"] for row in rows] == labels

    pytest.importorskip("safetensors")
    for kind in ("torch", "safetensors"):
        assert main(["export", str(out), "--format", kind, "--out", str(tmp_path / kind)]) == 0
    again = load_weights(tmp_path / "safetensors" / "model.safetensors").network.eval()
    torch.testing.assert_close(again(batch.inputs).detach(), expected)
    program = torch.export.load(tmp_path / "torch" / "model.pt2").module()
    preprocessing = run.known_preprocessing()
    mean, std = preprocessing.mean[0], preprocessing.std[0]
    torch.testing.assert_close(program(batch.inputs * std + mean), expected, rtol=1e-4, atol=1e-4)
    assert main(["report", str(out)]) == 0
    assert (out / "report.html").is_file()


@pytest.mark.slow
def test_a_run_with_another_head_is_calibrated_without_tau_normalization(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", str(out), "--method", "tau-norm", "--quiet"]) == 2
    assert "tau-norm" in (error := capsys.readouterr().err)
    assert "it requires a linear head" in error
    assert main(["calibrate", str(out), "--quiet"]) == 0
    assert "it requires a linear head" in capsys.readouterr().out
    calibration = TrainedRun.load(out).calibration
    assert calibration is not None
    tried = {score.calibrator for score in calibration.scores}
    assert tried == {"none", "logit-adjustment", "nearest-class-mean"}
    assert main(["evaluate", str(out), "--quiet"]) == 0
    assert "calibrat" in capsys.readouterr().out


@pytest.mark.slow
def test_the_spectrum_is_that_of_all_weights_also_of_those_that_the_head_does_not_train(
    out: Path, name: str, tmp_path: Path
) -> None:
    options = ["--classes", "all", "--steps", "3", "--quiet", "--out", str(tmp_path)]
    assert main(["spectrum", str(out), *options]) == 0
    spectrum = ClassSpectrum.load(next(tmp_path.glob("class-*.json"))).spectrum
    network = Checkpoint.load(out).build_model()
    assert spectrum.dimension == sum(value.numel() for value in network.parameters())
    frozen = [key for key, value in network.named_parameters() if not value.requires_grad]
    assert (frozen == []) is (name == "mislas")


@pytest.mark.slow
def test_stages_are_tuned_and_the_printed_command_trains_the_choice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tuned"
    search = ["--search", "stages=lws,crt", "--trials", "2", "--jobs", "1", "--out", str(out)]
    assert main(["tune", *TRAIN, *search]) == 0
    printed = capsys.readouterr().out.splitlines()[-1]
    assert printed.startswith("fastsam train ")
    assert main([*shlex.split(printed)[1:], "--quiet"]) == 0
    chosen = json.loads((out / "tuning.json").read_text())["chosen"]
    trial = Result.load(out / chosen / "seed-0" / "result.json")
    trained = Result.load(out / "chosen" / "result.json")
    assert trained.validation == trial.validation
    assert trained.config["stages"] in ("lws", "crt")
    assert trained.config["stage_set"] == ["classifier.epochs=1"]


@pytest.mark.slow
def test_a_sweep_and_a_table_train_stages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = ["--grid", "stages=none,lws", "--jobs", "1", "--out", str(tmp_path / "sweep")]
    assert main(["sweep", *TRAIN, *grid]) == 0
    heads = [
        Result.load(tmp_path / "sweep" / f"stages={stages}" / "seed-0" / "result.json").config[
            "head"
        ]
        for stages in ("none", "lws")
    ]
    assert heads == ["linear", "lws"]
    short = ["--model", "resnet8", "--epochs", "2", "--stage-set", "classifier.epochs=1"]
    options = ["--data", "digits-lt", "--seeds", "1", "--quiet", "--out", str(tmp_path / "table")]
    capsys.readouterr()
    assert main(["reproduce", "table4", *short, "--stages", "crt", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("ce-drw")] == [
        *("ce-drw-sgd", "ce-drw-pgd", "ce-drw-lpf-sgd", "ce-drw-sam"),
    ]
    found = Result.load(tmp_path / "table" / "ce-drw-sam" / "seed-0" / "result.json")
    assert (found.config["method"], found.config["optimizer"]) == ("ce-rs", "sgd")
    assert [stage["optimizer"] for stage in found.earlier_stages] == ["sam"]


def test_a_table_whose_methods_do_not_fit_the_stages_is_refused_before_training(
    tmp_path: Path,
) -> None:
    with pytest.raises(
        UsageError, match=r"cannot take over the head cosine .*\(run ldam-drw-sgd\)"
    ):
        next(reproduce_table("table1", "digits-lt", tmp_path, seeds=1, stages="lws"))
    assert not list(tmp_path.iterdir())


def test_a_sweep_of_stages_without_start_weights_is_refused_before_training() -> None:
    settings = {"data": "digits-lt", "method": "ce", "optimizer": "sgd"}
    with pytest.raises(
        UsageError, match=r"random weights; pass --init.*\(run stages=fine-tuning\)"
    ):
        plan_grid({"stages": ("crt", "fine-tuning")}, settings)


def test_a_figure_along_training_refuses_stages(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"figure3 shows spectra along one training.*figure1"):
        next(reproduce_figure("figure3", "digits-lt", tmp_path, stages="crt"))
