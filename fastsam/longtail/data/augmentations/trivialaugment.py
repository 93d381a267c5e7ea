"""``trivialaugment``: TrivialAugment (wide) in addition to the data set's own augmentation.

Mueller and Hutter, "TrivialAugment: Tuning-free yet state-of-the-art data augmentation" (ICCV 2021), as in
torchvision.
"""

from __future__ import annotations

from fastsam.extras import requires_extra
from fastsam.longtail.data.augmentations.base import (
    AugmentationPart,
    Frame,
    Steps,
    register_augmentation,
    with_transform,
)
from fastsam.longtail.data.worker_count import WorkerSettings


def _build(settings: WorkerSettings, default: Steps, frame: Frame) -> Steps:
    with requires_extra("longtail", "augmentation trivialaugment"):
        from torchvision.transforms import v2

    return with_transform(default, v2.TrivialAugmentWide())


register_augmentation(
    AugmentationPart(
        name="trivialaugment",
        summary="TrivialAugment of torchvision, in addition to the data set's own augmentation",
        build=_build,
        settings=WorkerSettings,
    )
)
