"""Cuts labeled images to a long tail, after holding out validation images.

Counts and selection are those of Cao et al. (NeurIPS 2019); see :mod:`fastsam.longtail.data.subset`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsam.longtail.data.augment import BatchAugmentation, shift, shift_and_flip
from fastsam.longtail.data.catalog import ImbalanceSettings
from fastsam.longtail.data.dataset import LongTailData
from fastsam.longtail.data.groups import groups_by_rank
from fastsam.longtail.data.label_noise import with_label_noise
from fastsam.longtail.data.subset import (
    ImbalanceKind,
    longtail_counts,
    longtail_indices,
    shuffled_by_class,
    subset_hash,
)
from fastsam.longtail.data.tensor_images import TensorImages
from fastsam.longtail.errors import UsageError
from fastsam.longtail.settings import setting

NATURAL = "natural"
FEWEST = 5
"""Smallest number of validation images per class for choosing settings."""
_LARGEST_SEED = 2**32 - 1

Normalization = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel of pixels in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class CutSettings(ImbalanceSettings):
    """Settings of the split into training and validation images, and of the cut."""

    n_max: int | None = setting(
        "number of training images of the largest class",
        low=1,
        optional=True,
        default_text="size of the smallest class of the original data set, after validation images are held "
        "out",
    )
    validation_per_class: int = setting(
        "number of images per class held out for validation before the long tail is cut; 0 for no "
        f"validation set, else at least {FEWEST}",
        default=0,
        before=0,
        low=0,
    )
    validation_seed: int = setting(
        "seed of the choice of validation images", default=0, before=0, low=0, high=_LARGEST_SEED
    )
    class_order: str = setting(
        "order of classes from the largest to the smallest: natural (order of the data set), a seed that "
        "shuffles them, or all labels as c0,c1,...",
        default=NATURAL,
        before=NATURAL,
    )

    def check(self, run: Mapping[str, Any]) -> None:
        """Check the number of validation images and the form of the class order."""
        super().check(run)
        if 0 < self.validation_per_class < FEWEST:
            raise UsageError(
                f"validation_per_class must be at least {FEWEST}, or 0 for no validation set, got "
                f"{self.validation_per_class}"
            )
        self._listed_order()

    def ordered_classes(self, num_classes: int) -> NDArray[np.int64]:
        """Return the labels of the classes from the largest to the smallest, int64 ``[C]``.

        Raises:
            UsageError: if the order does not contain every class once.
        """
        listed = self._listed_order()
        if self.class_order == NATURAL:
            return np.arange(num_classes)
        if len(listed) == 1:
            shuffled = np.random.RandomState(listed[0]).permutation(num_classes)
            return shuffled.astype(np.int64)
        if sorted(listed) != list(range(num_classes)):
            raise UsageError(
                f"class_order must contain each label from 0 to {num_classes - 1} once, got "
                f"{self.class_order!r:.80}"
            )
        return np.array(listed, dtype=np.int64)

    def _listed_order(self) -> list[int]:
        """Return the numbers in ``class_order``: none for the natural order, a single one for a seed."""
        parts = [] if self.class_order == NATURAL else self.class_order.split(",")
        digits = (part for part in parts if part.isascii() and part.isdigit() and len(part) < 11)
        numbers = [int(part) for part in digits]
        if len(numbers) < len(parts) or (len(numbers) == 1 and numbers[0] > _LARGEST_SEED):
            raise UsageError(
                f"class_order must be {NATURAL}, a seed of at most {_LARGEST_SEED}, or all labels as "
                f"c0,c1,..., got {self.class_order!r:.80}"
            )
        return numbers


@dataclass(frozen=True, eq=False)
class LabeledPixels:
    """Images of equal size, with their classes.

    Attributes:
        pixels: uint8 ``[N, C, H, W]``.
        targets: classes, int64 ``[N]``.
    """

    pixels: Tensor
    targets: NDArray[np.int64]

    def select(self, indices: NDArray[np.int64]) -> LabeledPixels:
        """Return the images at ``indices``, int64 ``[n]``."""
        return LabeledPixels(self.pixels[torch.from_numpy(indices)], self.targets[indices])


def cut_to_long_tail(
    name: str,
    class_names: tuple[str, ...],
    train: LabeledPixels,
    test: LabeledPixels,
    settings: CutSettings,
    *,
    normalization: Normalization | None = None,
    flips: bool = True,
) -> LongTailData:
    """Hold out validation images, then cut the remaining training images to a long tail.

    The validation images depend only on ``validation_per_class`` and ``validation_seed``; the test images
    depend on no setting. Classes are relabeled from the largest to the smallest. With 10 or 100 classes the
    groups are those of the paper (0-2, 3-6, 7-9 and 0-35, 36-70, 71-99). Other numbers of classes are split
    into thirds, and step profiles into halves.

    Args:
        name: name on the command line.
        class_names: one name per class, in the original order.
        train: training images.
        test: test images.
        settings: settings of the cut.
        normalization: mean and standard deviation of each channel; None to compute them from the selected
            training images.
        flips: whether the training augmentation includes horizontal flips. It always includes shifts by up to
            an eighth of the image size.

    Raises:
        UsageError: if the settings require more images than there are.
    """
    num_classes = len(class_names)
    validation, pool = _held_out(train.targets, class_names, settings)
    classes = settings.ordered_classes(num_classes)
    ranks = np.argsort(classes)
    names = tuple(class_names[label] for label in classes)
    counts = _counts(
        np.bincount(ranks[train.targets[pool]], minlength=num_classes), names, settings
    )
    chosen = pool[longtail_indices(ranks[train.targets[pool]], counts, settings.subset_seed)]
    selected = train.select(chosen)
    mean, std = normalization or channel_statistics(selected.pixels)

    def ready(part: LabeledPixels, augmentation: BatchAugmentation | None = None) -> TensorImages:
        targets = ranks[part.targets]
        return TensorImages(part.pixels, targets, 255.0, mean, std, augmentation)

    height, width = train.pixels.shape[-2:]
    augmentation = shift_and_flip if flips else shift
    data = LongTailData(
        name=name,
        train=ready(selected, augmentation((height, width))),
        validation=ready(train.select(validation)) if len(validation) else None,
        test=ready(test),
        class_names=names,
        groups=groups_by_rank(num_classes, _boundaries(num_classes, settings.kind)),
        subset_hash=subset_hash(chosen),
    )
    return with_label_noise(data, settings.label_noise, settings.subset_seed)


def channel_statistics(pixels: Tensor) -> Normalization:
    """Compute mean and standard deviation of each channel, for pixels scaled to [0, 1].

    The result does not depend on the number of threads. A constant channel gets standard deviation 1.

    Args:
        pixels: uint8 ``[N, C, H, W]``.
    """
    values = np.arange(256) / 255
    means, deviations = [], []
    for channel in pixels.unbind(dim=1):
        shares = torch.bincount(channel.flatten(), minlength=256).numpy() / channel.numel()
        mean = float(shares @ values)
        means.append(mean)
        deviations.append(float(np.sqrt(shares @ (values - mean) ** 2)) or 1.0)
    return tuple(means), tuple(deviations)


def _held_out(
    targets: NDArray[np.int64], class_names: tuple[str, ...], settings: CutSettings
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the indices of the validation images, class by class, and of all others, ascending."""
    wanted = settings.validation_per_class
    order = shuffled_by_class(targets, len(class_names), settings.validation_seed)
    smallest = min(range(len(order)), key=lambda label: len(order[label]))
    if wanted >= len(order[smallest]):
        raise UsageError(
            f"validation_per_class must be at most {len(order[smallest]) - 1}, because class "
            f"{class_names[smallest]!r} has {len(order[smallest])} images and needs one for training, got "
            f"{wanted}"
        )
    validation = np.concatenate([indices[:wanted] for indices in order])
    return validation, np.setdiff1d(np.arange(len(targets)), validation)


def _counts(
    left: NDArray[np.int64], names: tuple[str, ...], settings: CutSettings
) -> NDArray[np.int64]:
    """Return the number of training images of each class; ``left`` are the available images."""
    n_max = int(left.min()) if settings.n_max is None else settings.n_max
    counts = longtail_counts(n_max, len(names), settings.imbalance, settings.kind)
    short = np.flatnonzero(counts > left)
    if len(short):
        held = settings.validation_per_class
        also = f" after holding out {held} for validation" if held else ""
        remedy = " or lower validation_per_class" if held else ""
        raise UsageError(
            f"n_max {n_max} requires {counts[short[0]]} training images of class "
            f"{names[short[0]]!r}, which has {left[short[0]]}{also}; lower n_max, to {left.min()} or less "
            f"for any imbalance{remedy}"
        )
    return counts


def _boundaries(num_classes: int, kind: ImbalanceKind) -> tuple[int, int]:
    """Return the first class of mid and the first class of tail."""
    if kind == "step":
        return num_classes // 2, num_classes // 2
    if num_classes == 100:
        return 36, 71
    third = max(1, num_classes // 3)
    return third, num_classes - third
