"""Evaluation views: logits averaged over five crops of each image file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fastsam.cli.main import main
from fastsam.longtail import Trainer, recipe
from fastsam.longtail.data import Preprocessing, load_dataset
from fastsam.longtail.errors import UsageError
from fastsam.longtail.predictions import view_logits
from fastsam.longtail.trained import TrainedRun, evaluate_run, predict_files
from python_tests.longtail.test_own_data import own_config, write_folders
from python_tests.longtail.test_trainer import FEW

SIZE, LARGER = 16, 18  # round(16 * 248 / 224)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    root = tmp_path_factory.mktemp("views")
    write_folders(root / "data")
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 31, 3), dtype=np.uint8))
    wide.save(root / "data" / "test" / "class 0" / "0.png")
    Trainer(own_config(root / "data", epochs=1), out=root / "run", progress=False).fit()
    return TrainedRun.load(root / "run")


def files(run: TrainedRun) -> list[Path]:
    root = Path(str(run.checkpoint.config.data_root))
    return sorted((root / "test").rglob("*.png"))


def five_passes(run: TrainedRun, path: Path) -> Tensor:
    """Return the mean logits of five passes over crops that Pillow makes."""
    image, preprocessing = Image.open(path), run.known_preprocessing()
    width, height = (LARGER * side / min(image.size) for side in image.size)
    image = image.resize((int(width), int(height)), Image.Resampling.BILINEAR)
    right, bottom = image.width - SIZE, image.height - SIZE
    corners = [(0, 0), (right, 0), (0, bottom), (right, bottom)]
    logits = []
    for x, y in [*corners, (round(right / 2), round(bottom / 2))]:
        crop = np.asarray(image.crop((x, y, x + SIZE, y + SIZE)), dtype=np.float32) / 255
        crop = (crop - np.float32(preprocessing.mean)) / np.float32(preprocessing.std)
        with torch.no_grad():
            logits.append(run.network(torch.from_numpy(crop).permute(2, 0, 1)[None])[0])
    return torch.stack(logits).mean(dim=0)


def test_logits_are_those_of_five_passes(run: TrainedRun) -> None:
    expected = torch.stack([five_passes(run, path) for path in files(run)])
    preprocessing = run.known_preprocessing().with_views(5)
    inputs = torch.stack([preprocessing.apply(path) for path in files(run)])
    with torch.no_grad():
        torch.testing.assert_close(view_logits(run.network, inputs), expected)
    found = predict_files(run, files(run), views=5, batch_size=3)
    probabilities = np.stack([prediction.probabilities for prediction in found])
    np.testing.assert_allclose(probabilities, expected.softmax(dim=1), atol=1e-6)
    evaluation = evaluate_run(run, bootstrap=0, views=5)
    targets = torch.tensor([int(path.parent.name[-1]) for path in files(run)])
    nll = nn.functional.cross_entropy(expected, targets)
    assert evaluation.metrics.nll == pytest.approx(float(nll), abs=1e-5)
    assert evaluation.views == 5
    once = evaluate_run(run, bootstrap=0)
    assert once.metrics.nll != evaluation.metrics.nll
    assert once == evaluate_run(run, bootstrap=0, views=1)


def test_the_commands(run: TrainedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    option = ["--evaluation-views", "5"]
    out = tmp_path / "evaluation.json"
    main(["evaluate", str(run.path), *option, "--bootstrap", "0", "--out", str(out), "--quiet"])
    assert "logits averaged over 5 views" in capsys.readouterr().out
    assert json.loads(out.read_text())["views"] == 5
    one = files(run)[0]
    main(["predict", str(run.path), str(one), *option, "--format", "json"])
    [found] = predict_files(run, one, views=5)
    assert f"{float(found.probability):.4f}"[:6] in capsys.readouterr().out


def test_what_has_no_views(run: TrainedRun, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="views must be 1 or 5"):
        run.known_preprocessing().with_views(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="5 views are crops of a larger image"):
        Preprocessing((8, 8), 1, (0.5,), (0.5,), views=5)
    config = recipe("digits-lt", "ce", "sgd", model="resnet8", epochs=1).config()
    Trainer(config, data=FEW, out=tmp_path, progress=False).fit()
    digits = TrainedRun.load(tmp_path)
    with pytest.raises(UsageError, match=r"these images are in memory.*use 1 view"):
        evaluate_run(digits, data=load_dataset("digits-lt"), views=5)
