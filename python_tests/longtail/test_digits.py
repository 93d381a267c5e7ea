"""digits-lt and the batches read from it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch

from fastsam.longtail import Trainer, recipe
from fastsam.longtail.data import Draw, Images, TensorImages, load_dataset, load_digits_lt
from fastsam.longtail.data.augment import Compose, RandomCrop, RandomHorizontalFlip
from fastsam.longtail.data.sheet import pictures
from fastsam.longtail.errors import UsageError
from fastsam.longtail.seeds import SampleSeeds

CPU = torch.device("cpu")


def keys(images: Images) -> list[bytes]:
    assert isinstance(images, TensorImages)
    return [image.numpy().tobytes() for image in images.images]


@pytest.mark.parametrize(("imbalance", "kind"), [(1, "exp"), (50, "exp"), (100, "step")])
def test_sizes(imbalance: float, kind: str) -> None:
    data = load_digits_lt(imbalance=imbalance, kind=kind)  # type: ignore[arg-type]
    assert data.counts[0] == 100
    assert data.counts[-1] == 100 // imbalance
    assert data.validation is not None
    assert np.bincount(data.validation.targets).tolist() == [24] * 10
    assert np.bincount(data.test.targets).tolist() == [54, 58, 53, 59, 57, 58, 57, 55, 50, 56]


def test_validation_and_test_do_not_depend_on_the_imbalance() -> None:
    few, many = load_digits_lt(imbalance=50), load_digits_lt(imbalance=1, kind="step")
    assert keys(few.test) == keys(many.test)
    assert few.validation is not None
    assert many.validation is not None
    assert keys(few.validation) == keys(many.validation)
    assert set(keys(few.train)) <= set(keys(many.train))


def test_no_image_is_in_two_parts() -> None:
    data = load_digits_lt(imbalance=1, subset_seed=5)
    assert data.validation is not None
    everything = keys(data.train) + keys(data.validation) + keys(data.test)
    assert len(everything) == 1797
    # A few digits are identical; a shared image would appear more often.
    assert len(set(everything)) >= 1790


def test_subset_seed_changes_the_subset_and_its_hash() -> None:
    first, second = load_digits_lt(), load_digits_lt(subset_seed=1)
    assert first.subset_hash != second.subset_hash
    assert first.subset_hash == load_digits_lt().subset_hash
    assert keys(first.test) != keys(second.test)


def test_groups() -> None:
    assert load_digits_lt().groups == {"head": (0, 1, 2), "mid": (3, 4, 5, 6), "tail": (7, 8, 9)}
    step = load_digits_lt(imbalance=10, kind="step").groups
    assert step == {"head": (0, 1, 2, 3, 4), "mid": (), "tail": (5, 6, 7, 8, 9)}


def test_unknown_names_list_the_valid_ones() -> None:
    with pytest.raises(UsageError, match="digits-lt"):
        load_dataset("digit")
    with pytest.raises(UsageError, match="train, validation, test"):
        load_digits_lt().split("val")


def test_plain_batches_are_the_normalised_images() -> None:
    data = load_digits_lt()
    order = [np.array([5, 0, 5]), np.array([200])]
    first, second = data.train.batches(order, None, CPU)
    assert first.inputs.shape == (3, 1, 8, 8)
    assert torch.equal(first.inputs[0], first.inputs[2])
    assert first.targets.tolist() == data.train.targets[[5, 0, 5]].tolist()
    assert second.indices.tolist() == [200]
    assert isinstance(data.train, TensorImages)
    raw = data.train.images[200].float() / 16
    assert torch.allclose(second.inputs[0] * 0.3760 + 0.3053, raw, atol=1e-6)


def test_augmentation_depends_on_seed_and_epoch_only() -> None:
    data = load_digits_lt()
    order = [np.arange(50), np.arange(50)]

    def read(seed: int, epoch: int) -> list[torch.Tensor]:
        batches = data.train.batches(order, Draw(seed, epoch), CPU)
        return [batch.inputs for batch in batches]

    state = torch.random.get_rng_state()
    a, again = read(1, 1), read(1, 1)
    assert all(torch.equal(x, y) for x, y in zip(a, again, strict=True))
    assert torch.equal(state, torch.random.get_rng_state())
    for other in (read(2, 1), read(1, 2)):
        assert not torch.equal(a[0], other[0])
    assert not torch.equal(a[0], a[1])


def test_evaluation_sets_refuse_augmentation() -> None:
    batches = load_digits_lt().test.batches([np.arange(2)], Draw(0, 0), CPU)
    with pytest.raises(UsageError, match="augment"):
        next(iter(batches))


def seeds_of(count: int) -> SampleSeeds:
    return Draw(0, 1).seeds([np.arange(count)])[0]


def test_crops_are_windows_of_the_padded_image_and_all_occur() -> None:
    image = torch.arange(1, 31).reshape(1, 2, 3, 5).to(torch.uint8)
    padded = torch.nn.functional.pad(image[0], (2, 2, 2, 2))
    windows = {
        padded[:, y : y + 3, x : x + 5].numpy().tobytes() for y in range(5) for x in range(5)
    }
    crops = RandomCrop(2)(image.expand(600, -1, -1, -1), seeds_of(600))
    assert crops.shape == (600, 2, 3, 5)
    assert {crop.numpy().tobytes() for crop in crops} == windows


def test_flips_are_mirror_images_half_of_the_time() -> None:
    image = torch.rand(1, 3, 4, 6)
    flipped = Compose((RandomHorizontalFlip(),))(image.expand(400, -1, -1, -1), seeds_of(400))
    mirrored = sum(torch.equal(x, image[0].flip(-1)) for x in flipped)
    unchanged = sum(torch.equal(x, image[0]) for x in flipped)
    assert mirrored + unchanged == 400
    assert abs(mirrored - 200) < 60


class Counted:
    """A custom implementation of Images, with one unreadable image."""

    def __init__(self, images: Images) -> None:
        self.images = images
        self.unreadable = {"lost.png": 2}
        self.closed = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.images, name)

    def __len__(self) -> int:
        return len(self.images)

    def for_run(self) -> Counted:
        return self

    def augmented(self, *arguments: Any, **options: Any) -> Counted:
        return self

    def close(self) -> None:
        self.closed += 1


def test_images_of_any_kind_are_trained_on_and_shown() -> None:
    data = load_digits_lt()
    counted = Counted(data.train)
    config = recipe("digits-lt", "ce", "sgd", epochs=1).config()
    run = Trainer(config, data=replace(data, train=cast(Images, counted)), progress=False)
    assert run.fit().unreadable == {"lost.png": 2}
    assert counted.closed == 1
    chosen = np.arange(3)
    shown = pictures(cast(Images, counted), chosen)
    assert (shown == pictures(data.train, chosen)).all()
