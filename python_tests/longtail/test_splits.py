"""Parts that fastsam holds out of the user's own images: stratified, by groups, cut to a long tail."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastsam.cli import main
from fastsam.longtail import recipe
from fastsam.longtail.data import LongTailData, load_dataset
from fastsam.longtail.data.splits import cut_to_imbalance, hold_out
from fastsam.longtail.errors import DataError, UsageError


def image(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def folder(root: Path, **counts: int) -> Path:
    for number, (name, count) in enumerate(counts.items()):
        for place in range(count):
            image(root / name / f"{place}.png", 1000 * number + place)
    return root


def load(name: str, root: Path, **settings: Any) -> LongTailData:
    return load_dataset(name, data_root=root, image_size=8, workers=0, progress=False, **settings)


def paths(data: LongTailData, part: str) -> list[str]:
    images: Any = data.split(part)
    return list(images.images.paths)


@pytest.mark.parametrize("seed", [0, 7])
def test_shares_of_each_class(seed: int) -> None:
    counts = np.array([100, 41, 10, 3, 2, 1])
    targets = np.random.default_rng(3).permutation(np.repeat(np.arange(6), counts))
    held = hold_out(targets, test=0.2, validation=0.1, seed=seed)
    found = [Counter(targets[part].tolist()) for part in held]
    assert sorted(np.concatenate(held).tolist()) == list(range(len(targets)))
    assert found[2] == {0: 20, 1: 8, 2: 2, 3: 1, 4: 1}  # the only image of class 5 is for training
    assert found[1] == {0: 10, 1: 4, 2: 1, 3: 1}
    assert all(found[0][label] >= 1 for label in range(6))
    again = hold_out(targets, test=0.2, validation=0.1, seed=seed)
    assert all(np.array_equal(a, b) for a, b in zip(held, again, strict=True))
    assert not np.array_equal(
        held[2], hold_out(targets, test=0.2, validation=0.1, seed=seed + 1)[2]
    )


def test_groups_of_one_image_are_split_as_images() -> None:
    targets = np.repeat(np.arange(3), [30, 9, 4])
    alone = hold_out(targets, test=0.25, validation=0.2, seed=2, groups=np.arange(43))
    images = hold_out(targets, test=0.25, validation=0.2, seed=2)
    for one, other in zip(alone, images, strict=True):
        assert np.array_equal(np.bincount(targets[one]), np.bincount(targets[other]))


def test_groups_stay_together_and_shares_are_met() -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 60, 600)
    targets = (groups % 3 + rng.integers(0, 2, 600)) % 4
    held = hold_out(targets, test=0.2, validation=0.1, seed=1, groups=groups)
    parts = [set(groups[part].tolist()) for part in held]
    assert sum(map(len, parts)) == len(set(groups.tolist()))
    for part, share in ((held.test, 0.2), (held.validation, 0.1)):
        found = np.bincount(targets[part], minlength=4) / np.bincount(targets)
        assert np.abs(found - share).max() < 0.1  # a group has 10 images, a class about 150


def test_a_class_of_one_group_stays_in_training() -> None:
    targets = np.array([0] * 10 + [1] * 4)
    groups = np.array([*range(10), 10, 10, 10, 10])
    held = hold_out(targets, test=0.3, validation=0.0, seed=0, groups=groups)
    assert set(targets[held.test].tolist()) == {0}


@pytest.mark.parametrize("imbalance", [1.0, 5.0, 30.0])
def test_the_cut_keeps_as_many_images_as_possible(imbalance: float) -> None:
    available = np.array([40, 70, 33, 50])
    targets = np.repeat(np.arange(4), available)
    kept = np.bincount(targets[cut_to_imbalance(targets, imbalance, 0)], minlength=4)
    order = [1, 3, 0, 2]  # by size

    def profile(largest: int) -> list[int]:
        return [int(largest * (1 / imbalance) ** (rank / 3)) for rank in range(4)]

    fitting = [n for n in range(1, 71) if all(np.array(profile(n)) <= available[order])]
    assert kept[order].tolist() == profile(max(fitting))


def test_a_cut_without_images_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"cut_imbalance 100 would leave the smallest class without"
    ):
        cut_to_imbalance(np.repeat([0, 1], [50, 9]), 100.0, 0)


def test_a_plain_folder_is_split(tmp_path: Path) -> None:
    root = folder(tmp_path / "photos", cats=20, dogs=10, emus=1)
    data = load("folder", root, split_test=0.2, split_validation=0.1, split_seed=3)
    assert data.class_names == ("cats", "dogs", "emus")
    assert data.counts.tolist() == [14, 7, 1]
    assert [len(paths(data, part)) for part in ("validation", "test")] == [3, 6]
    every = [path for part in data.splits for path in paths(data, part)]
    assert len(every) == len(set(every)) == 31
    assert any("1 of 3 classes have no test image" in note for note in data.notes)
    again = load("folder", root, split_test=0.2, split_validation=0.1, split_seed=3)
    assert paths(again, "test") == paths(data, "test")
    assert again.subset_hash == data.subset_hash
    other = load("folder", root, split_test=0.2, split_validation=0.1, split_seed=4)
    assert paths(other, "test") != paths(data, "test")
    cut = load("folder", root, split_test=0.2, cut_imbalance=4.0)
    assert cut.counts.tolist() == [7, 3, 1]  # 7 * 4^(-rank / 2), rounded down


def test_given_parts_and_lists_are_completed(tmp_path: Path) -> None:
    root = folder(tmp_path, **{"train/a": 10, "train/b": 10, "test/a": 2, "test/b": 2})
    data = load("folder", root, split_validation=0.2)
    assert [len(images) for images in data.splits.values()] == [16, 4, 4]
    with pytest.raises(UsageError, match=r"a test part already; omit --split-test"):
        load("folder", root, split_test=0.2)
    lines = [
        f"train/{name}/{place}.png {label}\n"
        for label, name in enumerate("ab")
        for place in range(10)
    ]
    (root / "train.txt").write_text("".join(lines))
    listed = load("list", root, split_test=0.3)
    assert [len(images) for images in listed.splits.values()] == [14, 6]
    for name in ("folder", "list"):
        plain = tmp_path / "train" if name == "folder" else root
        with pytest.raises(DataError, match=r"no test part.*--split-test 0\.2"):
            load(name, plain)


def test_too_few_images_to_hold_out(tmp_path: Path) -> None:
    root = folder(tmp_path, a=1, b=1)
    with pytest.raises(DataError, match="no image can be held out for the test part"):
        load("folder", root, split_test=0.5)
    with pytest.raises(UsageError, match=r"must sum to less than 1"):
        load("folder", root, split_test=0.5, split_validation=0.5)


def write_csv(root: Path, text: str, name: str = "images.csv") -> None:
    root.mkdir(exist_ok=True)
    (root / name).write_text(text, encoding="utf-8-sig")


def patients(root: Path, *, splits: dict[str, str] | None = None) -> None:
    """Write a table of 30 images of ten patients, two classes."""
    lines = ["file;finding;patient;part"]
    for number in range(30):
        patient = f"p{number // 3}"
        name = f"scans/{number}.png"
        image(root / name, number)
        part = (splits or {}).get(patient, "train")
        lines.append(f"{name};{'ill' if number < 9 else 'well'};{patient};{part}")
    write_csv(root, "\n".join(lines) + "\n")


COLUMNS = {"path_column": "file", "label_column": "finding"}


def test_a_table_with_groups(tmp_path: Path) -> None:
    patients(tmp_path)
    data = load(
        "csv", tmp_path, **COLUMNS, group_column="patient", split_test=0.2, split_validation=0.2
    )
    assert data.class_names == ("well", "ill")
    of = {part: {int(p[6:-4]) // 3 for p in paths(data, part)} for part in data.splits}
    assert all(of.values())
    assert sum(map(len, of.values())) == len(set().union(*of.values())) == 10
    assert sum(len(images) for images in data.splits.values()) == 30


def test_a_table_with_given_parts(tmp_path: Path) -> None:
    patients(tmp_path, splits={"p0": "test", "p9": "TEST", "p1": "val"})
    options = {**COLUMNS, "split_column": "part", "group_column": "patient"}
    data = load("csv", tmp_path, **options)
    assert [len(images) for images in data.splits.values()] == [21, 3, 6]
    text = (tmp_path / "images.csv").read_text(encoding="utf-8-sig")
    write_csv(tmp_path, text.replace("28.png;well;p9;TEST", "28.png;well;p9;train"))
    with pytest.raises(
        DataError, match=r"group 'p9' of column 'patient' has images in train and in test"
    ):
        load("csv", tmp_path, **options)


def test_columns_by_default_and_numbered_classes(tmp_path: Path) -> None:
    lines = ["path,label,split"]
    for number in range(24):
        image(tmp_path / f"{number}.png", number)
        lines.append(f'"{number}.png",{(2, 10)[number % 2]},{"test" if number > 19 else "train"}')
    write_csv(tmp_path, "\n".join([*lines, "", ""]))
    data = load("csv", tmp_path)
    assert data.class_names == ("2", "10")  # numerical order
    assert [len(images) for images in data.splits.values()] == [20, 4]
    config = recipe("csv", "ce", "sgd", data_root=str(tmp_path)).config()
    assert (config.augment, config.path_column) == ("auto", "path")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "path,lable\na.png,x\n",
            r"no column 'label', did you mean 'lable'\?.*--label-column NAME",
        ),
        ("path,label\na.png,\n", r"line 2: column 'label' is empty"),
        (
            "path,label,split\na.png,x,dev\n",
            r"line 2: column 'split' must be train, val or test, got 'dev'",
        ),
        ("path,label,split\na.png,x,test\n", r"no row with split 'train'"),
        ("path,label,split\na.png,x,train\nb.png,x\n", r"line 3: column 'split' is empty"),
        ("path,label\n", "lists no images"),
        ("path,label,split\na.png,x,train\nb.png,y,test\n", "class 'y' has no training image"),
        ("path,label\na.png,x\na.png,y\n", "repeats the path"),
        ("path,label\na.png,x\nb.png,y\n", r"no test part.*--split-test 0\.2"),
        ("path,label\na.png,x\na.png,x\n", "list every image once"),
        (
            "path,label\na.png,x\nb.png,lesion, benign\n",
            r"line 3: found 3 values, but the header names 2 columns; put values that contain ',' in double",
        ),
        ("path,label,\na.png,x,\nb.png,lesion, benign\n", r"line 3: found 3 values, .* 2 columns"),
        ("path,label,label\na.png,x,y\n", r"names column 'label' more than once; rename or remove"),
        (
            f"path,label\na.png,1\nb.png,{'9' * 5000}\n",
            r"images\.csv, line 3: label 9{40}\.\.\. has 5000 digits, expected at most 640; shorten it",
        ),
    ],
)
def test_tables_that_are_refused(text: str, message: str, tmp_path: Path) -> None:
    write_csv(tmp_path, text)
    with pytest.raises(DataError, match=message):
        load("csv", tmp_path)


def test_empty_values_without_a_column_name_are_ignored(tmp_path: Path) -> None:
    """Spreadsheets end lines with delimiters."""
    for number in range(6):
        image(tmp_path / f"{number}.png", number)
    lines = [f"{number}.png,{'ab'[number % 2]},,, " for number in range(6)]
    write_csv(tmp_path, "\n".join(["path,label,,", *lines, ",,,,", ""]))
    assert load("csv", tmp_path, split_test=0.4).class_names == ("a", "b")


def test_a_missing_table_and_groups_of_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match=r"--csv-file NAME"):
        load("csv", tmp_path)
    command = [
        "train",
        "--data",
        "folder",
        "--data-root",
        str(tmp_path),
        "--group-column",
        "patient",
    ]
    assert main(command) == 2
    assert (
        "group_column requires data csv, hf:NAME, but the run has data folder"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("seed", range(6))
def test_classes_of_few_groups_have_held_out_images(seed: int) -> None:
    groups_of_class = [20, 5, 4, 3, 2, 1]
    targets = np.repeat(np.arange(6), [10 * groups for groups in groups_of_class])
    groups = np.arange(len(targets)) // 10
    held = hold_out(targets, test=0.1, validation=0.1, seed=seed, groups=groups)
    train, validation, test = (
        [len(set(groups[part][targets[part] == label].tolist())) for label in range(6)]
        for part in held
    )
    assert test == [2, 1, 1, 1, 1, 0]
    assert validation == [2, 1, 1, 1, 0, 0]
    assert train == [16, 3, 2, 1, 1, 1]
    parts = [set(groups[part].tolist()) for part in held]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 35


def test_the_smallest_group_that_leaves_training_images_is_held_out() -> None:
    # The smallest group of class 1 is all of class 0: taking it would leave class 0 without training images.
    targets = np.array([1] * 8 + [1] * 6 + [1] * 7 + [1, 0])
    groups = np.repeat([0, 1, 2, 3], [8, 6, 7, 2])
    held = hold_out(targets, test=0.1, validation=0.0, seed=0, groups=groups)
    assert set(groups[held.test].tolist()) == {1}


def test_classes_without_validation_images_are_counted(tmp_path: Path) -> None:
    root = folder(tmp_path / "photos", cats=20, dogs=10, emus=2)
    data = load("folder", root, split_test=0.2, split_validation=0.1)
    assert any("; 1 of 3 classes have no validation image" in note for note in data.notes)


def test_a_cut_of_one_class_or_of_labels_with_gaps_names_the_classes(tmp_path: Path) -> None:
    root = folder(tmp_path / "photos", cats=8)
    with pytest.raises(DataError, match=r"has 1 class\(es\), but at least 2 are required"):
        load("folder", root, split_test=0.2, cut_imbalance=2.0)
    (root / "train.txt").write_text("".join(f"cats/{n}.png {n % 2 * 2}\n" for n in range(8)))
    with pytest.raises(DataError, match=r"1 labels do not occur; the first is 1"):
        load("list", root, split_test=0.2, cut_imbalance=2.0)


def test_a_seed_without_a_split_is_refused(tmp_path: Path) -> None:
    root = folder(tmp_path, **{"train/a": 8, "train/b": 4, "test/a": 2, "test/b": 2})
    with pytest.raises(UsageError, match=r"split_seed 3 would have no effect"):
        load("folder", root, split_seed=3)
    assert load("folder", root, split_seed=3, cut_imbalance=2.0).counts.tolist() == [8, 4]
