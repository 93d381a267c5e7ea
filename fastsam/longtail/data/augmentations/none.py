"""``none``: training images are read as in evaluation."""

from fastsam.longtail.data.augmentations.base import AugmentationPart, register_augmentation

register_augmentation(
    AugmentationPart(
        name="none",
        summary="no augmentation",
        # `fastsam spectrum --augment K` still augments as the data set defines it.
        build=lambda settings, default, frame: default,
        draws=False,
    )
)
