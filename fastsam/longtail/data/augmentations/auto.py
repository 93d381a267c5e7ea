"""``auto``: an augmentation chosen by the size and the number of the training images."""

from __future__ import annotations

from fastsam.longtail.data.augment import shift_and_flip
from fastsam.longtail.data.augmentations.base import (
    AugmentationPart,
    Frame,
    Steps,
    register_augmentation,
)
from fastsam.longtail.data.augmentations.resized_crop import resized_crop
from fastsam.longtail.data.worker_count import WorkerSettings

SMALL = 64
"""Largest size in pixels of images that are only shifted and flipped."""
MANY = 10_000
"""Number of images from which the data set's own augmentation is used."""
AREA = 0.35
"""Smallest area of the random resized crop of few images."""


def _build(settings: WorkerSettings, default: Steps, frame: Frame) -> Steps:
    if max(frame.size) <= SMALL:
        return Steps(per_batch=shift_and_flip(frame.size))
    return default if frame.count >= MANY else resized_crop(frame, AREA)


def _chosen(frame: Frame) -> str:
    height, width = frame.size
    seen = f"{frame.count:,} training images of {height}x{width} pixels"
    if max(frame.size) <= SMALL:
        return f"crop-flip, for {seen} (at most {SMALL})"
    if frame.count >= MANY:
        return f"default, for {seen}"
    return f"resized-crop with crop_area {AREA}, for {seen} (fewer than {MANY:,})"


register_augmentation(
    AugmentationPart(
        name="auto",
        summary=f"crop-flip for images of at most {SMALL} pixels, resized-crop for fewer than {MANY:,} "
        "images, else default",
        build=_build,
        settings=WorkerSettings,
        chosen=_chosen,
    )
)
