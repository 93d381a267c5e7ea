"""Evaluation of a run on other folders of image files, which are preprocessed as in training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastsam.cli.main import main
from fastsam.longtail import Trainer, recipe
from fastsam.longtail.data import load_dataset
from fastsam.longtail.trained import TrainedRun, evaluate_run, predict_files


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("own")
    generator = np.random.default_rng(3)
    for split, count in (("train", 6), ("test", 5)):
        for label in range(3):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                size = generator.integers(30, 60, size=2)
                pixels = generator.integers(0, 256, size=(*size, 3)) * (label + 1) // 3
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return root


def test_images_of_another_data_set_have_the_size_of_the_training(
    folders: Path, tmp_path: Path
) -> None:
    config = recipe(
        "folder",
        *("ce", "sgd"),
        data_root=str(folders),
        image_size=32,
        workers=0,
        model="resnet8",
        epochs=3,
        lr=0.02,
    ).config()
    Trainer(config, out=tmp_path / "run", progress=False).fit()
    run = TrainedRun.load(tmp_path / "run")
    other = load_dataset("folder", progress=False, data_root=folders, workers=0)
    found = evaluate_run(run, data=other, bootstrap=0)
    assert found.metrics == evaluate_run(run, bootstrap=0).metrics
    likelihoods = [
        float(np.log(each.probabilities[each.path.parent.name == np.array(run.class_names)][0]))
        for each in predict_files(run, [folders / "test"])
    ]
    assert found.metrics.nll == pytest.approx(-np.mean(likelihoods), rel=1e-4)


def test_predictions_do_not_overwrite_their_inputs(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = next((folders / "test" / "class0").iterdir())
    before = image.read_bytes()
    line = ["predict", str(tmp_path), str(image), "--format", "csv"]
    assert main([*line, "--out", str(image)]) == 2
    assert main([*line, "--out", str(tmp_path / "checkpoint.pt")]) == 2
    assert "choose another name" in capsys.readouterr().err
    assert image.read_bytes() == before
