"""``randaugment``: RandAugment in addition to the data set's own augmentation.

Cubuk, Zoph, Shlens and Le, "RandAugment: Practical automated data augmentation with a reduced search space"
(NeurIPS 2020), as in torchvision.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastsam.extras import requires_extra
from fastsam.longtail.data.augmentations.base import (
    AugmentationPart,
    Frame,
    Steps,
    register_augmentation,
    with_transform,
)
from fastsam.longtail.data.worker_count import WorkerSettings
from fastsam.longtail.settings import setting


@dataclass(frozen=True, kw_only=True)
class RandAugmentSettings(WorkerSettings):
    """Settings of RandAugment."""

    randaugment_operations: int = setting(
        "number of operations of RandAugment on each image", default=2, low=1, high=14
    )
    randaugment_magnitude: int = setting(
        "strength of the operations of RandAugment, of 31 levels from 0", default=9, low=0, high=30
    )


def _build(settings: RandAugmentSettings, default: Steps, frame: Frame) -> Steps:
    with requires_extra("longtail", "augmentation randaugment"):
        from torchvision.transforms import v2

    transform = v2.RandAugment(settings.randaugment_operations, settings.randaugment_magnitude)
    return with_transform(default, transform)


register_augmentation(
    AugmentationPart(
        name="randaugment",
        summary="RandAugment of torchvision, in addition to the data set's own augmentation",
        build=_build,
        settings=RandAugmentSettings,
    )
)
