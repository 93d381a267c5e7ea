"""``--data hf:NAME`` on local files: parquet, saved sets and image folders. Needs ``datasets``."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastsam.cli import main
from fastsam.longtail import TrainConfig, recipe
from fastsam.longtail.data import LongTailData, load_dataset
from fastsam.longtail.data.content import file_digest
from fastsam.longtail.errors import DataError, UsageError

datasets = pytest.importorskip("datasets")
arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of the library

NAMES = ["crab", "owl", "fox"]
COUNTS = (12, 6, 3)
SPLITS = {"train": COUNTS, "validation": (2, 2, 2), "test": (3, 3, 3)}


def png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def write(path: Path, *, start: int = 0, counts: tuple[int, ...] = COUNTS, label: int = 0) -> None:
    """Write a parquet file with the features of a Hugging Face data set in its schema."""
    kinds = np.repeat(np.arange(len(counts)), counts) + label
    features = datasets.Features(
        photo=datasets.Image(),
        kind=datasets.ClassLabel(names=NAMES),
        camera=datasets.Value("string"),
    )
    content = {
        "photo": [{"bytes": png(start + number), "path": None} for number in range(len(kinds))],
        "kind": kinds.tolist(),
        "camera": [f"cam{number // 3}" for number in range(len(kinds))],
    }
    parquet.write_table(arrow.table(content, schema=features.arrow_schema), path)


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def load(path: Path | str, **settings: Any) -> LongTailData:
    options = {"image_size": 14, "workers": 0, **settings}
    return load_dataset(f"hf:{path}", progress=False, **options)


def test_a_parquet_file_is_split_by_groups(tmp_path: Path) -> None:
    path = tmp_path / "photos.parquet"
    write(path)
    data = load(path, split_test=0.3, group_column="camera")
    assert data.class_names == tuple(NAMES)
    rows = {
        part: [int(name.split("/")[1]) for name in images.images.paths]  # type: ignore[attr-defined]
        for part, images in data.splits.items()
    }
    cameras = {part: {row // 3 for row in found} for part, found in rows.items()}
    assert not cameras["train"] & cameras["test"]
    assert sorted(rows["train"] + rows["test"]) == list(range(21))
    images: Any = data.train
    for place, row in enumerate(rows["train"]):
        assert images.digests([place]) == [file_digest(png(row))]
    (batch,) = images.batches([np.arange(len(images))], None, torch.device("cpu"))
    first = np.asarray(Image.open(io.BytesIO(png(rows["train"][0]))))[1:-1, 1:-1] / 255
    shown = batch.inputs[0].numpy() * np.array(images.std)[:, None, None]
    shown += np.array(images.mean)[:, None, None]
    assert np.allclose(shown, first.transpose(2, 0, 1), atol=1e-5)


@pytest.mark.parametrize("saved", [True, False])
def test_saved_sets_have_their_splits(saved: bool, tmp_path: Path) -> None:
    folder = tmp_path / ("files" if saved else "saved")
    folder.mkdir()
    for number, (name, counts) in enumerate(SPLITS.items()):
        write(folder / f"{name}-00000-of-00001.parquet", start=100 * number, counts=counts)
    if saved:
        datasets.load_dataset(str(folder)).save_to_disk(str(tmp_path / "saved"))
    data = load(tmp_path / "saved")
    assert [len(images) for images in data.splits.values()] == [21, 6, 9]
    assert data.counts.tolist() == [12, 6, 3]
    turned = load(tmp_path / "saved", test_split="validation", validation_split="test")
    assert [len(images) for images in turned.splits.values()] == [21, 9, 6]
    with pytest.raises(UsageError, match=r"a test part already; omit --split-test"):
        load(tmp_path / "saved", split_test=0.2)


def test_an_image_folder_from_training_to_evaluation(tmp_path: Path) -> None:
    for number, label in enumerate(np.repeat([0, 1, 2], COUNTS)):
        path = tmp_path / "photos" / "train" / NAMES[label] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    run = tmp_path / "run"
    command = [
        "train",
        "--data",
        f"hf:{tmp_path / 'photos'}",
        "--split-test",
        "0.2",
        "--epochs",
        "1",
    ]
    command += ["--image-size", "16", "--model", "resnet8", "--batch-size", "8", "--workers", "2"]
    command += ["--augment", "trivialaugment", "--quiet", "--method", "ce", "--optimizer", "sgd"]
    assert main([*command, "--out", str(run)]) == 0
    assert main(["evaluate", str(run)]) == 0
    assert (
        main(["data", "check", f"hf:{tmp_path / 'photos'}", "--split-test", "0.2", "--decode"]) == 0
    )


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, DataError, r"no test part.*--test-split \(it has train\).*--split-test 0\.2"),
        ({"label_column": "knd"}, UsageError, "did you mean 'kind'"),
        ({"group_column": "cam"}, UsageError, "unknown group_column 'cam'"),
        ({"image_column": "kind"}, UsageError, "must have images"),
        ({"test_split": "dev"}, UsageError, "unknown split of hf:"),
    ],
)
def test_what_is_missing_is_named(
    settings: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "photos.parquet"
    write(path)
    with pytest.raises(error, match=message):
        load(path, **settings)


def test_other_files_and_unlabeled_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load(tmp_path / "none")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"expected a file with one of \.parquet"):
        load(tmp_path / "a.txt")
    folder = tmp_path / "unlabeled"
    folder.mkdir()
    write(folder / "train-00000-of-00001.parquet")
    write(folder / "test-00000-of-00001.parquet", start=50, counts=(3,), label=-1)
    with pytest.raises(
        DataError,
        match=r"without a label \(label -1\): split 'test'; leave it out with --test-split none and",
    ):
        load(folder)


def saved(folder: Path, *, test_label: int = 0) -> Path:
    folder.mkdir()
    write(folder / "train-00000-of-00001.parquet")
    write(folder / "test-00000-of-00001.parquet", start=50, counts=(3,), label=test_label)
    return folder


@pytest.mark.parametrize("label", [0, -1])
def test_a_given_test_part_can_be_left_out(label: int, tmp_path: Path) -> None:
    folder = saved(tmp_path / "set", test_label=label)
    with pytest.raises((UsageError, DataError), match=r"leave .* out with --test-split none"):
        load(folder, split_test=0.3)
    data = load(folder, split_test=0.3, test_split="none")
    assert sum(len(images) for images in data.splits.values()) == 21
    with pytest.raises(DataError, match=r"no test part"):
        load(folder, test_split="none")


def test_the_name_of_a_local_set_is_its_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is loaded in another folder must not find another set, on the hub or elsewhere."""
    write(tmp_path / "photos.parquet")
    monkeypatch.chdir(tmp_path)
    name = f"hf:{tmp_path / 'photos.parquet'}"
    for typed in ("hf:photos.parquet", "hf:./photos.parquet", name):
        config = recipe(typed, "ce", "sgd", split_test=0.2).config()
        assert config.data == TrainConfig.from_dict(config.as_dict()).data == name
        data = load_dataset(typed, progress=False, split_test=0.2, image_size=14, workers=0)
        assert data.name == name
    assert recipe("hf:uoft-cs/cifar100", "ce", "sgd").config().data == "hf:uoft-cs/cifar100"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"photos\.parquet does not exist; move it back"):
        load("photos.parquet", split_test=0.2)  # not a name on the hub
    (tmp_path / "photos.parquet").unlink()
    with pytest.raises(DataError, match=r"photos\.parquet does not exist; move it back"):
        load(config.data.removeprefix("hf:"), split_test=0.2)


def test_equal_contents_are_errors_and_damage_names_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "set"
    for number, label in enumerate(np.repeat([0, 1], 8)):
        path = folder / "train" / NAMES[label] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number if number else 1))
    command = ["data", "check", f"hf:{folder}", "--split-test", "0.2"]
    assert main(command) == 1
    assert "problem(s) with repeated images" in capsys.readouterr().err
    path.write_bytes(png(0)[:80])
    (folder / "train" / NAMES[0] / "0.png").write_bytes(png(77))
    assert main([*command, "--decode", "--workers", "0"]) == 1
    assert f"To use hf:{folder}: pass hf:NAME" in capsys.readouterr().err


def test_a_configuration_of_files_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "photos.parquet")
    with pytest.raises(UsageError, match=r"hf_config 'small' would have no effect"):
        load(tmp_path / "photos.parquet", split_test=0.2, hf_config="small")
    datasets.load_dataset(str(saved(tmp_path / "set"))).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(UsageError, match=r"hf_config 'small' would have no effect"):
        load(tmp_path / "saved", hf_config="small")
