"""torchvision data sets cut to a long tail, and the cut that these data sets share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastsam.cli import main
from fastsam.longtail import TrainConfig, Trainer, recipe
from fastsam.longtail.data import TensorImages, load_dataset, subset_hash
from fastsam.longtail.data.augment import Compose, RandomCrop, RandomHorizontalFlip
from fastsam.longtail.data.catalog import dataset_settings
from fastsam.longtail.data.long_tailed import (
    CutSettings,
    LabeledPixels,
    channel_statistics,
    cut_to_long_tail,
)
from fastsam.longtail.differences import differences
from fastsam.longtail.errors import DataError, UsageError
from python_tests.longtail.archives import write_mnist, write_svhn

SVHN_COUNTS = [40, 60, 50, 30, 20, 20, 25, 12, 14, 16]


@pytest.fixture
def kmnist(tmp_path: Path) -> Path:
    write_mnist(tmp_path / "KMNIST" / "raw", per_class=30, test_per_class=3)
    return tmp_path


@pytest.fixture
def svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from torchvision.datasets import SVHN

    sums = write_svhn(tmp_path, SVHN_COUNTS, test_per_class=2)
    known = {split: ["", f"{split}_32x32.mat", md5] for split, md5 in sums.items()}
    monkeypatch.setattr(SVHN, "split_list", known)
    return tmp_path


def pixels(images: Any) -> torch.Tensor:
    assert isinstance(images, TensorImages)
    return images.images


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize(
    "settings",
    [{}, {"kind": "step", "subset_seed": 3}, {"imbalance": 2.0}],
    ids=["as published", "step", "mild"],
)
def test_cifar_by_its_class_is_cifar_lt(
    classes: int, settings: dict[str, Any], cifar_root: Path
) -> None:
    settings = {"imbalance": 10.0, "data_root": cifar_root, **settings}
    ours = load_dataset(f"torchvision:CIFAR{classes}", **settings)
    theirs = load_dataset(f"cifar{classes}-lt", **settings)
    assert ours.name == f"torchvision:CIFAR{classes}"
    for field in ("class_names", "groups", "subset_hash"):
        assert getattr(ours, field) == getattr(theirs, field)
    assert ours.counts.tolist() == theirs.counts.tolist()
    assert ours.validation is theirs.validation is None
    for split in ("train", "test"):
        one, other = ours.split(split), theirs.split(split)
        assert torch.equal(pixels(one), pixels(other))
        assert (one.targets == other.targets).all()
        assert (one.mean, one.std) == (other.mean, other.std)
        assert isinstance(one, TensorImages)
        assert isinstance(other, TensorImages)
        assert one.augmentation == other.augmentation
    assert ours.contents() == theirs.contents()


def test_cifar_with_validation_chooses_among_the_others(cifar_root: Path) -> None:
    settings = {"data_root": cifar_root, "imbalance": 5.0, "validation_per_class": 5}
    data = load_dataset("cifar10-lt", **settings)
    assert data.counts.tolist()[0] == 15
    assert data.validation is not None
    assert np.bincount(data.validation.targets).tolist() == [5] * 10
    held = set(data.validation.digests())
    assert len(held) == 50
    assert not held & set(data.train.digests())


def test_digits_are_normalized_by_their_own_pixels_and_never_mirrored(kmnist: Path) -> None:
    data = load_dataset("torchvision:KMNIST", data_root=kmnist, imbalance=10)
    assert data.counts[0] == 30
    assert data.class_names == ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
    assert isinstance(data.train, TensorImages)
    assert data.train.augmentation == RandomCrop(4)
    values = pixels(data.train).numpy() / 255
    assert data.train.mean == pytest.approx((values.mean(),))
    assert data.train.std == pytest.approx((values.std(),))
    assert data.test.mean == data.train.mean
    config = recipe(
        "torchvision:KMNIST",
        "ce",
        "sgd",
        data_root=str(kmnist),
        imbalance=5,
        epochs=2,
        model="resnet8",
        validation_per_class=5,
        class_order="7",
    ).config()
    result = Trainer(config, progress=False).fit()
    assert result.counts[0] == 25
    assert result.validation is not None
    assert sorted(result.class_names) == sorted(data.class_names)
    assert result.class_names != list(data.class_names)


def test_emnist_has_several_sets(tmp_path: Path) -> None:
    folder = tmp_path / "EMNIST" / "raw"
    for split, labels in (("letters", range(1, 27)), ("balanced", range(47))):
        prefixes = (f"emnist-{split}-train", f"emnist-{split}-test")
        write_mnist(folder, per_class=6, test_per_class=1, prefixes=prefixes, labels=labels)
    settings = {"data_root": tmp_path, "imbalance": 2}
    letters = load_dataset("torchvision:EMNIST", emnist_split="letters", **settings)
    assert letters.class_names == tuple("abcdefghijklmnopqrstuvwxyz")
    assert letters.test.targets.tolist().count(25) == 1
    assert {name: len(members) for name, members in letters.groups.items()} == {
        "head": 8,
        "mid": 10,
        "tail": 8,
    }
    balanced = load_dataset("torchvision:EMNIST", **settings)
    assert balanced.num_classes == 47
    assert balanced.contents() == (
        load_dataset("torchvision:EMNIST", emnist_split="balanced", **settings).contents()
    )


def test_the_largest_class_is_the_smallest_of_an_uneven_set(svhn: Path) -> None:
    settings = {"data_root": svhn, "imbalance": 4}
    data = load_dataset("torchvision:SVHN", **settings)
    assert (data.counts[0], data.counts[-1]) == (12, 3)
    assert data.class_names == tuple("0123456789")
    with pytest.raises(UsageError, match=r"n_max 60 requires 60 .*'0', which has 40; lower n_max"):
        load_dataset("torchvision:SVHN", n_max=60, **settings)
    with pytest.raises(
        UsageError,
        match=r"which has 35 after holding out 5 for validation; lower n_max, to 7 or less",
    ):
        load_dataset("torchvision:SVHN", n_max=36, validation_per_class=5, **settings)
    falling = ",".join(map(str, np.argsort(SVHN_COUNTS, kind="stable")[::-1]))
    larger = load_dataset(
        "torchvision:SVHN", n_max=60, data_root=svhn, imbalance=10, class_order=falling
    )
    assert larger.class_names[:3] == ("1", "2", "0")
    assert larger.counts[0] == 60
    assert np.bincount(larger.test.targets).tolist() == [2] * 10
    with pytest.raises(UsageError, match=r"must be at most 11, because class '7' has 12"):
        load_dataset("torchvision:SVHN", validation_per_class=12, **settings)


def test_classes_are_renumbered_from_the_largest_to_the_smallest(cifar_root: Path) -> None:
    from torchvision.datasets import CIFAR10

    settings = {"data_root": cifar_root, "imbalance": 10.0, "validation_per_class": 5}
    natural = load_dataset("torchvision:CIFAR10", **settings)
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    listed = ",".join(map(str, order))
    data = load_dataset("torchvision:CIFAR10", class_order=listed, **settings)
    assert data.class_names == tuple(natural.class_names[label] for label in order)
    assert data.counts.tolist() == natural.counts.tolist()
    assert data.subset_hash != natural.subset_hash
    raw = CIFAR10(str(cifar_root), train=False)
    assert (pixels(data.test).numpy().transpose(0, 2, 3, 1) == raw.data).all()
    assert [order[rank] for rank in data.test.targets] == raw.targets
    assert data.validation is not None
    assert natural.validation is not None
    assert torch.equal(pixels(data.validation), pixels(natural.validation))
    assert [order[rank] for rank in data.validation.targets] == natural.validation.targets.tolist()
    label_of = {
        image.tobytes(): label
        for image, label in zip(*_raw(CIFAR10(str(cifar_root), train=True)), strict=True)
    }
    found = [label_of[image.numpy().tobytes()] for image in pixels(data.train)]
    assert found == [order[rank] for rank in data.train.targets]
    shuffled = [
        load_dataset("torchvision:CIFAR10", class_order=seed, **settings).class_names
        for seed in ("1", "1", "2")
    ]
    assert shuffled[0] == shuffled[1] != shuffled[2]
    assert set(shuffled[2]) == set(natural.class_names)


def _raw(part: Any) -> tuple[np.ndarray, list[int]]:
    return part.data.transpose(0, 3, 1, 2), part.targets


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class_order": "0,1,2"}, "each label from 0 to 9 once, got '0,1,2'"),
        ({"class_order": "0,1,2,3,4,5,6,7,8,8"}, "each label from 0 to 9 once"),
        ({"class_order": "1,2,3,4,5,6,7,8,9,10"}, "each label from 0 to 9 once"),
        *(
            ({"class_order": bad}, "must be natural, a seed .*, or all labels")
            for bad in ("", "random", "-1", "0,", "0 1", "4294967296", "²", "9" * 5000)
        ),
        ({"validation_per_class": 4}, "must be at least 5, or 0"),
        ({"validation_per_class": -1}, "at least 0"),
        ({"validation_per_class": 20}, "at most 19, because class 'airplane' has 20"),
        ({"n_max": 21}, "n_max 21 requires 21 .*'airplane', which has 20; lower n_max, to 20"),
        ({"n_max": 16, "validation_per_class": 5}, "which has 15 after holding out 5"),
        ({"n_max": 0}, "n_max must be at least 1"),
        ({"imbalance": 100.0}, "imbalance must be at most"),
        ({"emnist_split": "letters"}, "emnist_split requires data torchvision:EMNIST"),
        ({"emnist_split": "none"}, "unknown emnist_split"),
    ],
)
def test_impossible_settings_are_refused(
    settings: dict[str, Any], message: str, cifar_root: Path
) -> None:
    settings = {"data_root": cifar_root, "imbalance": 5.0, **settings}
    with pytest.raises(UsageError, match=message) as failure:
        load_dataset("torchvision:CIFAR10", **settings)
    assert len(str(failure.value)) < 400


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Nope", "no data set 'Nope'; names are case-sensitive"),
        ("cifar10", "no data set 'cifar10'"),
        ("VisionDataset", "a training and a test set, but VisionDataset has none"),
        ("EuroSAT", "a training and a test set, but EuroSAT has none; .* use --data folder"),
        ("FakeData", "a training and a test set, but FakeData has none"),
        ("wrap_dataset_for_transforms_v2", "no data set"),
        ("os", "no data set 'os'"),
    ],
)
def test_sets_of_another_form_are_refused(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        load_dataset(f"torchvision:{name}", data_root=tmp_path)


@pytest.mark.parametrize("name", ["CIFAR10", "KMNIST", "EMNIST", "SVHN", "STL10", "USPS", "GTSRB"])
def test_missing_files_are_named_with_the_remedy(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{name} is missing or damaged in {tmp_path}.*--download"):
        load_dataset(f"torchvision:{name}", data_root=tmp_path / "nowhere")
    with pytest.raises(UsageError, match="cannot download FER2013; put its files into data_root"):
        load_dataset("torchvision:FER2013", data_root=tmp_path, download=True)


def _truncate(folder: Path) -> None:
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-100])


def _swap_kinds(folder: Path) -> None:
    images, labels = (folder / f"train-{name}-ubyte" for name in ("images-idx3", "labels-idx1"))
    one, other = images.read_bytes(), labels.read_bytes()
    images.write_bytes(other)
    labels.write_bytes(one)


def _swap_labels(folder: Path) -> None:
    one, other = (folder / f"{split}-labels-idx1-ubyte" for split in ("train", "t10k"))
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


@pytest.mark.parametrize("damage", [_truncate, _swap_kinds, _swap_labels])
def test_damaged_files_are_refused(damage: Callable[[Path], None], kmnist: Path) -> None:
    damage(kmnist / "KMNIST" / "raw")
    with pytest.raises(
        DataError,
        match=r"(damaged in|as many labels as images|no training image).*--download",
    ):
        load_dataset("torchvision:KMNIST", data_root=kmnist)


class Items:
    """A torchvision data set with given items."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, place: int) -> Any:
        return self.items[place]


GREY, COLOR = Image.new("L", (4, 4)), Image.new("RGB", (4, 4))


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (
            [(GREY, 0), (Image.new("L", (5, 4)), 1)],
            "must have the same size and channels.*--data folder",
        ),
        ([(GREY, 0), (COLOR, 1)], "must have the same size and channels"),
        ([(Image.new("I;16", (4, 4)), 0)], "must be .grayscale or RGB image, class."),
        ([(torch.zeros(1, 4, 4), 0)], "must be .grayscale or RGB image, class."),
        ([(GREY, torch.tensor([0, 1]))], "must be"),
        ([(GREY, 0.5)], "must be"),
        ([(GREY, -1)], "must be"),
        ([(GREY, 0, 1)], "must be"),
        ([GREY], "must be"),
        ([], "0 images and 0 labels"),
    ],
)
def test_items_of_another_form_are_refused(
    items: list[Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastsam.longtail.data import torchvision_sets

    monkeypatch.setattr(torchvision_sets, "_opened", lambda *_: [Items(items), Items(items)])
    with pytest.raises((UsageError, DataError), match=message):
        load_dataset("torchvision:KMNIST")


def test_a_test_class_without_training_images_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastsam.longtail.data import torchvision_sets

    parts = [Items([(COLOR, 0), (COLOR, 2)]), Items([(COLOR, 1)])]
    monkeypatch.setattr(torchvision_sets, "_opened", lambda *_: parts)
    with pytest.raises(DataError, match="label 1 of the test set has no training image"):
        load_dataset("torchvision:STL10")


def test_commands(kmnist: Path, tmp_path: Path, capsys: Any) -> None:
    data = ["torchvision:KMNIST", "--root", str(kmnist), "--imbalance", "10"]
    assert main(["data", "check", *data, "--class-order", "3", "--validation-per-class", "5"]) == 0
    output = capsys.readouterr().out
    assert "torchvision:KMNIST: 10 classes, 2 to 25 training images" in output
    assert "validation: 50 images" in output
    assert main(["data", "show", *data, "--out", str(tmp_path / "sheets")]) == 0
    assert len(list((tmp_path / "sheets").iterdir())) == 11
    capsys.readouterr()
    assert main(["recipes", "--names"]) == 0
    assert "torchvision:NAME" in capsys.readouterr().out
    recipes = ["recipes", "--data", "torchvision:KMNIST", "--method", "ce", "--optimizer", "sam"]
    assert main(recipes) == 0
    assert "the recipe of cifar10-lt" in capsys.readouterr().out
    run = [
        "train",
        "--data",
        "torchvision:KMNIST",
        "--data-root",
        str(kmnist),
        "--model",
        "resnet8",
    ]
    few = ["--epochs", "2", "--imbalance", "10", "--n-max", "20", "--quiet"]
    assert main([*run, *few, "--out", str(tmp_path / "run")]) == 0
    assert main(["train", "--data", "digits-lt", "--emnist-split", "letters"]) == 2
    assert "emnist_split requires data torchvision:NAME" in capsys.readouterr().err


SETTINGS = {"imbalance": 10.0, "kind": "exp", "subset_seed": 0}


def settings(**values: Any) -> CutSettings:
    return CutSettings(
        **{
            **SETTINGS,
            "validation_per_class": 0,
            "validation_seed": 0,
            "class_order": "natural",
            "label_noise": 0.0,
            **values,
        }
    )


@given(
    per_class=st.lists(st.integers(8, 30), min_size=2, max_size=7),
    held=st.sampled_from([0, 5, 7]),
    seeds=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    order=st.sampled_from(["natural", "0", "9"]),
    kind=st.sampled_from(["exp", "step"]),
)
def test_splits_are_disjoint_and_complete(
    per_class: list[int], held: int, seeds: tuple[int, int], order: str, kind: str
) -> None:
    classes = len(per_class)
    targets = np.random.default_rng(0).permutation(np.repeat(np.arange(classes), per_class))
    places = torch.arange(len(targets))
    # The pixels of an image encode its index.
    images = torch.stack([places // 256, places % 256], dim=1).to(torch.uint8)[:, :, None, None]
    names = tuple(f"class {label}" for label in range(classes))
    data = cut_to_long_tail(
        "made",
        names,
        LabeledPixels(images, targets),
        LabeledPixels(images[:1], targets[:1]),
        settings(
            imbalance=1.0,
            kind=kind,
            validation_per_class=held,
            subset_seed=seeds[0],
            validation_seed=seeds[1],
            class_order=order,
        ),
    )
    seen: dict[str, list[int]] = {}
    for split, part in data.splits.items():
        raw = pixels(part)[:, :, 0, 0].int()
        seen[split] = (raw[:, 0] * 256 + raw[:, 1]).tolist()
        assert [data.class_names[c] for c in part.targets] == [
            names[targets[place]] for place in seen[split]
        ]
    train, validation = set(seen["train"]), set(seen.get("validation", []))
    assert len(train) == len(seen["train"]) == classes * (min(per_class) - held)
    assert len(validation) == classes * held
    assert not train & validation
    assert data.subset_hash == subset_hash(np.array(seen["train"]))
    assert sorted(c for group in data.groups.values() for c in group) == list(range(classes))
    assert data.groups["head"]
    assert data.groups["tail"]


def test_statistics_are_those_of_numpy(seed: int) -> None:
    images = torch.from_numpy(
        np.random.default_rng(seed).integers(0, 256, (13, 3, 5, 7), dtype=np.uint8)
    )
    images[:, 2] = 9
    mean, std = channel_statistics(images)
    values = images.double().numpy() / 255
    assert mean == pytest.approx(values.mean(axis=(0, 2, 3)))
    assert std[:2] == pytest.approx(values.std(axis=(0, 2, 3))[:2])
    assert std[2] == 1.0  # of a constant channel


@pytest.mark.parametrize(("size", "padding"), [(32, 4), (28, 4), (96, 12), (16, 2), (8, 1), (2, 1)])
def test_the_augmentation_shifts_by_an_eighth(size: int, padding: int) -> None:
    part = LabeledPixels(torch.zeros(40, 1, size, size, dtype=torch.uint8), np.arange(40) % 2)
    for flips in (True, False):
        data = cut_to_long_tail("made", ("a", "b"), part, part, settings(), flips=flips)
        assert isinstance(data.train, TensorImages)
        crop = RandomCrop(padding)
        expected = Compose((crop, RandomHorizontalFlip())) if flips else crop
        assert data.train.augmentation == expected


def test_settings_have_defaults_of_their_recipes() -> None:
    values = dataset_settings("torchvision:KMNIST")
    assert isinstance(values, CutSettings)
    assert (values.n_max, values.validation_per_class, values.class_order) == (None, 0, "natural")


@pytest.mark.parametrize("name", ["glyphs10-lt", "glyphs100-lt"])
def test_removed_sets_are_named(name: str, capsys: Any) -> None:
    assert main(["data", "check", name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"data {name} was removed" in line
    assert "fashion-mnist-lt" in line


def test_runs_of_removed_sets_are_reported_but_not_resumed(tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    small = ["--data", "digits-lt", "--model", "resnet8", "--epochs", "1", "--quiet"]
    assert main(["train", *small, "--out", str(run)]) == 0
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    checkpoint["config"]["data"] = "glyphs10-lt"
    torch.save(checkpoint, run / "checkpoint.pt")
    result = json.loads((run / "result.json").read_text())
    del result["sha256"]
    result["config"]["data"] = "glyphs10-lt"
    result["unseen"] = result[
        "test"
    ]  # runs on generated glyphs were evaluated on a second test set
    (run / "result.json").write_text(json.dumps(result))
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "glyphs10-lt" in page
    for command in (["train", "--resume", "--out", str(run)], ["spectrum", str(run)]):
        capsys.readouterr()
        assert main(command) in (1, 2)
        (line,) = capsys.readouterr().err.splitlines()
        assert "data glyphs10-lt was removed: " in line
        assert "cannot be resumed or evaluated" in line


def test_cifar_runs_from_before_these_settings_are_the_same_runs() -> None:
    config = recipe("cifar10-lt", "ce", "sgd").config()
    stored = config.as_dict()
    for name in ("validation_per_class", "validation_seed", "class_order"):
        del stored[name]
    assert TrainConfig.from_dict(stored) == config
    assert differences(stored, config.as_dict()) == []
    assert differences(stored, config.replace(validation_seed=1).as_dict()) == ["validation_seed"]
