"""Long-tailed data from any PyTorch datasets."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from fastsam.longtail.data.augmentations.base import Drawn, Frame, Policy, Steps
from fastsam.longtail.data.batch import Batch, Draw
from fastsam.longtail.data.content import content_hash
from fastsam.longtail.data.dataset import LongTailData
from fastsam.longtail.data.decoded import DecodedImages
from fastsam.longtail.data.device_part import DevicePart
from fastsam.longtail.data.groups import check_every_class, groups_by_count
from fastsam.longtail.data.items import ItemReader, as_image, as_pixels, read_items, refuse_random
from fastsam.longtail.data.normalization import Normalization, check_normalization
from fastsam.longtail.data.preprocessing import Preprocessing
from fastsam.longtail.data.workers import Workers
from fastsam.longtail.errors import DataError, UsageError

_COMPARED = 16
"""Number of items whose labels are compared with the attribute ``targets``."""

Augmentation = Callable[[Tensor], Tensor]
"""Maps an image ``[C, H, W]`` in [0, 1] to an augmented one, using torch's global CPU generator."""


def from_datasets(
    name: str,
    train: Dataset[Any],
    test: Dataset[Any],
    *,
    validation: Dataset[Any] | None = None,
    class_names: Sequence[str] | None = None,
    augmentation: Augmentation | None = None,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    workers: int = 0,
) -> LongTailData:
    """Create a data set from map-style datasets whose items are ``(image, label)``.

    Images are Pillow images, uint8 tensors or uint8 arrays, which are divided by 255, or float tensors, which
    are not scaled. All images must have the same size. Labels are integers from 0, and every class has a
    training image. Head, mid and tail are split by training count: more than 100, 20 to 100, and fewer than
    20 images.

    Items must be the same whenever they are read. Random transforms belong in ``augmentation``, where they
    depend on seed, epoch and image, so that a run can be repeated and resumed.

    Args:
        name: name of the data set.
        train: training images.
        test: test images.
        validation: validation images; None for no validation set.
        class_names: one name per class; None for ``train.classes`` if it exists and no ``target_transform``
            changes the labels, else the labels.
        augmentation: augmentation of training images. The same seed, epoch and image give the same result.
        mean: mean of each channel, or of all, which is subtracted from images.
        std: standard deviation of each channel, or of all, by which images minus ``mean`` are divided.
        workers: number of worker processes that read images; 0 reads in this process.

    Raises:
        DataError: if labels are not integers of at least 0, one for each image, or a class has no training
            image. If the attribute ``targets`` of a dataset differs from the labels of its items.
        UsageError: if ``mean`` and ``std`` do not fit the channels, or a deviation is not positive. If a
            dataset has a random transform.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> images, labels = torch.zeros(5, 1, 8, 8), torch.tensor([0, 0, 0, 1, 1])
        >>> both = TensorDataset(images, labels)
        >>> from_datasets("zeros", both, both).counts.tolist()
        [3, 2]
    """

    def images(dataset: Dataset[Any], own: Augmentation | None = None) -> DatasetImages:
        return DatasetImages(dataset, tuple(mean), tuple(std), own, workers)

    splits = {
        "train": images(train, augmentation or _unchanged),
        "validation": None if validation is None else images(validation),
        "test": images(test),
    }
    for split, part in splits.items():
        if part is not None and len(part):
            refuse_random(part.dataset, split)
    targets = splits["train"].targets  # type: ignore[union-attr]
    known = range(int(targets.max(initial=-1)) + 1)
    relabeled = getattr(train, "target_transform", None) is not None
    names = class_names or (None if relabeled else getattr(train, "classes", None)) or known
    names = tuple(str(item) for item in names)
    counts = np.bincount(targets, minlength=len(names))
    selection = hashlib.sha256(np.ascontiguousarray(targets, "<i8").tobytes())
    data = LongTailData(
        name=name,
        class_names=names,
        groups=groups_by_count(counts),
        subset_hash=selection.hexdigest(),
        **splits,  # type: ignore[arg-type]
    )
    check_every_class(data.counts, f"the training set of {name}")
    channels = data.train.channels
    of_channels = (
        values * channels if len(values) == 1 else values for values in (tuple(mean), tuple(std))
    )
    check_normalization(name, channels, *of_channels)
    return data


@dataclass(frozen=True, eq=False)
class DatasetImages(DecodedImages):
    """Adapter of a PyTorch dataset to :class:`~fastsam.longtail.data.Images`.

    Attributes:
        dataset: a map-style dataset; see :func:`from_datasets` for its items.
        mean: mean of each channel.
        std: standard deviation of each channel.
        augmentation: training augmentation; None for images that are only evaluated.
        workers: number of worker processes that read images; 0 reads in this process.
        steps: augmentation that replaces ``augmentation``.
        labels: classes that are known; None to find them in the dataset, which may decode every image.
    """

    dataset: Dataset[Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation | None = None
    workers: int = 0
    steps: Steps | None = None
    labels: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    @cached_property
    def targets(self) -> NDArray[np.int64]:
        """Classes, int64 ``[N]``: the labels of the items.

        They are read from the attribute ``targets``, which needs no image, if the dataset has it.

        Raises:
            DataError: if a label is not an integer of at least 0, their number is not that of the images, or
                ``targets`` differs from the labels of some items.
        """
        if self.labels is not None:
            return self.labels
        known = getattr(self.dataset, "targets", None)
        relabel = getattr(self.dataset, "target_transform", None)
        if known is not None and relabel is not None:
            known = [relabel(label) for label in np.asarray(known).tolist()]
        labels = np.asarray(
            [self.dataset[i][1] for i in range(len(self))] if known is None else known
        )
        if labels.ndim != 1 or labels.dtype.kind not in "iu" or (labels < 0).any():
            raise DataError(
                f"labels must be integers of at least 0, one for each image; got {labels.dtype} of "
                f"shape {labels.shape}"
            )
        if len(labels) != len(self):
            raise DataError(
                f"the dataset {type(self.dataset).__name__} has {len(self)} images, but its targets have "
                f"{len(labels)} labels; give each image one label"
            )
        if known is not None and len(self):
            self._compare(labels)
        return labels.astype(np.int64)

    def _compare(self, labels: NDArray[Any]) -> None:
        """Compare labels with those of some items, of which a wrapper may have changed either."""
        for place in np.unique(np.linspace(0, len(self) - 1, _COMPARED).astype(int)).tolist():
            found = self.dataset[place][1]
            if found != labels[place]:
                raise DataError(
                    f"item {place} of the dataset {type(self.dataset).__name__} has label {found}, but its "
                    f"attribute targets says {labels[place]}; give it the labels of the items"
                )

    @property
    def channels(self) -> int:
        """Number of channels of the first image."""
        return as_image(self.dataset[0][0]).shape[0]

    @property
    def frame(self) -> Frame:
        """See :meth:`fastsam.longtail.data.Images.frame`."""
        height, width = as_pixels(self.dataset[0][0]).shape[-2:]
        return Frame((height, width), len(self))

    def batches(
        self,
        order: Sequence[NDArray[np.int64]],
        draw: Draw | None,
        device: torch.device,
        *,
        may_be_empty: bool = False,
    ) -> Iterator[Batch]:
        """See :meth:`fastsam.longtail.data.Images.batches`."""
        if draw is not None and self.augmentation is None and self.steps is None:
            raise UsageError(
                "these images have no augmentation, only training images do; "
                "pass draw=None, or --augment none"
            )
        normalization = Normalization(tuple(self.mean), tuple(self.std))
        part = DevicePart(normalization, self._steps.per_batch)
        return read_items(self._workers, part, order, draw, device)

    def augmented(self, policy: Policy, *, workers: int = 0) -> DatasetImages:
        """See :meth:`fastsam.longtail.data.Images.augmented`."""
        steps = policy(replace(self, steps=None)._steps, self.frame)
        workers = self.workers or workers
        if steps == self._steps and workers == self.workers:
            return self
        return replace(self, steps=steps, workers=workers, labels=self.targets)

    def normalized(self, mean: tuple[float, ...], std: tuple[float, ...]) -> DatasetImages:
        """See :meth:`fastsam.longtail.data.Images.normalized`."""
        return replace(self, mean=mean, std=std, labels=self.targets)

    def prepared_as(self, preprocessing: Preprocessing) -> DatasetImages:
        """See :meth:`fastsam.longtail.data.Images.prepared_as`."""
        first = as_image(self.dataset[0][0])
        preprocessing.check_size(first.shape[-2], first.shape[-1])
        mean, std = preprocessing.mean, preprocessing.std
        return replace(self, mean=mean, std=std, labels=self.targets)

    def digests(
        self, places: Sequence[int] | None = None, *, whole: bool = False, progress: bool = False
    ) -> list[bytes]:
        """Return digests of all pixels; ``whole`` is ignored."""
        chosen = range(len(self)) if places is None else places
        images = (as_image(self.dataset[place][0]).contiguous().numpy() for place in chosen)
        return [hashlib.sha256(image.data).digest() for image in images]

    def content(self, *, progress: bool = False) -> str:
        """See :meth:`fastsam.longtail.data.Images.content`."""
        return content_hash(self.digests(progress=progress), self.targets)

    def close(self) -> None:
        """See :meth:`fastsam.longtail.data.Images.close`."""
        self._workers.close()

    @cached_property
    def _workers(self) -> Workers:
        return Workers(ItemReader(self.dataset, self.targets, self._steps), self.workers)

    @property
    def _steps(self) -> Steps:
        if self.steps is not None:
            return self.steps
        if self.augmentation is None or self.augmentation is _unchanged:
            return Steps()
        return Steps(per_image=Drawn(_Scaled(self.augmentation), stream=None))


@dataclass(frozen=True)
class _Scaled:
    """A transform of images in [0, 1]."""

    transform: Augmentation

    def __call__(self, pixels: Tensor) -> Tensor:
        return self.transform(as_image(pixels))


def _unchanged(image: Tensor) -> Tensor:
    return image
