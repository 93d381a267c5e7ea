"""Calibration of a run: choice on validation images only, its file, and its application."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fastsam.cli import main
from fastsam.longtail import Checkpoint, Trainer, recipe
from fastsam.longtail.calibrators import CALIBRATORS, TrainedHead
from fastsam.longtail.data import LongTailData, TensorImages, load_digits_lt
from fastsam.longtail.data.batch import Batch, Draw
from fastsam.longtail.errors import CheckpointError, DamagedError, UsageError
from fastsam.longtail.features import collect_features
from fastsam.longtail.trained import Calibration, TrainedRun, calibrate_run
from fastsam.longtail.trained.calibration import calibration_path, modules_hash
from fastsam.longtail.trained.head_scores import HeadScores

DIGITS = load_digits_lt()
CPU = torch.device("cpu")
ALL = ("none", "logit-adjustment", "tau-norm", "nearest-class-mean")


def trained(out: Path, data: LongTailData | None = None, **settings: Any) -> Path:
    """Train a run for a few epochs; its tail accuracy is low."""
    chosen = {"epochs": 6, "batch_size": 64, "warmup_epochs": 0, "threads": 1, **settings}
    named = "digits-lt" if data is None else f"own:{data.name}"
    if data is not None:
        chosen = {"model": "resnet8", **chosen}
    method = chosen.pop("method", "ce")
    config = recipe(named, method, "sgd", **chosen).config()
    Trainer(config, data=data, out=out, keep=(3,), progress=False).fit()
    return out


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def run(finished: Path) -> TrainedRun:
    return TrainedRun.load(finished, calibrated=False)


@pytest.fixture(scope="module")
def found(run: TrainedRun) -> Calibration:
    return calibrate_run(run)


@pytest.fixture
def folder(finished: Path, found: Calibration, tmp_path: Path) -> Path:
    """A copy of the run with its calibration, for a single test."""
    shutil.copytree(finished, tmp_path / "run")
    found.save(tmp_path / "run" / "calibration.json")
    return tmp_path / "run"


def normalized(images: Any) -> torch.Tensor:
    """Read clean images as inputs of the network."""
    assert isinstance(images, TensorImages)
    pixels = images.images.float() / images.white
    return (pixels - torch.tensor(images.mean)[:, None, None]) / torch.tensor(images.std)[
        :, None, None
    ]


def head_of(run: TrainedRun) -> TrainedHead:
    return TrainedHead(run.trained_head, run.logit_scale, run.counts)


# --- the choice -----------------------------------------------------------------------------------------


def test_the_choice_is_the_first_best_of_validation(run: TrainedRun, found: Calibration) -> None:
    assert DIGITS.validation is not None
    labels = DIGITS.validation.targets
    with torch.no_grad():
        features = run.network.features(normalized(DIGITS.validation)).double().numpy()
    head = run.trained_head
    assert isinstance(head, torch.nn.Linear)
    weight = head.weight.detach().double().numpy()
    bias = head.bias.detach().double().numpy()

    def balanced(logits: NDArray[np.float64]) -> float:
        right = logits.argmax(axis=1) == labels
        return float(100 * np.mean([right[labels == c].mean() for c in range(10)]))

    prior = run.counts / run.counts.sum()
    adjusted = [
        balanced(features @ weight.T + bias - tau * np.log(prior))
        for tau in (*np.arange(61) / 20, 3.5, 4, 5, 6, 8, 10, 12, 16)
    ]
    lengths = np.linalg.norm(weight, axis=1, keepdims=True)
    normed = [balanced(features @ (weight / lengths**tau).T) for tau in np.arange(21) / 10]
    by_name = {score.calibrator: score for score in found.scores}
    assert tuple(by_name) == ALL
    assert by_name["none"].balanced == pytest.approx(balanced(features @ weight.T + bias))
    for name, values, step in (("logit-adjustment", adjusted, 20), ("tau-norm", normed, 10)):
        best = int(np.argmax(np.round(values, 9)))  # the first of equal ones
        assert by_name[name].parameters == {"tau": best / step}
        assert by_name[name].balanced == pytest.approx(values[best])
    assert 0 < by_name["logit-adjustment"].parameters["tau"] < 3
    best_score = max(found.scores, key=lambda score: score.balanced)
    assert found.calibrator == best_score.calibrator != "none"
    assert found.temperature == best_score.temperature != 1
    assert found.images == len(labels) == 240
    assert found.refused == {}


def test_ties_go_to_the_smaller_change(run: TrainedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """All candidates are equal, except for the rounding of a sum."""
    noise = iter(np.linspace(0, 1e-11, 1000).tolist())
    monkeypatch.setattr(HeadScores, "balanced_accuracy", lambda scores, head: 50 + next(noise))
    found = calibrate_run(run)
    assert found.calibrator == "none"
    chosen = {score.calibrator: score.parameters for score in found.scores}
    assert chosen == {
        "none": {},
        "logit-adjustment": {"tau": 0.0},
        "tau-norm": {"tau": 0.0},
        "nearest-class-mean": {"transform": "un"},
    }


@pytest.mark.parametrize("method", ALL)
def test_one_calibrator_is_compared_with_none(method: str, run: TrainedRun) -> None:
    found = calibrate_run(run, method=method)
    assert found.calibrator == method
    assert [score.calibrator for score in found.scores] == list(dict.fromkeys(["none", method]))


class Sealed(TensorImages):
    """Images that fail the test if they are read."""

    def batches(
        self,
        order: Sequence[NDArray[np.int64]],
        draw: Draw | None,
        device: torch.device,
        *,
        may_be_empty: bool = False,
    ) -> Iterator[Batch]:
        raise AssertionError("test images were read")

    def digests(
        self, places: Sequence[int] | None = None, *, whole: bool = False, progress: bool = False
    ) -> list[bytes]:
        raise AssertionError("test images were compared")


@pytest.mark.parametrize("method", ["best", "nearest-class-mean"])
def test_test_images_and_labels_change_nothing(
    method: str, run: TrainedRun, tmp_path: Path
) -> None:
    test = DIGITS.test
    assert isinstance(test, TensorImages)
    generator = np.random.default_rng(3)
    poisoned = Sealed(
        torch.from_numpy(generator.integers(0, 17, test.images.shape, dtype=np.uint8)),
        generator.integers(0, 10, len(test)),
        test.white,
        test.mean,
        test.std,
    )
    for name, data in (("clean", DIGITS), ("poisoned", replace(DIGITS, test=poisoned))):
        calibrate_run(run, method=method, data=data).save(tmp_path / name)
    assert (tmp_path / "clean").read_bytes() == (tmp_path / "poisoned").read_bytes()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_other_images_than_those_of_the_run_are_refused(split: str, run: TrainedRun) -> None:
    images = DIGITS.split(split)
    assert isinstance(images, TensorImages)
    other = replace(images, images=17 - images.images)
    changed: dict[str, Any] = {split: other}
    with pytest.raises(CheckpointError, match=f"the {split} images of digits-lt have changed"):
        calibrate_run(run, data=replace(DIGITS, **changed))
    names = replace(DIGITS, class_names=tuple("abcdefghij"))
    with pytest.raises(CheckpointError, match="the class names of digits-lt"):
        calibrate_run(run, data=names)


def test_check_data_compares_the_splits_that_are_named(run: TrainedRun) -> None:
    test = DIGITS.test
    assert isinstance(test, TensorImages)
    changed = replace(DIGITS, test=test.select(np.arange(5)))
    run.checkpoint.check_data(changed, splits=("train", "validation"))
    assert set(changed.contents(splits=("train",))) == {"classes", "train"}
    for splits in (None, ("test",)):
        with pytest.raises(CheckpointError, match="the test images"):
            run.checkpoint.check_data(changed, splits=splits)


def test_features_are_of_clean_images_in_evaluation_mode(run: TrainedRun) -> None:
    assert DIGITS.validation is not None
    before = {name: value.clone() for name, value in run.network.state_dict().items()}
    found = collect_features(run.network, DIGITS.train, CPU, batch_size=33)
    with torch.no_grad():
        expected = run.network.features(normalized(DIGITS.train))
    torch.testing.assert_close(found.values, expected)
    assert torch.equal(found.targets, torch.from_numpy(DIGITS.train.targets))
    calibrate_run(run)
    assert not run.network.training
    after = run.network.state_dict()
    collect_features(run.network.train(), DIGITS.validation, CPU, batch_size=33)
    assert run.network.training
    run.network.eval()
    assert all(torch.equal(after[name], before[name]) for name in before)


# --- insufficient validation sets -------------------------------------------------------------------------


def with_validation(per_class: Sequence[int]) -> LongTailData:
    images = DIGITS.validation
    assert isinstance(images, TensorImages)
    chosen = [np.flatnonzero(images.targets == c)[:count] for c, count in enumerate(per_class)]
    return replace(DIGITS, name="mine", validation=images.select(np.concatenate(chosen)))


def test_fewer_than_five_images_of_a_class_are_refused_unless_forced(tmp_path: Path) -> None:
    data = with_validation([24, 4, 5, 24, 24, 24, 24, 24, 24, 0])
    run = TrainedRun.load(trained(tmp_path / "run", data, epochs=3))
    message = (
        r"at least 5 validation images .* 2 of 10 classes have fewer: class '9' has 0; .*force=True"
    )
    with pytest.raises(UsageError, match=message):
        calibrate_run(run, data=data)
    assert calibrate_run(run, data=data, force=True).images == len(data.splits["validation"])
    enough = with_validation([5] * 10)
    run = TrainedRun.load(trained(tmp_path / "other", enough, epochs=3))
    assert calibrate_run(run, data=enough).images == 50


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("cifar10-lt", r"--validation-per-class N, at least 5\) and train again"),
        ("list", "add validation images to your files .* and train again"),
        ("inaturalist18", "choose another data set"),
    ],
)
def test_a_run_without_validation_images_says_how_to_get_them(
    name: str, remedy: str, finished: Path
) -> None:
    run = TrainedRun.load(finished)
    run.checkpoint.config = recipe(name, "ce", "sgd", model="resnet8").config()
    with pytest.raises(UsageError, match=f"requires validation images, .*{remedy}"):
        calibrate_run(run, data=replace(DIGITS, validation=None), force=True)


def test_calibrators_that_do_not_fit(tmp_path: Path) -> None:
    run = TrainedRun.load(trained(tmp_path / "run", method="ldam", epochs=3))
    with pytest.raises(UsageError, match="tau-norm cannot be applied to this run: a cosine head"):
        calibrate_run(run, method="tau-norm")
    with pytest.raises(UsageError, match="unknown calibrator 'platt'; valid: best, logit-adj"):
        calibrate_run(run, method="platt")
    found = calibrate_run(run)
    assert list(found.refused) == ["tau-norm"]
    assert "tau-norm" not in [score.calibrator for score in found.scores]
    # The calibrator none uses the logits of the loss: cosines multiplied by its scale.
    none = calibrate_run(run, method="none")
    head = none.head(head_of(run))
    features = torch.rand(3, run.network.feature_width)
    expected = run.logit_scale * run.trained_head(features) / none.temperature
    torch.testing.assert_close(head(features), expected)
    assert run.logit_scale == 30


# --- the file -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["best", *ALL])
def test_a_loaded_run_is_calibrated(method: str, run: TrainedRun, folder: Path) -> None:
    calibrate_run(run, method=method).save(folder / "calibration.json")
    loaded = TrainedRun.load(folder)
    assert loaded.calibration is not None
    stored = loaded.calibration
    assert DIGITS.validation is not None
    inputs = normalized(DIGITS.validation)
    with torch.no_grad():
        features = run.network.features(inputs)
        plain = CALIBRATORS[stored.calibrator].build(stored.parameters, head_of(run))
        expected = plain(features) / stored.temperature
        torch.testing.assert_close(loaded.network(inputs), expected)
    # The stored NLL and accuracy belong to the loaded network.
    log_shares = loaded.network(inputs).double().log_softmax(dim=1)
    labels = torch.from_numpy(DIGITS.validation.targets)
    score = next(s for s in stored.scores if s.calibrator == stored.calibrator)
    assert float(-log_shares[torch.arange(240), labels].mean().detach()) == pytest.approx(
        score.nll, rel=1e-5
    )
    right = (log_shares.argmax(dim=1) == labels).double()
    assert 100 * float(right.mean()) == pytest.approx(score.balanced)  # 24 images of every class
    bare = TrainedRun.load(folder, calibrated=False)
    assert bare.calibration is None
    torch.testing.assert_close(bare.network(inputs), run.network(inputs))


def test_a_round_trip_keeps_every_bit(run: TrainedRun, tmp_path: Path) -> None:
    first = calibrate_run(run, method="nearest-class-mean")
    first.save(tmp_path / "a.json")
    second = Calibration.load(tmp_path / "a.json")
    second.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert torch.equal(first.parameters["means"], second.parameters["means"])
    assert second.parameters["means"].dtype == torch.float32
    assert (second.scores, second.temperature, second.weights) == (
        first.scores,
        first.temperature,
        first.weights,
    )


def test_a_posthoc_adjustment_is_replaced(
    finished: Path, found: Calibration, tmp_path: Path
) -> None:
    """The calibration does not depend on posthoc_tau."""
    shutil.copytree(finished, tmp_path / "run")
    stored = Checkpoint.load(tmp_path / "run")
    stored.config = stored.config.replace(posthoc_tau=1.0)
    stored.save(tmp_path / "run" / "checkpoint.pt")
    run = TrainedRun.load(tmp_path / "run")
    again = calibrate_run(run)
    assert again.scores == found.scores
    again.save(tmp_path / "run" / "calibration.json")
    inputs = normalized(DIGITS.validation)
    calibrated = TrainedRun.load(tmp_path / "run").network(inputs)
    assert not torch.allclose(calibrated, run.network(inputs), atol=0.1)
    # A run loaded with its calibration gives the same result, because it starts from the trained head.
    assert calibrate_run(TrainedRun.load(tmp_path / "run")).scores == found.scores


def test_calibrations_of_other_weights_are_refused(folder: Path, finished: Path) -> None:
    stored = Checkpoint.load(folder)
    stored.model["features.layers.0.weight"][0, 0, 0, 0] += 1e-4
    stored.save(folder / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=r"belongs to other weights .*calibrate` again"):
        TrainedRun.load(folder)
    assert TrainedRun.load(folder, calibrated=False).calibration is None
    shutil.copy(finished / "checkpoint.pt", folder / "checkpoint.pt")
    assert TrainedRun.load(folder).calibration is not None


def test_every_weight_and_buffer_enters_the_fingerprint(run: TrainedRun) -> None:
    head = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    hashes = {modules_hash(head), modules_hash(head, head), modules_hash(head[0])}
    for value in head.state_dict().values():
        value += 1
        hashes.add(modules_hash(head))
    assert len(hashes) == 3 + len(head.state_dict())
    layer = torch.nn.Linear(2, 1).requires_grad_(False)
    digest = hashlib.sha256()
    for name, value in (("bias", layer.bias.numpy()), ("weight", layer.weight.numpy())):
        digest.update(f"0 {name} float32 {value.shape}\n".encode() + value.astype("<f4").tobytes())
    assert modules_hash(layer) == digest.hexdigest()
    assert modules_hash(layer.to(torch.bfloat16)) != digest.hexdigest()
    assert modules_hash(run.network.features, run.trained_head) == modules_hash(
        run.network.features, run.trained_head
    )


def test_flipped_bits_are_noticed_or_change_nothing(run: TrainedRun, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    calibrate_run(run, method="nearest-class-mean").save(path)
    whole = path.read_bytes()
    generator = np.random.default_rng(14)
    refused = 0
    for place in generator.integers(0, 8 * len(whole), 300).tolist():
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            Calibration.load(path).save(tmp_path / "again.json")
        except CheckpointError as error:
            refused += len(str(error).splitlines()) == 1
        else:
            assert (tmp_path / "again.json").read_bytes() == whole, f"bit {place} was accepted"
    assert refused > 200
    for size in (0, 1, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:size])
        with pytest.raises(DamagedError, match="run `fastsam calibrate` again"):
            Calibration.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "else"}, "its format is not"),
        ({"version": 99}, "calibration version 99, but this version of fastsam reads 1"),
        ({"temperature": -1.0}, "temperature must be finite and above 0"),
        ({"temperature": "warm"}, "temperature must be a number"),
        (
            {"parameters": {"means": {"float32": "AAAA", "shape": [1]}}},
            "cannot read .* as a calibration",
        ),
        ({"parameters": {"means": {"float32": "AAAAAA==", "shape": "x"}}}, "cannot read"),
        ({"parameters": {"means": {"float32": 3, "shape": [1]}}}, "cannot read"),
        ({"parameters": {"means": {"values": 3}}}, "neither a number, a string nor a tensor"),
        ({"scores": [{"calibrator": "none"}]}, "parameters is missing"),
        ({"images": 0}, "images must be at least 1"),
        ({"added": 1}, "has no 'added'"),
    ],
    ids=str,
)
def test_files_that_contradict_themselves(
    change: dict[str, Any], message: str, folder: Path
) -> None:
    path = folder / "calibration.json"
    content = json.loads(path.read_text())
    del content["sha256"]
    path.write_text(json.dumps({**content, **change}))
    with pytest.raises(CheckpointError, match=message):
        TrainedRun.load(folder)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"calibrator": "platt"}, UsageError, "unknown calibrator 'platt'"),
        ({"parameters": {}}, CheckpointError, "another version .*calibrate` again"),
    ],
)
def test_calibrators_that_are_not_known_here(
    change: dict[str, Any], error: type[Exception], message: str, folder: Path
) -> None:
    path = folder / "calibration.json"
    replace(Calibration.load(path), **{"calibrator": "logit-adjustment", **change}).save(path)
    with pytest.raises(error, match=message):
        TrainedRun.load(folder)


def test_a_kept_checkpoint_has_its_own_calibration(folder: Path) -> None:
    assert main(["calibrate", str(folder / "epoch-3.pt"), "--quiet"]) == 0
    assert (folder / "epoch-3.calibration.json").is_file()
    kept, last = TrainedRun.load(folder / "epoch-3.pt"), TrainedRun.load(folder)
    assert kept.calibration is not None
    assert last.calibration is not None
    assert kept.calibration.weights != last.calibration.weights
    assert calibration_path(folder / "checkpoint.pt") == calibration_path(folder)


def test_a_replaced_run_loses_its_calibrations(folder: Path) -> None:
    (folder / "epoch-3.calibration.json").write_text("{}")
    config = recipe("digits-lt", "ce", "sgd", epochs=1).config()
    Trainer(config, out=folder, overwrite=True, progress=False)
    # The settings stay until the first checkpoint, because they may be the command's --config file.
    assert list(folder.iterdir()) == [folder / "run.yaml"]


def test_there_is_no_calibration(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="run `fastsam calibrate RUN` first"):
        Calibration.load(tmp_path / "calibration.json")


# --- the command ------------------------------------------------------------------------------------------


def test_the_command_prints_scores_and_the_choice(
    folder: Path, found: Calibration, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "calibration.json").write_text("damaged")  # an earlier calibration does not matter
    assert main(["calibrate", str(folder), "--quiet"]) == 0
    output = capsys.readouterr().out.splitlines()
    assert output[0].startswith("240 validation images")
    rows = {line.split()[0]: line.split() for line in output[2:6]}
    assert tuple(rows) == ALL
    assert rows["none"][1] == "-"
    tau = next(s for s in found.scores if s.calibrator == "tau-norm")
    assert rows["tau-norm"][1:] == [
        "tau",
        str(tau.parameters["tau"]),
        f"{tau.balanced:.2f}",
        f"{tau.nll:.4f}",
        f"{tau.temperature:.4g}",
    ]
    assert output[6].startswith(f"chosen: {found.calibrator}")
    assert output[6].endswith(f"temperature {found.temperature:.4g}")
    assert output[7:] == [f"calibration: {folder / 'calibration.json'}"]
    assert Calibration.load(folder / "calibration.json").scores == found.scores


def test_the_command_lists_skipped_and_replaced_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = trained(tmp_path / "run", method="ldam", epochs=3, posthoc_tau=0.5)
    assert main(["calibrate", str(out), "--quiet"]) == 0
    output = capsys.readouterr().out
    assert "skipped tau-norm: a cosine head already normalizes" in output
    assert (
        "the calibration replaces the run's post-hoc logit adjustment (posthoc_tau 0.5)" in output
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["RUN", "--method", "platt"],
            2,
            "valid: best, logit-adjustment, nearest-class-mean, none",
        ),
        (["RUN", "--device", "cpu:5"], 2, "cpu:5 does not exist"),
        (["RUN/none.pt"], 1, "no checkpoint at"),
    ],
)
def test_wrong_calls(
    arguments: list[str], code: int, message: str, finished: Path, capsys: Any
) -> None:
    named = [argument.replace("RUN", str(finished)) for argument in arguments]
    assert main(["calibrate", *named, "--quiet"]) == code
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert message in error[0]
    assert not (finished / "calibration.json").exists()
