"""`fastsam data check` and `fastsam data convert`."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset, TensorDataset

from fastsam.cli import main
from fastsam.longtail.data import DATASETS, TensorImages, from_datasets, load_dataset
from fastsam.longtail.data.lists import read_list
from fastsam.longtail.data.sheet import tiled, write_sheets
from fastsam.longtail.errors import UsageError
from python_tests.longtail.archives import write_inaturalist_json, write_listed


def failure(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> str:
    """Run a command that must fail, and return its error line."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_data_check(tmp_path: Path, capsys: Any) -> None:
    assert main(["data", "check", "digits-lt", "--imbalance", "50"]) == 0
    output = capsys.readouterr().out
    assert "10 classes, 2 to 100 training images" in output
    assert "train, SHA-256 of pixels: " in output
    assert "To use cifar10-lt" in failure(
        capsys, 1, "data", "check", "cifar10-lt", "--root", tmp_path
    )
    assert "places2" in failure(capsys, 1, "data", "check", "places-lt", "--root", tmp_path)
    assert "valid: cifar10-lt" in failure(capsys, 2, "data", "check", "mnist")
    write_listed(tmp_path, {"train.txt": ("a", [2, 1]), "test.txt": ("b", [1, 1])})
    assert main(["data", "check", "list", "--root", str(tmp_path)]) == 0
    assert main(["data", "check", "list", "--data-root", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "training set, SHA-256: " in output
    assert "train, SHA-256 of sizes and sampled bytes: " in output
    write_listed(tmp_path, {"train.txt": ("a", [2, 1]), "test.txt": ("b", [1, 1])})


def help_of(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the help of a command on one line, without boxes."""
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


@pytest.mark.parametrize(
    "command", [["data", "check"], ["data", "show"], ["evaluate", "runs", "--data"]]
)
def test_help_shows_the_recipe_of_a_named_data_set(command: list[str], capsys: Any) -> None:
    images = DATASETS["fashion-mnist-lt"].recipe["validation_per_class"].value
    text = help_of([*command, "fashion-mnist-lt"], capsys)
    assert f"no validation set, else at least 5 (recipe: {images})" in text
    assert "--validation-seed INT seed of the choice of validation images (default: 0)" in text
    assert "overrides the defaults" not in text


def test_an_option_may_have_a_value_that_names_a_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    write_listed(tmp_path / "digits-lt", {"train.txt": ("a", [2, 1]), "test.txt": ("b", [1, 1])})
    for arguments in (["list", "--root", "digits-lt"], ["--root", "digits-lt", "list"]):
        assert main(["data", "check", *arguments]) == 0, capsys.readouterr().err


def test_help_without_a_data_set_says_that_recipes_override_defaults(capsys: Any) -> None:
    text = help_of(["data", "check"], capsys)
    assert "no validation set, else at least 5 (default: 0)" in text
    assert "The recipe of the data set overrides the defaults below." in text


def test_data_check_decodes_and_names_every_broken_file(tmp_path: Path, capsys: Any) -> None:
    write_listed(tmp_path, {"train.txt": ("a", [100, 1]), "test.txt": ("b", [1, 1])})
    check = ["data", "check", "list", "--root", str(tmp_path)]
    assert main([*check, "--decode", "--workers", "0"]) == 0
    assert "all images can be decoded" in capsys.readouterr().out
    broken = ("a/n00000000/train_3.JPEG", "a/n00000000/train_99.JPEG", "b/n00000001/test_0.JPEG")
    for path in broken:
        whole = (tmp_path / path).read_bytes()
        (tmp_path / path).write_bytes(whole[: len(whole) // 3])
    assert main(check) == 0
    others = multiprocessing.active_children()
    for workers in ("0", "2"):
        capsys.readouterr()
        assert main([*check, "--decode", "--workers", workers]) == 1
        output = capsys.readouterr()
        for path in broken:
            assert output.out.count(f"cannot be decoded: {path}\n") == 1
        assert f"3 images cannot be decoded; the first is {broken[0]}" in output.err
    assert set(multiprocessing.active_children()) <= set(others)
    assert "--workers requires --decode" in failure(capsys, 2, *check, "--workers", "2")
    assert "at least 0" in failure(capsys, 2, *check, "--decode", "--workers", "-1")


def test_data_convert(tmp_path: Path, capsys: Any) -> None:
    source, out = tmp_path / "train2018.json", tmp_path / "list.txt"
    assert "does not exist" in failure(capsys, 1, "data", "convert", source, out)
    write_inaturalist_json(source, [3, 1])
    assert main(["data", "convert", str(source), str(out)]) == 0
    assert len(read_list(out)) == 4
    assert "--overwrite" in failure(capsys, 2, "data", "convert", source, out)


def test_sheets_are_named_by_class_and_count(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "sheets"
    command = ["data", "show", "digits-lt", "--imbalance", "50", "--out", str(out)]
    assert main([*command, "--columns", "5", "--rows", "3"]) == 0
    names = sorted(path.name for path in out.iterdir())
    assert names[:2] == ["0-0-100.png", "1-1-64.png"]
    assert names[-2:] == ["9-9-2.png", "overview.png"]
    assert len(capsys.readouterr().out.splitlines()) == 11
    with Image.open(out / "0-0-100.png") as sheet:
        assert sheet.size == (5 * 66 - 2, 3 * 66 - 2)
        shown = np.asarray(sheet)
    data = load_dataset("digits-lt")
    assert isinstance(data.train, TensorImages)
    # The second image of the second row, enlarged eight times, is the seventh of class 0.
    cell = shown[66:130, 66:130, 0][4::8, 4::8]
    expected = (data.train.images[6, 0].float() * 255 / 16).round()
    assert np.abs(cell.astype(int) - expected.numpy()).max() <= 1
    assert main(command) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--split", "unseen"]) == 2
    assert "valid: train, validation, test" in capsys.readouterr().err
    with pytest.raises(UsageError, match="rows and columns"):
        list(write_sheets(data, tmp_path, columns=0))
    assert tiled(np.zeros((4, 100, 90, 3), dtype=np.uint8), 3).shape == (2 * 102 - 2, 3 * 92 - 2, 3)


def test_classes_without_an_image_in_the_split_have_an_empty_row(
    tmp_path: Path, capsys: Any
) -> None:
    for name, count in {"train/a": 4, "train/b": 3, "train/c": 2, "test/a": 2, "test/c": 1}.items():
        (tmp_path / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.full((40, 40, 3), (len(name) * 50 + number * 9) % 200, np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    (tmp_path / "test" / "b").mkdir()
    out = tmp_path / "sheets"
    command = ["data", "show", "folder", "--root", str(tmp_path), "--image-size", "32"]
    options = ["--split", "test", "--columns", "2", "--workers", "0", "--out", str(out)]
    assert main([*command, *options]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    names = sorted(path.name for path in out.iterdir())
    assert names == ["0-a-2.png", "2-c-1.png", "overview.png"]
    with Image.open(out / "overview.png") as opened:
        rows = np.asarray(opened)
    white = [bool((rows[66 * row : 66 * row + 64] == 255).all()) for row in range(3)]
    assert white == [False, True, False]
    images = TensorDataset(torch.zeros(4, 1, 8, 8), torch.tensor([0, 0, 1, 1]))
    data = from_datasets("own", images, images)
    empty = replace(data.test, dataset=Subset(images, []), labels=np.zeros(0, np.int64))  # type: ignore[type-var]
    with pytest.raises(UsageError, match="test split of own has no images"):
        list(write_sheets(replace(data, test=empty), tmp_path / "none", split="test"))
    assert not (tmp_path / "none").exists()
