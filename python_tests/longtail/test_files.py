"""Training on small archives in the original formats, and unreadable images."""

from __future__ import annotations

import gc
import lzma
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastsam.cli import main
from fastsam.longtail import Checkpoint, Trainer, recipe
from fastsam.longtail.build import load_configured
from fastsam.longtail.data import Draw, TensorImages, load_dataset, longtail_indices
from fastsam.longtail.data.catalog import DATASETS
from fastsam.longtail.data.files import FileImages
from fastsam.longtail.data.listed import LISTED
from fastsam.longtail.data.lists import read_list
from fastsam.longtail.differences import differences
from fastsam.longtail.errors import CheckpointError, DataError, UsageError
from python_tests.longtail.archives import write_image, write_listed

CPU = torch.device("cpu")
COUNTS = [3, 9, 5, 5]
"""Training images by original label; labels 2 and 3 tie."""


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files in the formats of ImageNet-LT, Places-LT and iNaturalist with four classes."""
    root = tmp_path_factory.mktemp("listed")
    even = [2, 2, 2, 2]
    for info in LISTED.values():
        lists = {info.train: (f"{info.name}/train", COUNTS), info.test: (f"{info.name}/val", even)}
        if info.validation is not None:
            lists[info.validation] = (f"{info.name}/train", even)
        write_listed(root, lists)
    return root


@pytest.fixture(autouse=True)
def _few_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, info in list(LISTED.items()):
        totals = dict.fromkeys(info.totals, 8) | {info.train: sum(COUNTS)}
        boundaries = None if info.boundaries is None else (1, 3)
        small = replace(
            info, num_classes=4, totals=totals, largest=9, smallest=3, boundaries=boundaries
        )
        monkeypatch.setitem(LISTED, name, small)


def config_for(data: str, root: Path, **settings: Any) -> Any:
    options: dict[str, Any] = {
        "model": "resnet8",
        "epochs": 1,
        "batch_size": 16,
        "data_root": str(root),
        **settings,
    }
    if data in (*LISTED, "list", "folder"):
        options = {"image_size": 16, "workers": 0, **options}
    return recipe(data, "ldam-drw", "sam", **options).config()


@pytest.mark.parametrize("data", LISTED)
def test_train_on_listed_formats(data: str, listed: Path) -> None:
    result = Trainer(config_for(data, listed), progress=False).fit()
    assert result.counts == [9, 5, 5, 3]
    assert result.class_names == ["1", "2", "3", "0"]
    expected = [[], [0, 1, 2, 3]] if data == "places-lt" else [[0], [3]]
    assert [result.groups["head"], result.groups["tail"]] == expected
    assert result.test.images == 8
    assert (result.validation is None) == (data == "inaturalist18")
    assert result.unreadable == {}


@pytest.mark.parametrize(
    ("data", "classes"),
    [("cifar10-lt", 10), pytest.param("cifar100-lt", 100, marks=pytest.mark.slow)],
)
def test_train_on_cifar(data: str, classes: int, cifar_root: Path) -> None:
    config = config_for(data, cifar_root, imbalance=5.0)
    run = Trainer(config, progress=False)
    assert len(run.data.test) == {10: 30, 100: 100}[classes]
    assert run.data.counts[0] == 5 * run.data.counts[-1]
    result = run.fit()
    assert result.subset_hash is not None
    assert len(result.subset_hash) == 64


def test_cifar_pixels_and_subset(cifar_root: Path) -> None:
    from torchvision.datasets import CIFAR10

    raw = CIFAR10(str(cifar_root), train=True)
    data = load_dataset("cifar10-lt", data_root=cifar_root, imbalance=10.0)
    chosen = longtail_indices(raw.targets, data.counts)
    assert data.train.targets.tolist() == np.array(raw.targets)[chosen].tolist()
    assert isinstance(data.train, TensorImages)
    first = raw.data[chosen[0]].transpose(2, 0, 1)
    assert (data.train.images[0].numpy() == first).all()
    (batch,) = data.train.batches([np.array([0])], None, CPU)
    expected = (first[0, 0, 0] / 255 - 0.4914) / 0.2023
    assert float(batch.inputs[0, 0, 0, 0]) == pytest.approx(expected, abs=1e-5)


def test_cifar_that_is_missing_or_damaged(cifar_root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing or damaged.*toronto"):
        load_dataset("cifar10-lt", data_root=tmp_path)
    half = tmp_path / "cifar-10-batches-py"
    half.mkdir()
    for file in (cifar_root / "cifar-10-batches-py").iterdir():
        (half / file.name).write_bytes(file.read_bytes()[: 1000 if "5" in file.name else None])
    with pytest.raises(DataError, match="missing or damaged"):
        load_dataset("cifar10-lt", data_root=tmp_path)


def file_images(root: Path, **options: Any) -> FileImages:
    data = load_dataset(
        "imagenet-lt", **{"data_root": root, "image_size": 16, "workers": 0, **options}
    )
    assert isinstance(data.train, FileImages)
    return data.train


def read(
    images: FileImages, *, seed: int = 0, epoch: int = 1, augment: bool = True
) -> torch.Tensor:
    order = [np.arange(0, 7), np.arange(7, 22)]
    batches = images.batches(order, Draw(seed, epoch) if augment else None, CPU)
    return torch.cat([batch.inputs for batch in batches])


def test_augmentation_does_not_depend_on_workers(listed: Path) -> None:
    state = torch.random.get_rng_state()
    here = read(file_images(listed))
    assert here.shape == (22, 3, 16, 16)
    assert torch.equal(here, read(file_images(listed, workers=2)))
    assert torch.equal(state, torch.random.get_rng_state())
    assert not torch.equal(here, read(file_images(listed), epoch=2))
    assert not torch.equal(here, read(file_images(listed), seed=1))
    plain = read(file_images(listed), augment=False)
    assert torch.equal(plain, read(file_images(listed), augment=False, epoch=2, seed=5))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_augmentation_is_drawn_from_seed_epoch_view_and_image(workers: int, listed: Path) -> None:
    """Repeated and overlapping reads by the same workers give the same images, in any order."""
    images = file_images(listed, workers=workers)
    by_image = file_images(listed)
    order = np.array_split(np.random.default_rng(5).permutation(len(images)), 5)
    for seed, epoch in ((0, 1), (0, 2), (3, 1)):
        draws = [Draw(seed, epoch, view) for view in range(2)]
        views = [images.batches(order, draw, CPU) for draw in draws]
        expected = [
            next(by_image.batches([np.arange(len(images))], draw, CPU)).inputs for draw in draws
        ]
        assert not torch.equal(*expected)
        for chosen, *batches in zip(order, *views, strict=True):
            for batch, whole in zip(batches, expected, strict=True):
                assert batch.indices.tolist() == chosen.tolist()
                assert torch.equal(batch.inputs, whole[chosen])
    images.close()


@pytest.mark.slow
def test_workers_live_from_the_first_reading_to_the_end_of_the_run(listed: Path) -> None:
    others = multiprocessing.active_children()

    def alive() -> set[int | None]:
        return {
            process.pid for process in multiprocessing.active_children() if process not in others
        }

    images = file_images(listed, workers=2)
    assert alive() == set()
    first = read(images)
    pids = alive()
    assert len(pids) == 2
    assert torch.equal(read(images), first)
    read(images, epoch=2, augment=False)
    assert alive() == pids
    images.close()
    assert alive() == set()
    assert torch.equal(read(images), first)
    assert len(alive()) == 2
    del images
    assert alive() == set()

    met: list[set[int | None]] = []
    config = config_for("imagenet-lt", listed, workers=1, epochs=3)
    run = Trainer(config, on_step=lambda step: met.append(alive()), progress=False)
    run.fit()
    assert met[0] < met[2] == met[4]  # later with the worker of the validation set
    assert len(met[4]) == 2
    assert alive() == set()
    run = Trainer(config, on_step=lambda step: 1 / 0, progress=False)
    with pytest.raises(ZeroDivisionError):
        run.fit()
    gc.collect()
    assert alive() == set()


def damaged_copy(listed: Path, tmp_path: Path) -> tuple[Path, str]:
    """A separate data root whose first training image is truncated."""
    info = LISTED["imagenet-lt"]
    lists = {info.train: ("train", COUNTS), info.test: ("val", [2] * 4)}
    assert info.validation is not None
    write_listed(tmp_path, {**lists, info.validation: ("train", [2] * 4)})
    path = "train/n00000001/ImageNet_LT_train_0.JPEG"
    whole = (tmp_path / path).read_bytes()
    (tmp_path / path).write_bytes(whole[: len(whole) // 3])
    return tmp_path, path


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_stops_the_run_or_is_counted(
    workers: int, listed: Path, tmp_path: Path
) -> None:
    root, path = damaged_copy(listed, tmp_path)
    with pytest.raises(DataError, match=f"cannot read .*{path} .*--corrupt skip"):
        Trainer(config_for("imagenet-lt", root, workers=workers), progress=False).fit()
    config = config_for("imagenet-lt", root, workers=workers, corrupt="skip", epochs=2)
    seen: list[int] = []
    run = Trainer(config, on_step=lambda step: seen.append(len(step.targets)), progress=False)
    result = run.fit()
    assert result.unreadable == {path: 1}
    assert sum(seen) == 2 * (sum(COUNTS) - 1)


def test_corrupt_images_of_evaluation_sets_are_counted_and_survive_resuming(
    listed: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, path = damaged_copy(listed, tmp_path / "data")
    first = "val/n00000000/ImageNet_LT_test_0.JPEG"
    (root / first).write_bytes(b"no image")
    monkeypatch.setattr("fastsam.longtail.training.saving.EPOCH_SECONDS", 0.0)
    config = config_for("imagenet-lt", root, corrupt="skip", epochs=2)

    def stop(step: Any) -> None:
        if step.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trainer(config, out=tmp_path / "run", on_step=stop, progress=False).fit()
    result = Trainer(config, out=tmp_path / "run", resume=True, progress=False).fit()
    assert result.unreadable == {path: 1, first: 1}
    assert result.test.images == 7
    options = ["--corrupt", "skip", "--epochs", "1", "--model", "resnet8", "--image-size", "16"]
    where = ["--data", "imagenet-lt", "--data-root", str(root), "--workers", "0"]
    assert main(["train", *where, *options, "--batch-size", "16", "--quiet"]) == 0
    assert "skipped 2 unreadable images" in capsys.readouterr().out


def test_runs_that_share_data_count_their_own_unreadable_images(
    listed: Path, tmp_path: Path
) -> None:
    root, path = damaged_copy(listed, tmp_path / "data")
    config = config_for("imagenet-lt", root, corrupt="skip")
    data = load_configured(config)
    runs = [
        Trainer(config.replace(seed=seed), data=data, out=tmp_path / str(seed), progress=False)
        for seed in range(2)
    ]
    for seed, run in enumerate(runs):
        assert run.fit().unreadable == {path: 1}
        assert Checkpoint.load(tmp_path / str(seed)).unreadable == {path: 1}


def test_a_moved_run_resumes(listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsam.longtail.training.saving.EPOCH_SECONDS", 0.0)
    config = config_for("imagenet-lt", listed, epochs=2)

    def stop(step: Any) -> None:
        if step.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trainer(config, out=tmp_path / "run", on_step=stop, progress=False).fit()
    (tmp_path / "moved").symlink_to(listed)
    moved = config.replace(data_root=str(tmp_path / "moved"), workers=2)
    result = Trainer(moved, out=tmp_path / "run", resume=True, progress=False).fit()
    assert result.test == Trainer(config, progress=False).fit().test
    # Also with --corrupt skip, which the error message suggests.
    passing = moved.replace(corrupt="skip")
    assert Trainer(passing, out=tmp_path / "run", resume=True, progress=False).state.history
    with pytest.raises(CheckpointError, match="threads was 0, is now 1"):
        Trainer(moved.replace(threads=1), out=tmp_path / "run", resume=True, progress=False)


def test_settings_that_prevent_resuming() -> None:
    here = {"data": "cifar10-lt", "data_root": "a", "device": "cpu", "workers": 0, "lr": 0.1}
    there = {**here, "data_root": "b", "device": "cuda", "workers": 2, "download": True}
    assert differences(here, there) == []
    assert differences(here, {**there, "lr": 0.2, "new": 1}) == ["lr", "new"]
    own = [{**settings, "data": "folder"} for settings in (here, there)]
    assert differences(*own) == ["data_root"]
    assert differences(*own, same_content=True) == []


def test_bad_lists_are_refused_before_training(listed: Path, tmp_path: Path) -> None:
    info = LISTED["imagenet-lt"]
    root, _ = damaged_copy(listed, tmp_path)
    text = (root / info.train).read_text()
    for wrong, message in (
        (text.replace("n00000001/ImageNet_LT_train_0.", "n00000001/gone."), "do not exist in"),
        (text.replace(" 3\n", " 7\n"), "from 0 to 3, got 7"),
        (text[: text.rindex("train/")], "published"),
    ):
        (root / info.train).write_text(wrong)
        with pytest.raises(DataError, match=message):
            load_dataset("imagenet-lt", data_root=root)
    (root / info.train).unlink()
    with pytest.raises(DataError, match="no ImageNet_LT_train"):
        load_dataset("imagenet-lt", data_root=root)


def test_own_folders_and_own_lists(tmp_path: Path) -> None:
    lists = {"train.txt": ("train", [1, 6, 2]), "test.txt": ("test", [1, 1, 1])}
    write_listed(tmp_path, lists)
    for name in ("folder", "list"):
        result = Trainer(config_for(name, tmp_path), progress=False).fit()
        assert result.counts == [6, 2, 1]
        assert result.groups["tail"] == [0, 1, 2]
    folder = load_dataset("folder", data_root=tmp_path)
    assert folder.class_names == ("n00000001", "n00000002", "n00000000")
    assert folder.validation is None
    write_listed(tmp_path, {"val.txt": ("val", [4, 3, 2])})
    lines = (tmp_path / "val.txt").read_bytes()
    (tmp_path / "val.txt").unlink()
    (tmp_path / "val.txt.xz").write_bytes(lzma.compress(lines))
    validation = load_dataset("list", data_root=tmp_path).validation
    assert validation is not None
    assert len(validation) == 9
    (tmp_path / "test" / "n00000009").mkdir()
    with pytest.raises(DataError, match="n00000009"):
        load_dataset("folder", data_root=tmp_path)


def test_every_training_set_has_a_hash_of_its_images_and_classes(
    listed: Path, tmp_path: Path
) -> None:
    def hashed(name: str, root: Path) -> str:
        return load_dataset(name, data_root=root).subset_hash

    assert len({hashed(name, listed) for name in LISTED}) == len(LISTED)
    here, moved = tmp_path / "here", tmp_path / "moved"
    write_listed(here, {"train.txt": ("train", [2, 3]), "test.txt": ("test", [1, 1])})
    moved.symlink_to(here)
    before = {name: hashed(name, here) for name in ("list", "folder")}
    assert before == {name: hashed(name, moved) for name in before}
    # Class 0 becomes the larger one, so the two classes are swapped.
    for number in (2, 3):
        write_image(here / f"train/n00000000/train_{number}.JPEG", 0, np.random.default_rng(7))
    assert hashed("folder", here) != before["folder"]
    assert hashed("list", here) == before["list"]
    train = read_list(here / "train.txt")
    swapped = zip(train.paths, 1 - train.targets, strict=True)
    (here / "train.txt").write_text("".join(f"{path} {label}\n" for path, label in swapped))
    assert hashed("list", here) != before["list"]  # the same images and counts with other labels


def test_catalog_names_are_complete() -> None:
    for part in DATASETS.values():
        assert part.where
        assert part.summary
        assert {"model", "epochs", "lr", "lr_schedule"} <= part.recipe.keys()
    with pytest.raises(UsageError, match="cifar10-lt"):
        load_dataset("cifar10")
