"""From a plain folder of odd images to predictions, by three commands and from Python."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastsam.cli import main
from fastsam.longtail import Trainer, recipe
from fastsam.longtail.data import load_dataset
from fastsam.longtail.trained import TrainedRun, evaluate_run, predict_files

from .odd_images import CLASSES, COUNTS, pattern, write_odd_image, write_odd_images


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("odd") / "photos"
    write_odd_images(root)
    return root


def test_each_form_has_the_pixels_of_its_pattern(tmp_path: Path) -> None:
    """The oracle is the pattern itself: all five forms show it upright, with black 0 and white 1."""
    gray = pattern(2, 32, 32, np.random.default_rng(1))
    gray[:16] = 0.0  # up and down differ
    root = tmp_path / "photos"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
    for number in range(10):
        write_odd_image(root / "ab"[number // 5] / str(number), gray, number)
    data = load_dataset(
        "folder", data_root=root, split_test=0.2, image_size=28, workers=0, normalization="half"
    )
    small = Image.fromarray((gray * 255).astype(np.uint8))
    expected = torch.tensor(np.asarray(small)[2:30, 2:30] / 255)
    for images in (data.train, data.test):
        (batch,) = images.batches([np.arange(len(images))], None, torch.device("cpu"))
        for image in batch.inputs * 0.5 + 0.5:
            assert (image - expected).abs().mean() < 0.02, "rotated, inverted or scaled wrongly"


@pytest.mark.slow
def test_three_commands(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, found = tmp_path / "run", tmp_path / "found.csv"
    train = ["train", "--data", "folder", "--data-root", str(photos), "--split-test", "0.2"]
    train += ["--split-validation", "0.1", "--image-size", "32", "--model", "resnet8"]
    train += ["--epochs", "1", "--batch-size", "16", "--lr", "0.05", "--method", "ce"]
    train += ["--optimizer", "sgd", "--workers", "0", "--quiet", "--out", str(run)]
    assert main(train) == 0
    output = capsys.readouterr().out
    assert "split with seed 0: 139 train, 40 test, 21 validation images" in output
    assert "augment auto: crop-flip, for 139 training images of 32x32 pixels" in output
    assert "input: 3 channel(s) of 32x32 pixels" in output
    assert main(["evaluate", str(run)]) == 0
    assert main(["predict", str(run), str(photos), "--out", str(found)]) == 0
    rows = list(csv.DictReader(found.read_text().splitlines()))
    assert len(rows) == sum(COUNTS)


def test_twelve_lines_of_python(photos: Path, tmp_path: Path) -> None:
    options = {"data_root": str(photos), "split_test": 0.2, "image_size": 32, "workers": 0}
    training = {"model": "resnet8", "epochs": 1, "batch_size": 16, "lr": 0.05}
    config = recipe("folder", "ce", "sgd", **options, **training).config()
    trainer = Trainer(config, out=tmp_path / "run", progress=False)
    trainer.fit()
    run = TrainedRun.load(tmp_path / "run")
    evaluation = evaluate_run(run, bootstrap=0)
    assert sum(evaluation.counts) == 160
    assert run.class_names == CLASSES
    found = list(predict_files(run, [photos / "dots"]))
    assert len(found) == COUNTS[3]
