"""From files to batches: what the workers do, what the device does, and on what the result depends."""

from __future__ import annotations

from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from fastsam.distributed import World
from fastsam.longtail.data import Draw, from_datasets
from fastsam.longtail.data import jpeg as jpeg_file
from fastsam.longtail.data.files import FileImages, Preparation
from fastsam.longtail.data.jitter import ColorJitter
from fastsam.longtail.data.jpeg import decode_plain, is_plain, read_header, torchcodec_decoder
from fastsam.longtail.data.lists import ImageList
from fastsam.longtail.data.pixels import Reading, decode, decode_fast
from fastsam.longtail.data.workers import Request, Sample
from fastsam.longtail.samplers import ClassSampler
from fastsam.longtail.training.batches import EpochBatches

CPU = torch.device("cpu")
COUNT = 21
WIDE = (3, 8, 15)
"""Images with 16 bits."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of odd sizes; three of them have 16 bits."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        height, width = rng.integers(19, 60, 2)
        if number in WIDE:
            pixels = rng.integers(0, 65536, (height, width)).astype(np.uint16)
            Image.fromarray(pixels).save(folder / f"{number}.img", format="PNG")
        else:
            pixels = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
            kind = ("JPEG", "PNG", "BMP")[number % 3]
            Image.fromarray(pixels).save(folder / f"{number}.img", format=kind)
    return folder


def images_in(root: Path, workers: int = 0, **options: Any) -> FileImages:
    names = [f"{number}.img" for number in range(COUNT)]
    targets = np.arange(COUNT) % 3
    return FileImages(root, ImageList(names, targets), Preparation(17), workers, **options)


class Positions:
    """A sampler that returns positions instead of indices."""

    def order(self, epoch: int) -> NDArray[np.int64]:
        return np.arange(COUNT)


def epoch_of(root: Path, workers: int, world_size: int) -> dict[tuple[int, int], list[Tensor]]:
    """Read an epoch on all ranks, and return the views of each image by its index and occurrence."""
    images = images_in(root, workers)
    sampler = ClassSampler(images.targets, np.bincount(images.targets), seed=4)
    order = sampler.order(2).tolist()
    keys = [(index, order[:place].count(index)) for place, index in enumerate(order)]
    found: dict[tuple[int, int], list[Tensor]] = {}
    for rank in range(world_size):
        batches = EpochBatches(
            images,
            sampler,
            batch_size=6,
            views=2,
            augment=True,
            seed=1,
            device=CPU,
            world=World(rank, world_size),
        )
        mine = replace(batches, sampler=Positions()).indices(2)
        for places, batch in zip(mine, batches.read(2), strict=True):
            assert batch.indices.tolist() == [order[place] for place in places]
            for row, place in enumerate(places.tolist()):
                found[keys[place]] = [view[row] for view in batch.views]
    images.close()
    return found


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("workers", "world_size"), [(0, 2), (2, 1), (4, 1), (2, 2)])
def test_an_image_is_augmented_alike_by_any_number_of_workers_and_ranks(
    workers: int, world_size: int, root: Path
) -> None:
    expected, found = epoch_of(root, 0, 1), epoch_of(root, workers, world_size)
    assert len(expected) == COUNT
    assert found.keys() == expected.keys()
    for key, views in expected.items():
        for one, other in zip(views, found[key], strict=True):
            assert torch.equal(one, other)
    repeated = [index for index, occurrence in expected if occurrence == 1]
    assert repeated
    for index in repeated:
        first, second = expected[index, 0], expected[index, 1]
        assert not any(torch.equal(a, b) for a in first for b in (*second, first[1]) if a is not b)


def test_workers_hand_over_bytes(root: Path) -> None:
    images = images_in(root)
    reader = images._workers.reader
    for draw in (None, Draw(0, 1)):
        order = np.arange(COUNT)
        seeds = None if draw is None else draw.seeds([order])[0]
        read = reader[Request(order, seeds)].images
        for number, sample in enumerate(read):
            assert isinstance(sample, Sample)
            assert sample.pixels.dtype == (torch.float32 if number in WIDE else torch.uint8)
            assert sample.pixels.shape == (3, 17, 17)


@pytest.mark.parametrize("workers", [0, 2])
def test_wide_images_keep_their_bits_beside_others(workers: int, root: Path) -> None:
    """The images of a batch come back in order, each as if it were alone."""
    images = images_in(root, workers)
    rows = np.random.default_rng(1).permutation(COUNT)
    for draw in (None, Draw(0, 1)):
        (together,) = images.batches([rows], draw, CPU)
        assert together.indices.tolist() == rows.tolist()
        assert together.targets.tolist() == images.targets[rows].tolist()
        for inputs, alone in zip(
            together.inputs,
            images.batches([rows[[i]] for i in range(COUNT)], draw, CPU),
            strict=True,
        ):
            assert torch.equal(inputs, alone.inputs[0])
    plain = next(iter(images.batches([np.array(WIDE)], None, CPU))).inputs
    mean, std = (torch.tensor(v)[:, None, None] for v in (images.mean, images.std))
    steps = (plain * std + mean) * 255
    assert (steps - steps.round()).abs().max() > 0.1
    images.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_inputs_are_those_of_the_preprocessing(workers: int, root: Path) -> None:
    plain = images_in(root).preprocessing
    variants = [plain, replace(plain, channels=1, mean=(0.4,), std=(0.3,), resize=None)]
    for preprocessing in variants:
        images = images_in(root, workers).prepared_as(preprocessing)
        (batch,) = images.batches([np.arange(COUNT)], None, CPU)
        for number, inputs in enumerate(batch.inputs):
            image = decode(root / f"{number}.img", preprocessing.reading).pixels
            assert torch.equal(inputs, preprocessing.prepare(image))
            assert torch.equal(inputs, preprocessing.apply(root / f"{number}.img"))
        images.close()


def test_the_transforms_of_torchvision_are_met(root: Path) -> None:
    """The same parameters in torchvision's transforms of Pillow images give nearly the same inputs."""
    from torchvision.transforms.v2 import functional

    images = images_in(root)
    preparation = images.preparation
    order = np.array([number for number in range(COUNT) if number not in WIDE])
    (batch,) = images.batches([order], Draw(2, 3), CPU)
    seeds = Draw(2, 3).seeds([order])[0]
    crop, (_, jitter) = preparation.per_image(), preparation.per_batch().parts
    assert isinstance(jitter, ColorJitter)
    flips = seeds.spawn(0).uniform(1)[:, 0] < 0.5
    factors, operations = jitter.sample(seeds.spawn(1))
    adjust = (
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
    )
    mean, std = (torch.tensor(v)[:, None, None] for v in (images.mean, images.std))
    assert 0 < flips.sum() < len(flips)
    for row, number in enumerate(order.tolist()):
        image = Image.open(root / f"{number}.img").convert("RGB")
        box = crop.box(seeds.take(row), image.height, image.width)
        image = functional.resized_crop(image, *box, [17, 17])
        image = functional.horizontal_flip(image) if flips[row] else image
        for factor, operation in zip(factors[row], operations[row], strict=True):
            image = adjust[operation](image, float(factor))
        found = (batch.inputs[row] * std + mean) * 255
        difference = (found - functional.pil_to_tensor(image)).abs()
        # Resized pixels differ by at most 1, which the jitter may double, and each step rounds down.
        assert difference.max() < 4.1
        assert difference.mean() < 0.6


class Pictures(Dataset[Any]):
    """Items that are bytes, Pillow images, arrays or floats."""

    def __init__(self, kind: str) -> None:
        rng = np.random.default_rng(2)
        self.pixels = rng.integers(0, 256, (6, 5, 7, 3), dtype=np.uint8)
        self.kind = kind
        self.targets = [0, 1, 0, 1, 0, 0]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        pixels = self.pixels[index]
        tensor = torch.from_numpy(pixels).permute(2, 0, 1)
        forms = {
            "array": pixels,
            "picture": Image.fromarray(pixels),
            "bytes": tensor,
            "floats": tensor.float() / 255,
        }
        return forms[self.kind], self.targets[index]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["array", "picture", "bytes", "floats"])
def test_datasets_of_bytes_and_floats(kind: str, workers: int) -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
    dataset = Pictures(kind)
    data = from_datasets(
        "pictures", dataset, dataset, mean=mean, std=std, workers=workers, augmentation=noisy
    )
    raw = torch.from_numpy(dataset.pixels).permute(0, 3, 1, 2).float() / 255
    m, s = (torch.tensor(v)[:, None, None] for v in (mean, std))
    (clean,) = data.test.batches([np.arange(6)], None, CPU)
    assert torch.equal(clean.inputs, (raw - m) / s)
    order = [np.array([0, 3, 3]), np.array([5])]
    first, last = data.train.batches(order, Draw(0, 1), CPU)
    added = first.inputs * s + m - raw[[0, 3, 3]]
    assert not torch.allclose(added[1], added[2], atol=1e-3)  # two occurrences
    (alone,) = data.train.batches([np.array([5])], Draw(0, 1), CPU)
    assert torch.equal(alone.inputs, last.inputs)
    data.close()


def noisy(image: Tensor) -> Tensor:
    return image + torch.rand(image.shape)


def saved(folder: Path, mode: str = "RGB", **options: Any) -> bytes:
    path = folder / "image.jpg"
    pixels = np.random.default_rng(3).integers(0, 256, (23, 31, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, format="JPEG", **options)
    return path.read_bytes()


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_files_that_torchcodec_and_pillow_decode_alike(tmp_path: Path) -> None:
    for options in ({}, {"progressive": True}, {"quality": 100, "subsampling": 0}, {"dpi": (9, 9)}):
        data = saved(tmp_path, **options)
        assert is_plain(data)
        assert read_header(data) == (23, 31, 3, False)
    assert is_plain(saved(tmp_path, "L"))
    assert not is_plain(saved(tmp_path, "CMYK"))
    assert not is_plain(saved(tmp_path, exif=rotated()))
    data = saved(tmp_path)
    frame = data.index(b"\xff\xc0")
    assert not is_plain(data[: frame + 4])
    assert not is_plain(data[:frame] + b"\xff\xc3" + data[frame + 2 :])  # lossless
    assert not is_plain(data[: frame + 4] + b"\x0c" + data[frame + 5 :])  # 12 bits
    assert not is_plain(data[: frame + 5] + b"\xff" * 4 + data[frame + 9 :])  # 65535 x 65535
    assert not is_plain(data[: frame + 5] + b"\0\0" + data[frame + 7 :])
    for other in (b"", b"\xff\xd8\xff", b"\x89PNG" + bytes(40), b"\xff\xd8\xff" + bytes(40)):
        assert not is_plain(other)
    assert not is_plain(b"\xff\xd8\xff\xe0\0\0" * 20)  # segments of no length


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Replace TorchCodec by a function that returns zeros, and records what it is given."""
    given: list[bytes] = []

    def decoder(data: bytes) -> Tensor:
        given.append(data)
        if len(data) < 600:
            raise RuntimeError("Image is incomplete or truncated.")
        return torch.zeros(3, 23, 31, dtype=torch.uint8)

    monkeypatch.setattr(jpeg_file, "torchcodec_decoder", lambda: decoder)
    return given


def test_pillow_decodes_what_torchcodec_does_not(tmp_path: Path, decoded: list[bytes]) -> None:
    path = tmp_path / "image.jpg"
    data = saved(tmp_path)
    pixels = decode_fast(path, Reading())
    assert isinstance(pixels, Tensor)
    assert decoded == [data]
    saved(tmp_path, exif=rotated())
    turned = [decode_fast(path, Reading(exif)) for exif in ("transpose", "ignore")]
    assert [image.size for image in turned] == [(23, 31), (31, 23)]
    assert len(decoded) == 1
    path.write_bytes(data[:500])
    with pytest.raises(OSError, match=r"(?i)truncated"):
        decode_fast(path, Reading())
    assert len(decoded) == 2
    with pytest.raises(OSError, match="No such file"):
        decode_fast(tmp_path / "gone.jpg", Reading())


@pytest.mark.parametrize("version", ["0.15.2", "0.9", "nightly"])
def test_an_old_or_broken_torchcodec_is_not_used(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version)
    monkeypatch.setattr(jpeg_file, "import_module", lambda name: pytest.fail("it was imported"))
    assert torchcodec_decoder.__wrapped__() is None
    monkeypatch.setattr(metadata, "version", lambda name: "0.16.1+cpu")

    def broken(name: str) -> Any:
        raise OSError("undefined symbol")

    monkeypatch.setattr(jpeg_file, "import_module", broken)
    assert torchcodec_decoder.__wrapped__() is None


@pytest.mark.skipif(torchcodec_decoder() is None, reason="needs TorchCodec 0.16 or newer")
def test_torchcodec_gives_the_pixels_of_pillow(tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    for mode in ("RGB", "L"):
        for options in ({}, {"progressive": True}, {"quality": 100, "subsampling": 0}):
            data = saved(tmp_path, mode, **options)
            found = decode_plain(path)
            assert found is not None
            expected = decode(path, Reading()).pixels
            assert torch.equal(found, torch.from_numpy(np.array(expected)).permute(2, 0, 1))
            path.write_bytes(data[: len(data) // 2])
            assert decode_plain(path) is None
