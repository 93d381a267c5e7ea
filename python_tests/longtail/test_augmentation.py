"""Augmentation against torchvision: the same parameters, pixels and distributions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from fastsam.longtail.data import Draw
from fastsam.longtail.data.augment import Compose, RandomCrop, RandomHorizontalFlip
from fastsam.longtail.data.jitter import ColorJitter
from fastsam.longtail.data.resized_crop import RandomResizedCrop, cut
from fastsam.longtail.seeds import SampleSeeds

ADJUST = (
    functional.adjust_brightness,
    functional.adjust_contrast,
    functional.adjust_saturation,
)


def seeds_of(count: int, *, epoch: int = 1) -> SampleSeeds:
    return Draw(5, epoch).seeds([np.arange(count)])[0]


def noise(*shape: int, smooth: bool = False, seed: int = 0) -> Tensor:
    """Random bytes ``shape``; with ``smooth`` their neighbors are similar, as in a photograph."""
    rng = np.random.default_rng(seed)
    if not smooth:
        return torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))
    coarse = torch.from_numpy(rng.integers(0, 256, (*shape[:-2], 5, 6), dtype=np.uint8))
    large: Tensor = v2.Resize(list(shape[-2:]))(coarse).int()
    large += torch.from_numpy(rng.integers(-20, 21, shape))
    return large.clamp(0, 255).byte()


def picture(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def of(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


@pytest.mark.parametrize("strengths", [(0.4, 0.4, 0.4), (1.0, 0.0, 0.7), (0.0, 0.0, 0.0)])
def test_color_jitter_of_bytes_has_the_pixels_of_pillow(
    strengths: tuple[float, float, float],
) -> None:
    images = torch.cat([noise(30, 3, 13, 17), noise(30, 3, 13, 17, smooth=True)])
    images[0], images[1] = 0, 255
    jitter, seeds = ColorJitter(*strengths), seeds_of(60)
    factors, orders = jitter.sample(seeds)
    found = jitter(images, seeds)
    assert found.dtype == torch.uint8
    for image, own, order, result in zip(images, factors, orders, found, strict=True):
        assert sorted(order.tolist()) == [0, 1, 2]
        expected = picture(image)
        for factor, operation in zip(own.tolist(), order.tolist(), strict=True):
            expected = ADJUST[operation](expected, factor)
        assert torch.equal(result, of(expected))


def test_color_jitter_of_floats_agrees_with_torchvision() -> None:
    images = noise(40, 3, 9, 11, smooth=True).float() / 255
    jitter, seeds = ColorJitter(0.4, 0.4, 0.4), seeds_of(40)
    factors, orders = jitter.sample(seeds)
    found = jitter(images, seeds)
    for image, own, order, result in zip(images, factors, orders, found, strict=True):
        expected = image.double()
        for factor, operation in zip(own.tolist(), order.tolist(), strict=True):
            expected = ADJUST[operation](expected, factor)
        # torchvision rounds the weights of the three channels to four digits.
        torch.testing.assert_close(result.double(), expected, atol=2e-4, rtol=0)


def test_jitter_is_split_into_parts_that_fit_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    images, jitter, seeds = noise(7, 3, 5, 4), ColorJitter(0.3, 0.2, 0.1), seeds_of(7)
    whole = jitter(images, seeds)
    for size in (1, 121, 10_000):
        monkeypatch.setattr("fastsam.longtail.data.jitter._CHUNK", size)
        assert torch.equal(jitter(images, seeds), whole)
    assert jitter(images[:0], seeds.take(slice(0, 0))).shape == (0, 3, 5, 4)


def test_factors_and_orders_have_the_distribution_of_torchvision() -> None:
    factors, orders = ColorJitter(0.4, 0.1, 2.0).sample(seeds_of(12_000))
    kinds, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(kinds) == 6
    assert stats.chisquare(counts).pvalue > 1e-4
    official = v2.ColorJitter(0.4, 0.1, 2.0)
    for operation, name in enumerate(("brightness", "contrast", "saturation")):
        own = factors[orders == operation]
        low, high = getattr(official, name)
        spread = stats.uniform(low, high - low)
        assert stats.kstest(own, spread.cdf).pvalue > 1e-4


@pytest.mark.parametrize(("height", "width"), [(60, 80), (81, 33), (200, 40), (7, 5)])
def test_boxes_have_the_distribution_of_torchvision(height: int, width: int) -> None:
    count = 1500
    crop, image = RandomResizedCrop(224), torch.empty(3, height, width)
    official = v2.RandomResizedCrop(224)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = [official.make_params([image]) for _ in range(count)]
    seeds = seeds_of(count)
    ours = [crop.box(seeds.take(row), height, width) for row in range(count)]
    for name in ("top", "left", "height", "width"):
        samples = [getattr(box, name) for box in ours], [box[name] for box in theirs]
        assert stats.ks_2samp(*samples).pvalue > 1e-4
    assert all(0 <= box.top <= height - box.height for box in ours)
    assert all(0 <= box.left <= width - box.width for box in ours)


def test_areas_and_ratios_of_boxes() -> None:
    """Areas are uniform, and logarithms of ratios are, as torchvision documents its code."""
    crop, seeds = RandomResizedCrop(224, scale=(0.1, 0.3)), seeds_of(2000)
    boxes = [crop.box(seeds.take(row), 3000, 4000) for row in range(2000)]
    areas = np.array([box.height * box.width for box in boxes]) / (3000 * 4000)
    ratios = np.log([box.width / box.height for box in boxes])
    assert stats.kstest(areas, stats.uniform(0.1, 0.2).cdf).pvalue > 1e-4
    limit = np.log(4 / 3)
    assert stats.kstest(ratios, stats.uniform(-limit, 2 * limit).cdf).pvalue > 1e-4


@pytest.mark.parametrize("shape", [(1, 400), (400, 1), (1, 1), (3, 500), (500, 3)])
def test_images_in_which_no_box_fits(shape: tuple[int, int]) -> None:
    height, width = shape
    crop = RandomResizedCrop(8, scale=(1.0, 1.0))
    official = v2.RandomResizedCrop(8, scale=(1.0, 1.0))
    expected = official.make_params([torch.empty(3, height, width)])
    assert crop.box(seeds_of(1), height, width)._asdict() == expected
    assert crop(noise(3, height, width), seeds_of(1)).shape == (3, 8, 8)


@pytest.mark.parametrize("size", [16, 33, 224])
def test_resized_pixels_are_close_to_those_of_pillow(size: int) -> None:
    crop = RandomResizedCrop(size)
    for row in range(6):
        image = noise(3, 87, 131, smooth=row % 2 == 0, seed=row)
        seeds = seeds_of(6).take(row)
        top, left, height, width = crop.box(seeds, 87, 131)
        part = picture(image).crop((left, top, left + width, top + height))
        expected = of(part.resize((size, size), Image.Resampling.BILINEAR))
        for given in (image, picture(image), image.permute(1, 2, 0).contiguous().permute(2, 0, 1)):
            found = crop(given, seeds)
            assert found.dtype == torch.uint8
            assert (found.int() - expected.int()).abs().max() <= 1
        exact = crop(image.float() / 255, seeds)
        assert exact.dtype == torch.float32
        assert (exact * 255 - expected).abs().max() <= 1.01


def test_a_picture_and_a_tensor_are_cut_alike() -> None:
    image = noise(3, 20, 30)
    box = RandomResizedCrop(4).box(seeds_of(1), 20, 30)
    assert torch.equal(cut(picture(image), box), cut(image, box))


def test_an_image_is_augmented_alike_in_every_batch() -> None:
    images = noise(23, 3, 9, 12)
    augment = Compose((RandomCrop(2), RandomHorizontalFlip(), ColorJitter(0.4, 0.4, 0.4)))
    seeds = seeds_of(23)
    whole = augment(images, seeds)
    assert not torch.equal(whole, augment(images, seeds_of(23, epoch=2)))
    rows = np.random.default_rng(1).permutation(23)
    for part in np.array_split(rows, 4):
        assert torch.equal(augment(images[torch.from_numpy(part)], seeds.take(part)), whole[part])
