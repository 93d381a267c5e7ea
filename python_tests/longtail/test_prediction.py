"""`fastsam predict`: files get the same probabilities as the images of the data set."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from fastsam.cli import main
from fastsam.longtail import Trainer, recipe
from fastsam.longtail.data import LongTailData, TensorImages, from_datasets, load_dataset
from fastsam.longtail.errors import DataError, LongTailError, UsageError
from fastsam.longtail.trained import FilePrediction, TrainedRun, predict_files
from fastsam.longtail.trained.prediction import image_files
from fastsam.longtail.trained.prediction_text import csv_parts, json_parts

COUNT = 20
HOSTILE = (
    "=1+1.png",
    "a,b.png",
    'say "hi".png',
    "two\nlines.png",
    "@SUM(A1).PNG",
    "-1.png",
    "\x1b[2J.png",
    "naïve.png",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train on digits scaled to white = 255, as in PNG files, with post-hoc adjustment."""
    out = tmp_path_factory.mktemp("run")
    data = digits()
    config = recipe("own:bytes", "ce", "sgd", epochs=3, model="resnet8", posthoc_tau=0.7).config()
    Trainer(config, data=data, out=out, progress=False).fit()
    return out


def digits() -> LongTailData:
    data = load_dataset("digits-lt")

    def white_255(images: TensorImages) -> TensorImages:
        pixels = (images.images.double() * 255 / 16).round().to(torch.uint8)
        return replace(images, images=pixels, white=255.0)

    splits = {name: white_255(images) for name, images in data.splits.items()}  # type: ignore[arg-type]
    return replace(data, name="bytes", **splits)


@pytest.fixture(scope="module")
def run(folder: Path) -> TrainedRun:
    return TrainedRun.load(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the first test images to files, sorted by name."""
    root = tmp_path_factory.mktemp("pictures")
    for place, pixels in enumerate(digits().test.images[:COUNT, 0].numpy()):
        inside = root / f"part{place // 8}"
        inside.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(inside / f"{place:03}.png")
    return root


def test_files_have_the_precision_of_training(pictures: Path, tmp_path: Path) -> None:
    config = recipe(
        "own:bytes", "ce", "sgd", epochs=1, model="resnet8", precision="bfloat16"
    ).config()
    data = digits()
    Trainer(config, data=data, out=tmp_path, progress=False).fit()
    run = TrainedRun.load(tmp_path)
    found = np.stack([p.probabilities for p in predict_files(run, pictures, batch_size=COUNT)])
    images = data.test.batches([np.arange(COUNT)], None, run.device)
    inputs = next(iter(images)).inputs
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rounded = run.network(inputs).float().softmax(dim=1).numpy()
    with torch.no_grad():
        exact = run.network(inputs).softmax(dim=1).numpy()
    assert np.abs(found - rounded).max() < 1e-6
    assert np.abs(found - exact).max() > 1e-5


@pytest.fixture
def hostile(tmp_path: Path, pictures: Path) -> Path:
    root = tmp_path / "hostile"
    root.mkdir()
    for name in HOSTILE:
        (root / name).write_bytes((pictures / "part0" / "000.png").read_bytes())
    return root


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must fail, and return its error line."""

    def check(code: int, *arguments: object) -> str:
        assert main(["predict", *map(str, arguments)]) == code
        lines = capsys.readouterr().err.splitlines()
        return lines[-1]

    return check


@pytest.mark.parametrize("workers", [0, 2])
def test_files_get_the_probabilities_of_the_sets_own_images(
    run: TrainedRun, pictures: Path, workers: int
) -> None:
    images = digits().test
    [batch] = images.batches([np.arange(COUNT)], None, torch.device("cpu"))
    with torch.no_grad():
        logits = run.trained_head(run.network.features(batch.inputs)).double()
    prior = np.log(run.counts / run.counts.sum())  # the adjustment again, in float64
    expected = np.exp(logits.numpy() - 0.7 * prior)
    expected /= expected.sum(axis=1, keepdims=True)
    found = list(predict_files(run, [pictures], batch_size=7, workers=workers))
    assert [item.path.name for item in found] == [f"{place:03}.png" for place in range(COUNT)]
    rows = np.stack([item.probabilities for item in found])
    assert rows == pytest.approx(expected, abs=1e-5)
    assert [item.label for item in found] == expected.argmax(axis=1).tolist()
    # One batch of the same images gives the same bits.
    whole = predict_files(run, [pictures], batch_size=COUNT, workers=workers)
    with torch.no_grad():
        same = run.network(batch.inputs).softmax(dim=1).numpy()
    assert np.array_equal(np.stack([item.probabilities for item in whole]), same)


def test_one_path_is_enough(run: TrainedRun, pictures: Path) -> None:
    names = [item.path for item in predict_files(run, [pictures])]
    for one in (pictures, str(pictures)):
        assert [item.path for item in predict_files(run, one)] == names


def test_files_are_read_as_they_are_needed(
    run: TrainedRun, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    apply = type(run.known_preprocessing()).apply
    monkeypatch.setattr(
        type(run.known_preprocessing()),
        "apply",
        lambda self, path: (read.append(path), apply(self, path))[1],
    )
    found = predict_files(run, [pictures], batch_size=4)
    assert not read
    assert len(list(islice(found, 5))) == 5
    assert len(read) == 8
    assert not torch.is_inference_mode_enabled()
    next(found)
    assert not torch.is_inference_mode_enabled()


def test_which_files_are_images(tmp_path: Path) -> None:
    for name in (
        "b/2.PNG",
        "b/1.jpeg",
        "b.png",
        "a/z.tif",
        ".hidden/x.png",
        "a/.x.png",
        "a/no.txt",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    names = [path.relative_to(tmp_path).as_posix() for path in image_files([tmp_path])]
    assert names == ["a/z.tif", "b/1.jpeg", "b/2.PNG", "b.png"]
    assert names == sorted(names, key=lambda name: Path(name).parts)
    again = image_files([tmp_path / "b.png", tmp_path / "a/no.txt", tmp_path / "b"])
    assert [path.name for path in again] == ["b.png", "no.txt", "1.jpeg", "2.PNG"]
    (tmp_path / "a/up").symlink_to(tmp_path)
    with pytest.raises(DataError, match=r"a link to a folder that contains it"):
        list(image_files([tmp_path]))


def test_csv_and_json_say_the_same(
    folder: Path, pictures: Path, tmp_path: Path, capsys: Any
) -> None:
    arguments = ["predict", str(folder), str(pictures)]
    assert main(arguments) == 0
    lines = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert lines[0] == ["path", "class", "probability", *map(str, range(10))]
    assert main([*arguments, "--out", str(tmp_path / "found.csv")]) == 0
    assert list(csv.reader((tmp_path / "found.csv").read_text().splitlines())) == lines
    assert main([*arguments, "--out", str(tmp_path / "found.json")]) == 0
    objects = json.loads((tmp_path / "found.json").read_text())
    assert capsys.readouterr().out == ""
    expected = list(predict_files(TrainedRun.load(folder), [pictures]))
    for line, item, wanted in zip(lines[1:], objects, expected, strict=True):
        assert line[0] == item["path"] == str(wanted.path)
        assert line[1] == item["class"] == str(item["label"]) == str(wanted.label)
        assert np.float32(line[2]) == np.float32(item["probability"]) == wanted.probabilities.max()
        assert list(item["probabilities"]) == lines[0][3:]
        for row in (line[3:], list(item["probabilities"].values())):
            assert np.array_equal(np.array(row, dtype=np.float32), wanted.probabilities)


def test_the_most_probable_classes(folder: Path, pictures: Path, tmp_path: Path) -> None:
    for suffix in ("csv", "json"):
        out = tmp_path / f"top.{suffix}"
        arguments = ["predict", str(folder), str(pictures), "--top", "3", "--out", str(out)]
        assert main(arguments) == 0
    rows = list(csv.DictReader((tmp_path / "top.csv").read_text().splitlines()))
    objects = json.loads((tmp_path / "top.json").read_text())
    for row, item, wanted in zip(
        rows, objects, predict_files(TrainedRun.load(folder), [pictures]), strict=True
    ):
        order = sorted(range(10), key=lambda label: -wanted.probabilities[label])[:3]
        assert [row["class"], row["class_2"], row["class_3"]] == [str(label) for label in order]
        assert list(item["probabilities"]) == [str(label) for label in order]
        assert np.float32(row["probability_3"]) == wanted.probabilities[order[2]]
        assert len(row) == 7


def test_hostile_file_names(
    folder: Path, hostile: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(hostile)
    names = sorted(HOSTILE)
    assert main(["predict", str(folder), "."]) == 0
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    defused = [f"'{name}" if name[0] in "=@-" else name for name in names]
    assert [row[0] for row in rows[1:]] == [name.replace("\x1b", "\\x1b") for name in defused]
    assert {len(row) for row in rows} == {13}
    assert main(["predict", str(folder), ".", "--format", "json"]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert [item["path"] for item in json.loads(text)] == names


@pytest.mark.skipif(os.name == "nt", reason="file names are text there")
def test_a_file_name_that_is_no_text(folder: Path, pictures: Path, tmp_path: Path) -> None:
    strange = os.fsencode(tmp_path) + b"/caf\xe9.png"
    with open(strange, "wb") as file:
        file.write((pictures / "part0" / "000.png").read_bytes())
    for suffix in ("csv", "json"):
        out = tmp_path / f"out.{suffix}"
        assert main(["predict", str(folder), os.fsdecode(strange), "--out", str(out)]) == 0
    assert json.loads((tmp_path / "out.json").read_text())[0]["path"] == os.fsdecode(strange)
    assert "caf\\udce9.png" in (tmp_path / "out.csv").read_text()


def test_names_of_classes_that_would_hide_columns() -> None:
    prediction = FilePrediction(Path("x.png"), np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    names = ["path", "=2*3", "twin", "twin"]
    header, line = csv.reader(io.StringIO("".join(csv_parts([prediction], names))))
    assert header[3:] == ["path (class 0)", "'=2*3", "twin (class 2)", "twin (class 3)"]
    assert line[:3] == ["x.png", "path", "0.5"]
    [item] = json.loads("".join(json_parts([prediction], names)))
    assert item["probabilities"] == {
        "path": 0.5,
        "=2*3": 0.25,
        "twin (class 2)": 0.125,
        "twin (class 3)": 0.125,
    }
    assert json.loads("".join(json_parts([], names))) == []
    assert "".join(csv_parts([], names[:1])) == "path,class,probability,path (class 0)\n"


def test_images_that_cannot_be_read(
    folder: Path, run: TrainedRun, pictures: Path, tmp_path: Path, fails: Any, capsys: Any
) -> None:
    good = pictures / "part0" / "000.png"
    broken = tmp_path / "broken.png"
    broken.write_bytes(good.read_bytes()[:40])
    out = tmp_path / "out.csv"
    message = fails(1, folder, good, broken, "--out", out)
    assert f"cannot read {broken}" in message
    assert "--corrupt skip" in message
    assert not out.exists()
    assert main(["predict", str(folder), str(broken)]) == 1
    assert capsys.readouterr().out == ""  # not even the header
    assert main(["predict", str(folder), str(broken), str(good), "--corrupt", "skip"]) == 0
    output = capsys.readouterr()
    assert [row[0] for row in csv.reader(io.StringIO(output.out))] == ["path", str(good)]
    assert f"skipped unreadable image {broken}" in output.err
    assert "none of the images can be read" in fails(1, folder, broken, "--corrupt", "skip")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match=r"cannot read .*text\.png"):
        list(predict_files(run, [tmp_path / "text.png"]))


def test_wrong_calls(
    folder: Path, run: TrainedRun, pictures: Path, tmp_path: Path, fails: Any
) -> None:
    picture = pictures / "part0" / "000.png"
    assert "does not exist" in fails(1, folder, tmp_path / "gone.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    assert "no image (.jpg" in fails(1, folder, picture, tmp_path / "empty")
    assert "pass image files or folders" in fails(2, folder)
    assert "no checkpoint" in fails(1, tmp_path, picture)
    assert "ends in .csv or .json" in fails(2, folder, picture, "--out", tmp_path / "x.txt")
    assert "top must be at least 1 and at most 10" in fails(2, folder, picture, "--top", 11)
    assert "top must be at least 1 and at most 10" in fails(
        2, folder, picture, "--top", 0, "--format", "json"
    )
    assert "batch_size must be" in fails(2, folder, picture, "--batch-size", 0)
    assert "workers must be" in fails(2, folder, picture, "--workers", -1)
    assert "unknown device" in fails(2, folder, picture, "--device", "tpu")
    assert "only on cpu and cuda" in fails(2, folder, picture, "--device", "mps")
    with pytest.raises(UsageError, match="valid: stop, skip"):
        predict_files(run, [picture], corrupt="keep")  # type: ignore[arg-type]


def test_a_run_whose_preprocessing_is_unknown(tmp_path: Path, pictures: Path, fails: Any) -> None:
    both = TensorDataset(torch.rand(30, 1, 8, 8), torch.tensor([0] * 20 + [1] * 10))
    config = recipe("own:mine", "ce", "sgd", epochs=1, model="resnet8").config()
    data = from_datasets("mine", both, both)
    Trainer(config, data=data, out=tmp_path, progress=False).fit()
    assert "own:mine was created in Python" in fails(1, tmp_path, pictures)


def test_outputs_that_are_not_finite(folder: Path, pictures: Path) -> None:
    run = TrainedRun.load(folder)
    run.network.head.offset.fill_(float("nan"))
    with pytest.raises(LongTailError, match=r"outputs for .*000\.png are infinite or NaN"):
        list(predict_files(run, [pictures]))
