"""An augmentation as a plug-in: the data set's own augmentation, then a black square (Cutout)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fastsam.longtail.data.augment import Compose
from fastsam.longtail.data.augmentations import (
    AugmentationPart,
    Frame,
    Steps,
    register_augmentation,
)
from fastsam.longtail.seeds import SampleSeeds
from fastsam.longtail.settings import Settings, setting


@dataclass(frozen=True)
class Cutout:
    """Sets a square of each image to black, in whole batches on the device.

    DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout" (2017).
    """

    size: int

    def __call__(self, images: Tensor, seeds: SampleSeeds) -> Tensor:
        """Change images ``[B, C, H, W]``. The seed of an image decides where its square is."""
        height, width = images.shape[-2:]
        centers = (seeds.uniform(2) * (height, width)).astype(np.int64)
        row, column = torch.from_numpy(centers).to(images.device)[:, :, None].unbind(1)
        rows = self._inside(torch.arange(height, device=images.device) - row)
        columns = self._inside(torch.arange(width, device=images.device) - column)
        return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)

    def _inside(self, offsets: Tensor) -> Tensor:
        """Return whether places belong to the square, by their distance from its center."""
        first = -(self.size // 2)
        return (offsets >= first) & (offsets < first + self.size)


@dataclass(frozen=True, kw_only=True)
class CutoutSettings(Settings):
    """Settings of the augmentation."""

    cutout_size: int = setting("height and width of the black square in pixels", default=8, low=1)


def _build(settings: CutoutSettings, default: Steps, frame: Frame) -> Steps:
    cutout = Cutout(min(settings.cutout_size, *frame.size))
    own = () if default.per_batch is None else (default.per_batch,)
    return replace(default, per_batch=Compose((*own, cutout)))


register_augmentation(
    AugmentationPart(
        name="cutout",
        build=_build,
        settings=CutoutSettings,
        summary="the data set's own augmentation, then a black square",
    )
)
