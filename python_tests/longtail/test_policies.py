"""Augmentation policies: what each does, former values, and equal bits for workers and ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms import v2

from fastsam.cli import main
from fastsam.longtail import Checkpoint, TrainConfig, Trainer, recipe
from fastsam.longtail.build import augmented
from fastsam.longtail.data import (
    AUGMENTATIONS,
    Draw,
    Images,
    LongTailData,
    from_datasets,
    load_dataset,
    load_digits_lt,
    register_transform,
)
from fastsam.longtail.data.augment import Compose, RandomCrop, RandomHorizontalFlip
from fastsam.longtail.data.augmentations import Frame, Steps
from fastsam.longtail.data.resized_crop import RandomResizedCrop
from fastsam.longtail.differences import differences
from fastsam.longtail.errors import UsageError
from fastsam.longtail.seeds import SampleSeeds, global_seed

CPU = torch.device("cpu")
SIZE = 16


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policies")
    for number in range(14):
        path = folder / f"class {number % 2}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (20, 26, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    deep = np.random.default_rng(99).integers(0, 65536, (20, 26)).astype(np.uint16)
    Image.fromarray(deep).save(folder / "class 0" / "deep.png")
    return folder


def own(root: Path, augment: str, **settings: Any) -> LongTailData:
    options = {"data_root": str(root), "split_test": 0.2, "image_size": SIZE, "workers": 0}
    config = recipe("folder", "ce", "sgd", augment=augment, **{**options, **settings}).config()
    part = config.parts["data"]
    chosen = {name: getattr(part, name) for name in part.__dataclass_fields__}
    return augmented(config, load_dataset("folder", progress=False, **chosen))


DRAW = Draw(3, 1)


def read(images: Images, parts: int = 2, draw: Draw | None = DRAW) -> Tensor:
    order = np.array_split(np.arange(len(images)), parts)
    found = list(images.batches(order, draw, CPU))
    return torch.cat([batch.inputs for batch in found])


def seeds(count: int) -> SampleSeeds:
    return Draw(3, 1).seeds([np.arange(count)])[0]


def test_every_policy_is_listed_with_a_summary() -> None:
    assert set(AUGMENTATIONS) >= {
        *("auto", "crop", "crop-flip", "default", "none", "randaugment", "resized-crop"),
        "trivialaugment",
    }
    assert all(part.summary for part in AUGMENTATIONS.values())


@pytest.mark.parametrize("augment", ["crop", "crop-flip"])
def test_shifts_are_made_of_images_prepared_as_in_evaluation(augment: str, root: Path) -> None:
    images = own(root, augment).train
    plain = images.normalized((0.0,) * 3, (1.0,) * 3)
    step = RandomCrop(2) if augment == "crop" else Compose((RandomCrop(2), RandomHorizontalFlip()))
    clean = read(plain, draw=None)
    assert torch.allclose(read(plain), step(clean, seeds(len(clean))))


def test_a_resized_crop_is_the_crop_and_a_flip(root: Path) -> None:
    images: Any = own(root, "resized-crop", crop_area=0.5).train
    assert images.own_steps == Steps(
        RandomResizedCrop(SIZE, scale=(0.5, 1.0)), per_batch=RandomHorizontalFlip()
    )
    with pytest.raises(UsageError, match="crop_area requires augmentation resized-crop"):
        own(root, "crop", crop_area=0.5)


@pytest.mark.parametrize("augment", ["randaugment", "trivialaugment"])
def test_learned_policies_are_those_of_torchvision(augment: str) -> None:
    """On digits the oracle is torchvision's transform, seeded for each image, before the default shift."""
    settings: dict[str, Any] = {"workers": 0}
    transform: Any = v2.TrivialAugmentWide()
    if augment == "randaugment":
        settings |= {"randaugment_operations": 3, "randaugment_magnitude": 15}
        transform = v2.RandAugment(3, 15)
    config = recipe("digits-lt", "ce", "sgd", augment=augment, **settings).config()
    data = load_digits_lt()
    images: Any = augmented(config, data).train
    raw: Any = data.train
    count = len(images)
    every = seeds(count)
    changed = []
    for place in range(count):
        key = int(every.take(place).spawn(64).bits(1)[0, 0] >> np.uint64(1))
        with global_seed(key):
            changed.append(transform(raw.images[place].float() / 16))
    mean, std = images.mean[0], images.std[0]
    expected = (RandomCrop(1)(torch.stack(changed), every) - mean) / std
    assert torch.allclose(read(images), expected, atol=1e-6)
    assert not torch.allclose(read(images), read(raw))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("augment", ["crop-flip", "trivialaugment"])
def test_equal_bits_for_any_number_of_workers_and_batches(augment: str, root: Path) -> None:
    expected = read(own(root, augment, channels=1).train)
    assert expected.shape[1:] == (1, SIZE, SIZE)
    several = own(root, augment, channels=1, workers=2).train
    assert torch.equal(read(several, parts=3), expected)
    several.close()
    config = recipe("digits-lt", "ce", "sgd", augment="randaugment", workers=2).config()
    data = load_digits_lt()
    alone = augmented(config.replace(workers=0), data).train
    split = augmented(config, data).train
    assert torch.equal(read(split, parts=5), read(alone))
    split.close()


def test_policies_of_torch_datasets() -> None:
    pixels = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8)
    train = TensorDataset(pixels, torch.tensor([0, 1] * 6))
    data = from_datasets("own", train, train, augmentation=lambda image: image * 0)
    config = recipe("own:own", "ce", "sgd", model="resnet8", augment="crop-flip").config()
    found = read(augmented(config, data).train)
    step = Compose((RandomCrop(2), RandomHorizontalFlip()))
    assert torch.allclose(found, step(pixels, seeds(12)).float() / 255)
    assert not read(data.train).any()  # the data set's own augmentation
    assert not read(augmented(config.replace(augment="default"), data).train).any()


@pytest.mark.parametrize(
    ("size", "count", "expected"),
    [
        (64, 200, Steps(per_batch=Compose((RandomCrop(8), RandomHorizontalFlip())))),
        (96, 9_999, Steps(RandomResizedCrop(96, (0.35, 1.0)), per_batch=RandomHorizontalFlip())),
        (96, 10_000, Steps(per_batch=RandomCrop(1))),
    ],
)
def test_auto_depends_on_size_and_count(size: int, count: int, expected: Steps) -> None:
    part = AUGMENTATIONS["auto"]
    default = Steps(per_batch=RandomCrop(1))
    frame = Frame((size, size), count)
    assert part.build(part.settings(workers=0), default, frame) == expected
    assert part.chosen is not None
    assert f"{count:,} training images" in part.chosen(frame)


def test_former_values_are_names(tmp_path: Path) -> None:
    for former, name in ((True, "default"), (False, "none"), ("False", "none")):
        assert recipe("digits-lt", "ce", "sgd", augment=former).config().augment == name
    stored = recipe("digits-lt", "ce", "sgd", epochs=1).config().as_dict()
    old = {**stored, "augment": True}
    assert TrainConfig.from_dict(old).augment == "default"
    assert differences(old, stored) == []
    assert differences({**stored, "augment": False}, stored) == ["augment"]
    (tmp_path / "run.yaml").write_text(
        "data: digits-lt\nmethod: ce\noptimizer: sgd\naugment: false\n"
    )
    command = ["train", "--config", str(tmp_path / "run.yaml"), "--epochs", "1", "--quiet"]
    assert main([*command, "--out", str(tmp_path / "one")]) == 0
    named = [
        "train",
        "--data",
        "digits-lt",
        "--method",
        "ce",
        "--optimizer",
        "sgd",
        "--epochs",
        "1",
    ]
    assert main([*named, "--quiet", "--augment", "none", "--out", str(tmp_path / "two")]) == 0
    assert main([*named, "--quiet", "--augment", "False", "--out", str(tmp_path / "three")]) == 0
    weights = [
        Checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("one", "two", "three")
    ]
    for other in weights[1:]:
        assert other.config == weights[0].config
        for name, value in weights[0].model.items():
            assert torch.equal(value, other.model[name])


@pytest.fixture
def names() -> Any:
    before = dict(AUGMENTATIONS._parts)
    yield
    AUGMENTATIONS._parts.clear()
    AUGMENTATIONS._parts.update(before)


def test_a_function_of_the_user(names: None) -> None:
    def dim(pixels: Tensor) -> Tensor:
        return pixels * (torch.rand(1) < 0.5)

    register_transform("dim", dim)
    register_transform("dim-after", dim, after_default=True)
    data = load_digits_lt()
    for name in ("dim", "dim-after"):
        config = recipe("digits-lt", "ce", "sgd", epochs=1, augment=name).config()
        images = augmented(config, data).train
        dark = read(images).flatten(1).amax(1) == read(images).amin()
        assert 0.3 < dark.float().mean() < 0.7
        assert torch.equal(read(images), read(images, parts=7))
    Trainer(config, progress=False).fit()
    register_transform("smaller", lambda pixels: pixels[:, 1:])
    config = recipe("digits-lt", "ce", "sgd", epochs=1, augment="smaller").config()
    with pytest.raises(UsageError, match=r"'smaller' must return a tensor like its input"):
        read(augmented(config, data).train)


def test_an_unknown_policy_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--augment", "crop-flp"]) == 2
    assert "did you mean 'crop-flip'?" in capsys.readouterr().err


def test_a_branch_keeps_the_augmentation(tmp_path: Path) -> None:
    command = ["train", "--data", "digits-lt", "--method", "ce", "--optimizer", "sgd", "--quiet"]
    assert main([*command, "--epochs", "2", "--keep", "1", "--out", str(tmp_path / "one")]) == 0
    branch = [*command, "--from", str(tmp_path / "one"), "--at", "1", "--out"]
    assert main([*branch, str(tmp_path / "two"), "--augment", "none"]) == 2


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("augment", ["resized-crop", "auto", "dim"])
def test_workers_are_an_option_of_policies_on_single_images(augment: str, names: None) -> None:
    register_transform("dim", lambda pixels: pixels // 2)
    config = recipe("digits-lt", "ce", "sgd", augment=augment, workers=2).config()
    images: Any = augmented(config, load_digits_lt()).train
    assert images.workers == 2


class Counted(Dataset[Any]):
    """Images that count how often they are decoded."""

    def __init__(self) -> None:
        self.reads = 0

    def __len__(self) -> int:
        return 12

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        if place >= len(self):
            raise IndexError
        self.reads += 1
        return torch.full((3, 16, 16), place, dtype=torch.uint8), place % 2


def test_torch_datasets_are_augmented_by_workers_and_keep_their_labels() -> None:
    train = Counted()
    data = from_datasets(
        "own", train, TensorDataset(*map(torch.stack, zip(*_items(train), strict=True)))
    )
    config = recipe(
        "own:own", "ce", "sgd", model="resnet8", augment="trivialaugment", workers=3
    ).config()
    train.reads = 0
    images: Any = augmented(config, data).train
    assert images.workers == 3
    for found in (images, images.normalized((0.5,) * 3, (1.0,) * 3)):
        assert found.targets.tolist() == [0, 1] * 6
    assert train.reads < 3  # for the size
    own: Any = from_datasets("own", train, train, workers=1).train
    assert own.augmented(lambda default, frame: Steps(), workers=3) is own
    changed = own.augmented(lambda default, frame: Steps(per_batch=RandomCrop(1)), workers=3)
    assert changed.workers == 1


def _items(dataset: Counted) -> list[tuple[Tensor, Tensor]]:
    return [(image, torch.tensor(label)) for image, label in (dataset[n] for n in range(12))]


def test_workers_read_images_that_were_assigned_later() -> None:
    config = recipe("digits-lt", "ce", "sgd", augment="resized-crop", workers=0).config()
    images: Any = augmented(config, load_digits_lt()).train.normalized((0.0,), (1.0,))
    assert read(images).any()
    images.images = torch.zeros_like(images.images)
    assert not read(images).any()
