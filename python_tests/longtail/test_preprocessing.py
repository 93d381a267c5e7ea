"""Preprocessing of an image file gives the same tensor as the data set."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from fastsam.longtail import Checkpoint, Trainer, recipe
from fastsam.longtail.data import (
    Images,
    Preprocessing,
    TensorImages,
    from_datasets,
    load_dataset,
)
from fastsam.longtail.data.files import FileImages
from fastsam.longtail.errors import CheckpointError, DataError
from fastsam.longtail.trained import TrainedRun
from python_tests.longtail.archives import write_listed

CPU = torch.device("cpu")
GREY = Preprocessing((4, 4), 1, (0.25,), (0.5,))


def inputs_of(images: Images, count: int) -> torch.Tensor:
    """Read the first images as in evaluation."""
    return next(iter(images.batches([np.arange(count)], None, CPU))).inputs


def known(images: Images) -> Preprocessing:
    assert images.preprocessing is not None
    return images.preprocessing


def oracle(path: Path, *, resize: int, size: int, mean: list[float], std: list[float]):
    """Resize, crop, scale and normalize without torchvision."""
    image = Image.open(path).convert("RGB")
    short = min(image.size)
    image = image.resize(
        tuple(int(resize * side / short) for side in image.size), Image.Resampling.BILINEAR
    )
    left, top = (round((side - size) / 2) for side in image.size)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))
    normalized = (pixels.astype(np.float32) / np.float32(255) - np.float32(mean)) / np.float32(std)
    return torch.from_numpy(normalized).permute(2, 0, 1)


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("listed")
    write_listed(root, {"train.txt": ("train", [3, 2]), "test.txt": ("test", [2, 2])})
    return root


@pytest.mark.parametrize("exif", ["transpose", "ignore"])
def test_a_file_set_reads_files_as_its_preprocessing_does(listed: Path, exif: str) -> None:
    images = load_dataset("list", data_root=listed, image_size=14, workers=0, exif=exif).test
    assert isinstance(images, FileImages)
    found = known(images)
    assert found.exif == exif
    assert found.resize == 16
    paths = [listed / images.name_of(place) for place in range(len(images))]
    one_by_one = torch.stack([found.apply(path) for path in paths])
    assert torch.equal(one_by_one, inputs_of(images, len(images)))
    for path, tensor in zip(paths, one_by_one, strict=True):
        expected = oracle(path, resize=16, size=14, mean=list(images.mean), std=list(images.std))
        assert torch.equal(tensor, expected)


def in_memory(channels: int, white: float = 255.0) -> TensorImages:
    """Create images with all pixel values, and three random images."""
    largest = int(white)
    pixels = torch.randint(largest + 1, (4, channels, 8, 6), dtype=torch.uint8)
    pixels[0] = torch.arange(48).mul(7).remainder(largest + 1).reshape(8, 6)
    mean, std = (0.3, 0.4, 0.5)[:channels], (0.21, 0.2, 0.31)[:channels]
    return TensorImages(pixels, np.zeros(4, np.int64), white, mean, std)


def save(pixels: torch.Tensor, path: Path) -> Path:
    """Write uint8 ``[C, H, W]`` as PNG."""
    array = pixels.permute(1, 2, 0).numpy()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(path)
    return path


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_of_a_set_in_memory_saved_as_png_gives_its_bits(
    channels: int, tmp_path: Path
) -> None:
    images = in_memory(channels)
    expected = inputs_of(images, 4)
    for place in range(4):
        path = save(images.images[place], tmp_path / f"{place}.png")
        assert torch.equal(known(images).apply(path), expected[place])


def test_every_byte_is_scaled_alike_in_files_and_in_memory(tmp_path: Path) -> None:
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    images = TensorImages(every, np.zeros(1, np.int64), 255.0, (0.2860,), (0.3530,))
    path = save(every[0], tmp_path / "all.png")
    assert torch.equal(known(images).apply(path), inputs_of(images, 1)[0])


def test_cifar(cifar_root: Path, tmp_path: Path) -> None:
    images = load_dataset("cifar10-lt", data_root=cifar_root, imbalance=10).test
    assert isinstance(images, TensorImages)
    path = save(images.images[7], tmp_path / "seven.png")
    assert torch.equal(known(images).apply(path), inputs_of(images, 8)[7])


def test_white_of_a_file_is_white_of_the_digits(tmp_path: Path) -> None:
    images = in_memory(1, white=16.0)
    expected = inputs_of(images, 4)
    for place in range(4):
        raw = images.images[place]
        scaled = (raw.double() * 255 / 16).round().to(torch.uint8)
        found = known(images).apply(save(scaled, tmp_path / f"{place}.png"))
        # Rounding to a byte is off by half a step of 1 / 255 at most, before the division by std.
        assert (found - expected[place]).abs().max() <= 0.5001 / 255 / images.std[0]
        ends = (raw == 0) | (raw == 16)
        assert ends.any()
        assert torch.equal(found[ends], expected[place][ends])


def test_color_becomes_grey_and_other_sizes_are_resized(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    array = rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "color.png")
    grey = (array @ np.array([19595, 38470, 7471]) + 0x8000) >> 16  # ITU-R 601 in 16 bits
    small = Image.fromarray(grey.astype(np.uint8)).resize((4, 4), Image.Resampling.BILINEAR)
    expected = (np.asarray(small, dtype=np.float32) / np.float32(255) - 0.25) / np.float32(0.5)
    assert np.array_equal(GREY.apply(tmp_path / "color.png").numpy(), expected[None])
    color = Preprocessing((4, 4), 3, (0.25,), (0.5,))
    assert color.apply(tmp_path / "color.png").shape == (3, 4, 4)


def test_16_bits_and_ranges(tmp_path: Path) -> None:
    values = np.array([[0, 65535], [13107, 26214]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    plain = Preprocessing((2, 2), 1, (0.0,), (1.0,))
    assert plain.apply(tmp_path / "deep.png").numpy() == pytest.approx(values[None] / 65535)
    ranged = replace(plain, channels=3, value_range=(0.0, 131070.0))
    found = ranged.apply(tmp_path / "deep.png").numpy()
    assert found == pytest.approx(np.stack([values / 131070] * 3))


def test_exif_orientation(tmp_path: Path) -> None:
    array = np.arange(16, dtype=np.uint8).reshape(4, 4) * 16
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.fromarray(array).save(tmp_path / "turned.png", exif=exif)
    scaled = {
        how: replace(GREY, mean=(0.0,), std=(1.0,), exif=how).apply(tmp_path / "turned.png")[0]
        * 255
        for how in ("transpose", "ignore")
    }
    assert scaled["ignore"].round().numpy().tolist() == array.tolist()
    assert scaled["transpose"].round().numpy().tolist() == np.rot90(array, -1).tolist()


def test_plain_values_and_back() -> None:
    every = Preprocessing((4, 6), 3, (0.1, 0.2, 0.3), (0.4,), 9, "ignore", (0.0, 4095.0))
    for item in (GREY, every):
        assert Preprocessing.from_dict(json.loads(json.dumps(item.as_dict()))) == item


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": (4,)}, "height and a width"),
        ({"size": (4, 0)}, "at least 1"),
        ({"channels": 2}, "1 .grayscale. or 3"),
        ({"mean": (0.1, 0.2)}, "mean must have one value"),
        ({"std": (0.0,)}, "std must be above 0"),
        ({"resize": 0}, "resize must be at least 1"),
        ({"exif": "turn"}, "transpose, ignore"),
        ({"value_range": (1.0, 1.0)}, "two values in ascending order"),
    ],
)
def test_values_that_make_no_sense(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(GREY, **changes)  # type: ignore[arg-type]


def test_images_made_in_python_have_none() -> None:
    both = TensorDataset(torch.zeros(5, 1, 8, 8), torch.tensor([0, 0, 0, 1, 1]))
    assert from_datasets("zeros", both, both).test.preprocessing is None
    strange = TensorImages(
        torch.zeros(1, 2, 4, 4, dtype=torch.uint8), np.zeros(1, np.int64), 255.0, (0.0,), (1.0,)
    )
    assert strange.preprocessing is None


def test_checkpoints_store_it_and_older_ones_fall_back_on_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe("digits-lt", "ce", "sgd", epochs=1).config()
    trainer = Trainer(config, out=tmp_path, progress=False)
    trainer.fit()
    expected = trainer.data.test.preprocessing
    assert expected is not None
    assert Checkpoint.load(tmp_path).preprocessing == expected
    with monkeypatch.context() as patched:
        patched.setattr(TrainedRun, "data", lambda self: pytest.fail("the data were loaded"))
        assert TrainedRun.load(tmp_path).preprocessing == expected
    path = tmp_path / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    wrong = {**content["preprocessing"], "channels": 2}
    torch.save({**content, "preprocessing": wrong}, path)
    with pytest.raises(CheckpointError, match="channels must be 1"):
        Checkpoint.load(path)
    del content["preprocessing"]
    torch.save(content, path)
    assert Checkpoint.load(path).preprocessing is None
    assert TrainedRun.load(tmp_path).preprocessing == expected


def test_a_run_on_data_from_python_has_none(tmp_path: Path) -> None:
    both = TensorDataset(torch.rand(30, 1, 8, 8), torch.tensor([0] * 20 + [1] * 10))
    data = from_datasets("mine", both, both)
    config = recipe("own:mine", "ce", "sgd", epochs=1, model="resnet8").config()
    Trainer(config, data=data, out=tmp_path, progress=False).fit()
    run = TrainedRun.load(tmp_path)
    assert run.preprocessing is None
    with pytest.raises(DataError, match="own:mine was created in Python"):
        run.known_preprocessing()
