"""Channels and normalization of the user's own images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastsam.longtail import Trainer, recipe
from fastsam.longtail.data import Images, LongTailData, channels, load_dataset, load_digits_lt
from fastsam.longtail.data import statistics as pixel_statistics_module
from fastsam.longtail.data.normalization import Normalization
from fastsam.longtail.errors import DataError, UsageError
from fastsam.longtail.models import MODELS, build_model
from fastsam.longtail.trained import TrainedRun, evaluate_run, predict_files
from fastsam.longtail.training import fit_stages

SIZE = 14
"""Prepared images are 16 pixels with a border of one pixel cut off: those below are not resized."""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTSAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(root: Path, *, gray: bool) -> Path:
    rng = np.random.default_rng(0)
    for number in range(20):
        path = root / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (16, 16) if gray else (16, 16, 3)
        Image.fromarray(rng.integers(0, 100 + 50 * (number % 2), shape, dtype=np.uint8)).save(path)
    if gray:
        Image.fromarray(rng.integers(0, 65536, (16, 16)).astype(np.uint16)).save(
            root / "a" / "d.png"
        )
    return root


def load(root: Path, **settings: Any) -> LongTailData:
    options = {"data_root": root, "split_test": 0.2, "image_size": SIZE, "workers": 0}
    return load_dataset("folder", progress=False, **options, **settings)


def inputs(images: Images) -> torch.Tensor:
    (batch,) = images.batches([np.arange(len(images))], None, torch.device("cpu"))
    return batch.inputs


def pixels(data: LongTailData) -> np.ndarray:
    """Return the training images as Pillow reads them, in [0, 1], ``[N, C, H, W]``."""
    images: Any = data.train
    found = []
    for path in images.images.paths:
        image = np.asarray(Image.open(images.root / path))
        white = 65535 if image.dtype == np.uint16 else 255
        image = image[1:-1, 1:-1].astype(np.float64) / white
        found.append(image[None] if image.ndim == 2 else image.transpose(2, 0, 1))
    return np.stack(found)


@pytest.mark.parametrize("gray", [True, False])
def test_statistics_of_the_set(
    gray: bool, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write(tmp_path / "photos", gray=gray)
    data = load(root, channels=0, normalization="set")
    expected = pixels(data)
    assert data.train.channels == expected.shape[1] == (1 if gray else 3)
    assert np.allclose(data.train.mean, expected.mean(axis=(0, 2, 3)), atol=1e-4)
    assert np.allclose(data.train.std, expected.std(axis=(0, 2, 3)), atol=1e-4)
    assert data.test.mean == data.train.mean
    found = inputs(data.train)
    assert found.mean(dim=(0, 2, 3)).abs().max() < 1e-3
    assert (found.std(dim=(0, 2, 3)) - 1).abs().max() < 1e-3
    assert any(f"input: {data.train.channels} channel(s) of 14x14" in note for note in data.notes)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("it is in the cache")

    monkeypatch.setattr(pixel_statistics_module, "_computed", refuse)
    assert load(root, channels=0, normalization="set").train.mean == data.train.mean
    for path in (cache / "statistics").iterdir():
        path.write_text("damaged")
    with pytest.raises(AssertionError, match="in the cache"):
        load(root, channels=0, normalization="set")


def test_named_and_given_normalizations(tmp_path: Path) -> None:
    root = write(tmp_path, gray=False)
    plain = load(root)
    assert plain.train.mean == (0.485, 0.456, 0.406)
    assert plain.train.std == (0.229, 0.224, 0.225)
    half = load(root, normalization="half")
    assert (half.train.mean, half.train.std) == ((0.5,) * 3, (0.5,) * 3)
    gray = load(root, channels=1)
    assert (gray.train.mean, gray.train.std) == ((0.449,), (0.226,))
    given = load(root, pixel_mean=(0.1, 0.2, 0.3), pixel_std=(0.5,) * 3)
    raw = torch.from_numpy(pixels(given))
    expected = (raw - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / 0.5
    assert torch.allclose(inputs(given.train), expected.float(), atol=1e-5)
    luma = (raw * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    one = load(root, channels=1, pixel_mean=(0.0,), pixel_std=(1.0,))
    assert (inputs(one.train) - luma).abs().max() < 1.1 / 255


def test_another_normalization_can_be_set_from_python(tmp_path: Path) -> None:
    """What a pretrained network requires."""
    data = load(write(tmp_path, gray=False))
    other = data.normalized((0.0,) * 3, (1.0,) * 3)
    assert torch.allclose(inputs(other.test).amin(), torch.tensor(0.0))
    assert other.test.preprocessing is not None
    assert other.test.preprocessing.mean == (0.0,) * 3
    assert load_digits_lt().normalized((0.0,), (1.0,)).test.std == (1.0,)
    with pytest.raises(UsageError, match=r"3 channel\(s\): expected as many means"):
        data.normalized((0.5,), (0.5,))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pixel_mean": (0.5,)}, "pixel_mean and pixel_std require each other"),
        (
            {"pixel_mean": (0.5,) * 2, "pixel_std": (0.5,) * 2},
            "one value, or one for each of 3 chan",
        ),
        ({"pixel_mean": (0.5,), "pixel_std": (0.0,)}, "pixel_std must be above 0"),
        (
            {"pixel_mean": (0.5,), "pixel_std": (1.0,), "normalization": "half"},
            "replace normalization",
        ),
        ({"normalization": "network"}, "requires a pretrained network.*choose imagenet"),
        ({"normalization": "sets"}, "did you mean 'set'"),
        ({"channels": 2}, "unknown channels 2; valid: 0, 1, 3"),
    ],
)
def test_values_that_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        load(tmp_path, **settings)


def test_a_gray_run_from_training_to_prediction(tmp_path: Path, cache: Path) -> None:
    root = write(tmp_path / "photos", gray=True)
    options: dict[str, Any] = {"data_root": str(root), "split_test": 0.2, "image_size": SIZE}
    options |= {"channels": 0, "normalization": "set", "workers": 0, "augment": "default"}
    config = recipe(
        "folder", "ce", "sgd", model="resnet8", epochs=1, batch_size=8, **options
    ).config()
    Trainer(config, out=tmp_path / "run", progress=False).fit()
    run = TrainedRun.load(tmp_path / "run")
    assert run.checkpoint.channels == 1
    assert evaluate_run(run, bootstrap=0).metrics.accuracy >= 0
    assert len(list(predict_files(run, [root]))) == 21


@pytest.mark.parametrize("gray", [False, True])
def test_the_normalization_of_a_pretrained_network(
    gray: bool, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is used from training to prediction, and by every stage."""
    root = write(tmp_path / "photos", gray=gray)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.1, 0.3)
    part = replace(MODELS["resnet18"], normalization=lambda settings: Normalization(mean, std))
    monkeypatch.setitem(MODELS._parts, "resnet18", part)
    weights = tmp_path / "weights.pt"
    torch.save(build_model("resnet18", 2).features.network.state_dict(), weights)
    options: dict[str, Any] = {"data_root": str(root), "split_test": 0.2, "image_size": SIZE}
    options |= {"channels": 0, "normalization": "network", "workers": 0, "stages": "linear-probe"}
    names = ("folder", "ce", "sgd")
    config = recipe(
        *names, model="resnet18", pretrained=str(weights), epochs=1, batch_size=8, **options
    ).config()
    fit_stages(config, out=tmp_path / "run", progress=False)
    run = TrainedRun.load(tmp_path / "run")
    weights.unlink()
    expected = (float(np.mean(mean)),) if gray else mean
    assert run.data().train.mean == pytest.approx(expected)
    shown = "0.4 and 0.2" if gray else "0.5, 0.4, 0.3 and 0.2, 0.1, 0.3"
    notes = [note for note in run.data().notes if note.startswith("input: ")]
    size = f"{len(expected)} channel(s) of 14x14 pixels"
    assert notes == [f"input: {size}, mean and standard deviation {shown}"]
    assert run.known_preprocessing().mean == pytest.approx(expected)
    assert len(list(predict_files(run, [root]))) == 20 + gray


def test_the_headers_of_a_gray_set_are_read_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write(tmp_path / "photos", gray=True)
    assert load(root, channels=0).train.channels == 1

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("it is in the cache")

    monkeypatch.setattr(channels, "is_gray", refuse)
    assert load(root, channels=0).train.channels == 1
    Image.new("RGB", (16, 16)).save(root / "a" / "0.png")
    monkeypatch.undo()
    monkeypatch.setenv("FASTSAM_CACHE", str(cache))
    assert load(root, channels=0, split_seed=1).train.channels == 3


def test_channels_of_unreadable_images_are_not_guessed(tmp_path: Path, cache: Path) -> None:
    for number in range(8):
        path = tmp_path / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes([number]))
    with pytest.raises(DataError, match=r"none of the 6 training images .* --channels 1 or 3"):
        load(tmp_path, channels=0)
