"""Evaluation of trained runs: agreement with the result, other data sets, other labels, and invalid input."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastsam.cli.main import main
from fastsam.longtail import Checkpoint, Result, Trainer, recipe
from fastsam.longtail.data import LongTailData, TensorImages, load_dataset
from fastsam.longtail.errors import CheckpointError, DataError, UsageError
from fastsam.longtail.features import collect_features
from fastsam.longtail.trained import Evaluation, TrainedRun, calibrate_run, evaluate_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    config = recipe("digits-lt", "ldam", "sgd", epochs=6, posthoc_tau=0.5).config()
    Trainer(config, out=out, keep=[2], progress=False).fit()
    return out


def renumbered(data: LongTailData, order: np.ndarray) -> LongTailData:
    """Return the same images with class ``order[i]`` relabeled as i."""
    place = np.argsort(order)

    def turned(images: TensorImages) -> TensorImages:
        return replace(images, targets=place[images.targets])

    return replace(
        data,
        train=turned(data.train),
        validation=turned(data.validation),
        test=turned(data.test),
        class_names=tuple(data.class_names[label] for label in order),
    )


def test_it_reproduces_the_metrics_of_training(folder: Path) -> None:
    result = Result.load(folder / "result.json")
    run = TrainedRun.load(folder)
    test = evaluate_run(run, bootstrap=0)
    assert test.metrics.per_class == result.test.per_class
    assert test.metrics.confusion == result.test.confusion
    assert test.metrics.ece == pytest.approx(result.test.ece, abs=1e-4)
    assert test.metrics.nll == pytest.approx(result.test.nll, rel=1e-5)
    assert not test.intervals
    validation = evaluate_run(run, split="validation", bootstrap=0)
    assert result.validation is not None
    assert validation.metrics.confusion == result.validation.confusion


def test_it_has_the_precision_of_training(tmp_path: Path) -> None:
    """A network trained in bfloat16 is evaluated in bfloat16, at the end of the run and later."""
    config = recipe("digits-lt", "ce", "sgd", epochs=2, precision="bfloat16").config()
    trainer = Trainer(config, out=tmp_path, progress=False)
    result = trainer.fit()
    run = TrainedRun.load(tmp_path)
    assert evaluate_run(run, bootstrap=0).metrics.nll == pytest.approx(result.test.nll, rel=1e-6)
    trainer.judge.precision = "float32"
    in_float32 = trainer.judge.metrics(trainer.data.test)
    assert in_float32.nll != pytest.approx(result.test.nll, rel=1e-5)
    assert in_float32.nll == pytest.approx(result.test.nll, rel=0.05)
    data = run.data()
    rounded, exact = (
        collect_features(run.network, data.test, run.device, batch_size=100, precision=precision)
        for precision in ("bfloat16", "float32")
    )
    assert torch.equal(rounded.values, rounded.values.bfloat16().float())
    assert not torch.equal(rounded.values, exact.values)


@pytest.mark.parametrize("choice", [{"ema": 0.9}, {"select": "best-validation"}])
def test_it_evaluates_the_weights_of_the_result(choice: dict[str, object], tmp_path: Path) -> None:
    config = recipe("digits-lt", "ce", "sgd", epochs=6, lr=0.3, **choice).config()
    result = Trainer(config, out=tmp_path, progress=False).fit()
    found = evaluate_run(TrainedRun.load(tmp_path), bootstrap=0)
    assert found.metrics.confusion == result.test.confusion
    assert (
        Checkpoint.load(tmp_path).judged_weights().keys() == Checkpoint.load(tmp_path).model.keys()
    )


def test_a_calibration_is_applied_and_named(folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "run")
    raw = TrainedRun.load(copied)
    calibration = calibrate_run(raw, method="logit-adjustment")
    calibration.save(copied / "calibration.json")
    tau, temperature = calibration.parameters["tau"], calibration.temperature
    found = evaluate_run(TrainedRun.load(copied), bootstrap=0)
    assert found.calibration == f"logit-adjustment tau {tau}, T {temperature:.4g}"
    assert found.metrics != evaluate_run(raw, bootstrap=0).metrics
    left_out = evaluate_run(TrainedRun.load(copied, calibrated=False), bootstrap=0)
    assert left_out == evaluate_run(raw, bootstrap=0)
    assert left_out.calibration == "none"


def test_a_kept_checkpoint_is_evaluated_at_its_epoch(folder: Path) -> None:
    run = TrainedRun.load(folder / "epoch-2.pt")
    found = evaluate_run(run, split="validation", bootstrap=0)
    assert (found.epoch, found.rule) == (2, "last epoch")
    history = Result.load(folder / "result.json").history
    assert found.metrics.accuracy == pytest.approx(history[1].validation_accuracy)


def test_classes_are_matched_by_name(folder: Path, seed: int) -> None:
    run, data = TrainedRun.load(folder), load_dataset("digits-lt")
    order = np.random.default_rng(seed).permutation(10)
    same, other = evaluate_run(run), evaluate_run(run, data=renumbered(data, order))
    assert other.metrics == same.metrics
    assert other.intervals == same.intervals


def test_other_classes_are_refused(folder: Path) -> None:
    data = load_dataset("digits-lt")
    other = replace(data, class_names=(*data.class_names[:9], "ten"))
    with pytest.raises(UsageError, match="'9', 'ten'"):
        evaluate_run(TrainedRun.load(folder), data=other)


def test_other_images_are_normalized_as_in_training(folder: Path) -> None:
    data = load_dataset("digits-lt")
    other = replace(data, test=replace(data.test, mean=(0.5,), std=(0.1,)))
    run = TrainedRun.load(folder)
    assert evaluate_run(run, data=other, bootstrap=0) == evaluate_run(run, bootstrap=0)


def test_images_of_another_size_are_refused(folder: Path) -> None:
    data = load_dataset("digits-lt")
    larger = replace(data.test, images=data.test.images.repeat_interleave(2, dim=3))
    with pytest.raises(UsageError, match="images of 8x8 pixels, got 8x16"):
        evaluate_run(TrainedRun.load(folder), data=replace(data, test=larger))


def test_other_channels_are_refused(folder: Path) -> None:
    data = load_dataset("digits-lt")
    color = TensorImages(
        torch.zeros(10, 3, 8, 8, dtype=torch.uint8), np.arange(10), 255.0, (0.0,) * 3, (1.0,) * 3
    )
    with pytest.raises(UsageError, match=r"with 1 channels, .* have 3"):
        evaluate_run(TrainedRun.load(folder), data=replace(data, test=color))


def test_changed_data_of_the_run_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_dataset("digits-lt")
    wrong = replace(data.test, targets=np.roll(data.test.targets, 1))
    monkeypatch.setattr(TrainedRun, "data", lambda run, progress: replace(data, test=wrong))
    with pytest.raises(CheckpointError, match="test images"):
        evaluate_run(TrainedRun.load(folder))


@pytest.mark.parametrize(
    "option",
    [{"bootstrap": -1}, {"bootstrap": 1}, {"level": 1.0}, {"level": 1e-9}, {"prior": "flat"}],
)
def test_options_are_checked(folder: Path, option: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        evaluate_run(TrainedRun.load(folder), **option)  # type: ignore[arg-type]


def test_runs_of_older_versions_know_their_classes_from_the_data(
    folder: Path, tmp_path: Path
) -> None:
    old = Checkpoint.load(folder)
    old.class_names, old.counts, old.groups = [], [], {}
    old.save(tmp_path / "checkpoint.pt")
    found, expected = (
        evaluate_run(TrainedRun.load(path), bootstrap=20) for path in (tmp_path, folder)
    )
    assert found == expected


def test_saved_evaluations_are_read_again_and_damage_is_found(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    evaluation = evaluate_run(TrainedRun.load(folder), prior="reversed", bootstrap=20)
    evaluation.save(path)
    assert Evaluation.load(path) == evaluation
    path.write_text(path.read_text().replace("reversed", "uniform"))
    with pytest.raises(DataError, match=r"evaluation\.json"):
        Evaluation.load(path)


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "e.json"
    assert main(["evaluate", str(folder), "--out", str(out), "--bootstrap", "20", "--quiet"]) == 0
    text = capsys.readouterr().out
    for words in (
        *("worst class", "95 % interval", "macro F1", "most frequent confusions"),
        "weights: last epoch; calibration: none",
    ):
        assert words in text
    assert Evaluation.load(out).bootstrap == 20
    assert main(["evaluate", str(folder / "epoch-2.pt"), "--bootstrap", "0"]) == 0
    assert "weights: epoch 2 of 6; calibration" in capsys.readouterr().out
    other = ["evaluate", str(folder), "--data", "digits-lt", "--imbalance", "10", "--classes", "0"]
    assert main([*other, "--bootstrap", "0"]) == 0
    assert "training images" not in capsys.readouterr().out
    other = ["evaluate", str(folder), "--data", "cifar10-lt", "--data-root", str(tmp_path)]
    assert main(other) == 1
    error = capsys.readouterr().err
    assert str(tmp_path) in error
    assert "To use cifar10-lt" in error
    for name in ("result.json", "checkpoint.pt", "epoch-2.pt", "calibration.json", "."):
        assert main(["evaluate", str(folder), "--out", str(folder / name)]) == 2
    assert "pass the path of a file" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "none")]) == 1
    assert "no checkpoint" in capsys.readouterr().err


def test_commands_say_that_a_run_is_not_finished(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(folder / "epoch-2.pt", tmp_path / "checkpoint.pt")
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    said = (
        "weights: epoch 2 of 6 (the run is not finished; "
        f"`fastsam train --resume --out {tmp_path}` continues it)"
    )
    assert main(["evaluate", str(tmp_path), "--bootstrap", "0", "--quiet"]) == 0
    assert said in capsys.readouterr().out
    assert main(["calibrate", str(tmp_path), "--quiet"]) == 0
    assert said in capsys.readouterr().out
    assert main(["predict", str(tmp_path), str(tmp_path / "a.png")]) == 0
    assert said in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 1
    assert f"left out: {tmp_path} is not finished (epoch 2 of 6)" in capsys.readouterr().err
    (tmp_path / "a").mkdir()
    shutil.copytree(folder, tmp_path / "a", dirs_exist_ok=True)
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().err.count("left out: ") == 1
