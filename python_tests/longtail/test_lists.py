"""List files: the published Places-LT list, published counts, and invalid lists."""

from __future__ import annotations

import gzip
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastsam.longtail.data import groups_by_count, groups_by_rank
from fastsam.longtail.data.listed import LISTED, ListedSet, check_totals, find_list
from fastsam.longtail.data.lists import (
    ImageList,
    check_files,
    class_counts,
    convert_inaturalist,
    list_folder,
    list_hash,
    map_by_count,
    read_list,
)
from fastsam.longtail.errors import DataError
from python_tests.longtail.archives import write_inaturalist_json

REAL = Path(__file__).parent / "data"


def test_places_is_the_published_list() -> None:
    images = read_list(REAL / "Places_LT_train.txt.xz")
    check_totals(LISTED["places-lt"], "Places_LT_train.txt", images)
    counts = class_counts(images, None, "Places-LT")
    assert (len(images), len(counts), counts.max(), counts.min()) == (62500, 365, 4980, 5)
    assert images.paths[0] == "train/airfield/00004851.jpg"
    assert images.targets[0] == 0
    assert list_hash(images) == LISTED["places-lt"].hashes["Places_LT_train.txt"]
    groups = groups_by_count(counts)
    assert {name: len(labels) for name, labels in groups.items()} == {
        "head": 131,
        "mid": 163,
        "tail": 71,
    }


def test_reindexing_of_places_is_by_count_and_stable() -> None:
    images = read_list(REAL / "Places_LT_train.txt.xz")
    counts = class_counts(images, 365, "Places-LT")
    class_map = map_by_count(counts)
    assert sorted(class_map) == list(range(365))
    falling = class_counts(images.relabeled(class_map), 365, "re-indexed")
    assert (np.diff(falling) <= 0).all()
    assert len(set(counts.tolist())) < 365  # there are ties to break
    for first in range(365):
        for second in range(first + 1, 365):
            if counts[first] == counts[second]:
                assert class_map[first] < class_map[second]
    by_rank = groups_by_rank(365, (131, 294))
    by_count = groups_by_count(falling)
    assert by_rank == by_count  # after relabeling both rules split the same order


@pytest.mark.parametrize(
    ("name", "file", "per_class"),
    [
        ("imagenet-lt", "ImageNet_LT_val.txt", 20),
        ("imagenet-lt", "ImageNet_LT_test.txt", 50),
        ("inaturalist18", "iNaturalist18_val.txt", 3),
    ],
)
def test_evaluation_lists_have_their_published_counts(name: str, file: str, per_class: int) -> None:
    info = LISTED[name]
    images = read_list(REAL / f"{file}.xz")
    check_totals(info, file, images)
    assert set(class_counts(images, info.num_classes, file).tolist()) == {per_class}
    assert list_hash(images) == info.hashes[file]


def test_hash_of_a_list_is_that_of_its_lines(tmp_path: Path) -> None:
    lines = "a b/c.jpg 1\nd.jpg 0\n"
    for number, text in enumerate((lines, lines.replace("\n", "\r\n"))):
        path = tmp_path / f"{number}.txt"
        path.write_bytes(text.encode())
        assert list_hash(read_list(path)) == hashlib.sha256(lines.encode()).hexdigest()


def test_hash_of_a_list_and_its_class_names() -> None:
    images = ImageList(["a.jpg", "b.jpg"], np.array([0, 1]))
    hashes = {
        list_hash(images, names)
        for names in ((), ("ant", "bee"), ("bee", "ant"), ("ant",), ("antbee",), ("ant", "", "bee"))
    }
    assert len(hashes) == 6
    one = ImageList(["a.jpg"], np.array([0]))
    assert list_hash(one, ("b.jpg 1",)) != list_hash(images)


def made_counts(info: ListedSet) -> list[int]:
    """Create decreasing counts with the published number of classes, extremes and total."""
    total = info.totals[info.train]
    low, high = 0.01, 100.0
    for _ in range(200):
        power = (low + high) / 2
        share = np.linspace(1, 0, info.num_classes) ** power
        counts = (info.smallest + share * (info.largest - info.smallest)).astype(int)
        low, high = (power, high) if counts.sum() > total else (low, power)
    short = total - int(counts.sum())
    counts[1 : 1 + abs(short)] += int(np.sign(short))
    return [int(count) for count in counts]


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("imagenet-lt", (390, 445, 165)), ("inaturalist18", (842, 3701, 3599))],
)
def test_made_training_lists_with_the_published_totals(
    name: str, sizes: tuple[int, int, int], seed: int
) -> None:
    info = LISTED[name]
    order = np.random.default_rng(seed).permutation(info.num_classes)
    targets = np.repeat(order, made_counts(info)).astype(np.int64)
    images = ImageList([f"{i}.jpg" for i in range(len(targets))], targets)
    check_totals(info, info.train, images)
    counts = class_counts(images, info.num_classes, name)
    falling = counts[np.argsort(map_by_count(counts))]
    assert (np.diff(falling) <= 0).all()
    assert info.boundaries is not None
    groups = groups_by_rank(info.num_classes, info.boundaries)
    assert tuple(len(labels) for labels in groups.values()) == sizes
    with pytest.raises(DataError, match="download it again"):
        check_totals(info, info.train, ImageList(images.paths[1:], targets[1:]))
    wrong = replace(info, largest=info.largest + 1)
    with pytest.raises(DataError, match="published"):
        check_totals(wrong, info.train, images)


def test_paths_may_hold_spaces_and_lines_may_be_empty(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text(f"a b/c d.jpg 1\n\n  e.jpg\t0  \nf.jpg {'0' * 5000}2\n")
    images = read_list(path)
    assert list(images.paths) == ["a b/c d.jpg", "e.jpg", "f.jpg"]
    assert images.targets.tolist() == [1, 0, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg 0\nb.jpg\n", "line 2"),
        ("a.jpg one\n", "line 1"),
        ("a.jpg -1\n", "line 1"),
        ("a.jpg 1.5\n", "line 1"),
        ("", "no image"),
        (f"a.jpg 0\nb.jpg {'9' * 5000}\n", r"line 2: label 9{40}\.\.\. is too large"),
    ],
)
def test_lines_of_another_form_are_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_list(path)


def test_damaged_and_missing_lists(tmp_path: Path) -> None:
    whole = gzip.compress(b"a.jpg 0\n" * 5000)
    for suffix, content in (
        (".gz", whole[: len(whole) // 2]),
        (".xz", b"no xz"),
        (".txt", b"\xff 0"),
    ):
        path = tmp_path / f"list{suffix}"
        path.write_bytes(content)
        with pytest.raises(DataError, match="damaged or incomplete"):
            read_list(path)
    with pytest.raises(DataError, match="does not exist"):
        read_list(tmp_path / "none.txt")
    with pytest.raises(DataError, match=r"no other\.txt \(or \.gz, \.xz\)"):
        find_list(tmp_path, "other.txt")


def test_labels_out_of_range_and_gaps() -> None:
    images = ImageList(["a", "b", "c"], np.array([0, 3, 1]))
    with pytest.raises(DataError, match="from 0 to 2, got 3"):
        class_counts(images, 3, "it")
    with pytest.raises(DataError, match=r"1 labels do not occur; the first is 2"):
        class_counts(images, None, "it")
    assert class_counts(images, 5, "it").tolist() == [1, 1, 0, 1, 0]


def test_missing_images_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    check_files(ImageList(["a.jpg"], np.array([0])), tmp_path, "it")
    with pytest.raises(DataError, match=r"2 of 3 images of it do not exist in .*first is b\.jpg"):
        check_files(ImageList(["a.jpg", "b.jpg", "c.jpg"], np.array([0, 0, 0])), tmp_path, "it")


def test_inaturalist_json_becomes_a_list(tmp_path: Path) -> None:
    counts = [4, 1, 2]
    write_inaturalist_json(tmp_path / "train2018.json", counts)
    assert convert_inaturalist(tmp_path / "train2018.json", tmp_path / "list.txt") == 7
    images = read_list(tmp_path / "list.txt")
    assert np.bincount(images.targets).tolist() == counts
    for path, label in zip(images.paths, images.targets, strict=True):
        assert path.split("/")[2] == str(label)


def test_json_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    source, out = tmp_path / "x.json", tmp_path / "out.txt"
    with pytest.raises(DataError, match="does not exist"):
        convert_inaturalist(source, out)
    write_inaturalist_json(source, [2, 1])
    good = json.loads(source.read_text())
    half = source.read_text()[:200]
    cases = [
        (half, "not an iNaturalist JSON"),
        (json.dumps({"images": []}), "not an iNaturalist JSON"),
        (json.dumps({**good, "annotations": good["annotations"][1:]}), "each of 3 images, got 2"),
        (json.dumps({**good, "images": good["images"][1:]}), "is not in `images`"),
        (json.dumps({**good, "categories": good["categories"][1:]}), "is not in `categories`"),
    ]
    for text, message in cases:
        source.write_text(text)
        with pytest.raises(DataError, match=message):
            convert_inaturalist(source, out)
    assert not out.exists()


def test_class_folders(tmp_path: Path) -> None:
    for name in ("zebra/1.jpg", "zebra/deep/2.PNG", "ant/3.jpeg", "ant/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    images, names, left_out = list_folder(tmp_path)
    assert names == ["ant", "zebra"]
    assert left_out == {".txt": 1}
    assert list(images.paths) == ["ant/3.jpeg", "zebra/1.jpg", "zebra/deep/2.PNG"]
    assert images.targets.tolist() == [0, 1, 1]
    with pytest.raises(DataError, match="zebra"):
        list_folder(tmp_path, ["ant"])
    with pytest.raises(DataError, match="none does not exist"):
        list_folder(tmp_path / "none")
    (tmp_path / "empty" / "x").mkdir(parents=True)
    with pytest.raises(DataError, match="no image"):
        list_folder(tmp_path / "empty")


def test_hidden_files_and_folders_are_no_classes_and_no_images(tmp_path: Path) -> None:
    for name in (
        ".ipynb_checkpoints/1.jpg",
        "ant/1.jpg",
        "ant/._1.jpg",
        "bee/.old/2.jpg",
        "bee/2.jpg",
    ):
        (tmp_path / ".data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / ".data" / name).write_bytes(b"")
    images, names, _ = list_folder(tmp_path / ".data")
    assert names == ["ant", "bee"]
    assert list(images.paths) == ["ant/1.jpg", "bee/2.jpg"]
    assert list(list_folder(tmp_path / ".data", ["ant", "bee"])[0].paths) == list(images.paths)


def test_class_folders_that_are_empty_or_missing_are_named(tmp_path: Path) -> None:
    for name in ("ant", "bee", "cat"):
        (tmp_path / name).mkdir()
    (tmp_path / "ant" / "1.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"2 class folders .* no images \(.jpg.*first is 'bee'"):
        list_folder(tmp_path)
    images, _, _ = list_folder(tmp_path, ["ant", "bee", "cat"])
    assert images.targets.tolist() == [0]
    (tmp_path / "cat").rmdir()
    with pytest.raises(DataError, match=r"no folder for 1 classes.*first is 'cat'"):
        list_folder(tmp_path, ["ant", "bee", "cat"])
