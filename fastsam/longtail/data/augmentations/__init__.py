"""Augmentation policies: how training images are changed at random. Each file defines one."""

from fastsam.longtail.data.augmentations.base import (
    AUGMENTATIONS,
    AugmentationPart,
    Drawn,
    Frame,
    Steps,
    register_augmentation,
    register_transform,
)

__all__ = [
    "AUGMENTATIONS",
    "AugmentationPart",
    "Drawn",
    "Frame",
    "Steps",
    "register_augmentation",
    "register_transform",
]
