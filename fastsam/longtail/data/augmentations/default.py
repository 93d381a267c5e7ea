"""``default``: the augmentation that the data set defines."""

from fastsam.longtail.data.augmentations.base import AugmentationPart, register_augmentation

register_augmentation(
    AugmentationPart(
        name="default",
        summary="augmentation of the data set: its published one, or that of ImageNet for your own images",
        build=lambda settings, default, frame: default,
    )
)
