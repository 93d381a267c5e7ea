"""``resized-crop``: a random part of the image, resized, and horizontal flips."""

from __future__ import annotations

from dataclasses import dataclass

from fastsam.longtail.data.augment import RandomHorizontalFlip
from fastsam.longtail.data.augmentations.base import (
    AugmentationPart,
    Frame,
    Steps,
    register_augmentation,
)
from fastsam.longtail.data.resized_crop import RandomResizedCrop
from fastsam.longtail.data.worker_count import WorkerSettings
from fastsam.longtail.settings import setting


@dataclass(frozen=True, kw_only=True)
class ResizedCropSettings(WorkerSettings):
    """Settings of the random resized crop."""

    crop_area: float = setting(
        "smallest area of the random resized crop, as a fraction of the image",
        default=0.08,
        above=0,
        high=1,
    )


def resized_crop(frame: Frame, area: float) -> Steps:
    """Return the steps of a random resized crop and flips.

    Args:
        frame: size of the network's input.
        area: smallest area of the crop, as a fraction of the image.
    """
    height, width = frame.size
    size = height if height == width else (height, width)
    return Steps(RandomResizedCrop(size, scale=(area, 1.0)), per_batch=RandomHorizontalFlip())


register_augmentation(
    AugmentationPart(
        name="resized-crop",
        summary="a random part of the image, resized, and horizontal flips",
        build=lambda settings, default, frame: resized_crop(frame, settings.crop_area),
        settings=ResizedCropSettings,
    )
)
