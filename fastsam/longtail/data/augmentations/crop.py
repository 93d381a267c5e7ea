"""``crop``: shifts by up to an eighth of the size, for images whose left and right differ in meaning."""

from fastsam.longtail.data.augment import shift
from fastsam.longtail.data.augmentations.base import (
    AugmentationPart,
    Steps,
    register_augmentation,
)

register_augmentation(
    AugmentationPart(
        name="crop",
        summary="shifts by up to an eighth of the size; no flips",
        build=lambda settings, default, frame: Steps(per_batch=shift(frame.size)),
    )
)
