"""``crop-flip``: shifts by up to an eighth of the size, and horizontal flips, as for CIFAR."""

from fastsam.longtail.data.augment import shift_and_flip
from fastsam.longtail.data.augmentations.base import (
    AugmentationPart,
    Steps,
    register_augmentation,
)

register_augmentation(
    AugmentationPart(
        name="crop-flip",
        summary="shifts by up to an eighth of the size, and horizontal flips",
        build=lambda settings, default, frame: Steps(per_batch=shift_and_flip(frame.size)),
    )
)
