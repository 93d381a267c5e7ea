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

from fastsam.longtail.data.batch import Batch, Draw
from fastsam.longtail.data.content import content_hash
from fastsam.longtail.data.dataset import DecodedImages, LongTailData
from fastsam.longtail.data.device_part import DevicePart
from fastsam.longtail.data.groups import groups_by_count
from fastsam.longtail.data.normalization import Normalization
from fastsam.longtail.data.preprocessing import Preprocessing
from fastsam.longtail.data.workers import ReadRequest, Request, Sample, Unreadable, Workers
from fastsam.longtail.errors import DataError, UsageError
from fastsam.longtail.seeds import global_seed

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
    are not scaled. All images must have the same size. Labels are integers from 0. Head, mid and tail are
    split by training count: more than 100, 20 to 100, and fewer than 20 images.

    Args:
        name: name of the data set.
        train: training images.
        test: test images.
        validation: validation images; None for no validation set.
        class_names: one name per class; None for ``train.classes`` if it exists, else the labels.
        augmentation: augmentation of training images. The same seed, epoch and image give the same result.
        mean: mean of each channel, which is subtracted from images.
        std: standard deviation of each channel, by which images minus ``mean`` are divided.
        workers: number of worker processes that read images; 0 reads in this process.

    Raises:
        DataError: if labels are not integers of at least 0.

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
    targets = splits["train"].targets  # type: ignore[union-attr]
    names = class_names or getattr(train, "classes", None) or range(int(targets.max()) + 1)
    names = tuple(str(item) for item in names)
    counts = np.bincount(targets, minlength=len(names))
    selection = hashlib.sha256(np.ascontiguousarray(targets, "<i8").tobytes())
    return LongTailData(
        name=name,
        class_names=names,
        groups=groups_by_count(counts),
        subset_hash=selection.hexdigest(),
        **splits,  # type: ignore[arg-type]
    )


@dataclass(frozen=True, eq=False)
class DatasetImages(DecodedImages):
    """Adapter of a PyTorch dataset to :class:`~fastsam.longtail.data.Images`.

    Attributes:
        dataset: a map-style dataset; see :func:`from_datasets` for its items.
        mean: mean of each channel.
        std: standard deviation of each channel.
        augmentation: training augmentation; None for images that are only evaluated.
        workers: number of worker processes that read images; 0 reads in this process.
    """

    dataset: Dataset[Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation | None = None
    workers: int = 0

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    @cached_property
    def targets(self) -> NDArray[np.int64]:
        """Classes, int64 ``[N]``: the dataset's ``targets`` if it has them, else the labels of its items.

        Raises:
            DataError: if a label is not an integer of at least 0.
        """
        known = getattr(self.dataset, "targets", None)
        labels = np.asarray(
            [self.dataset[i][1] for i in range(len(self))] if known is None else known
        )
        if labels.ndim != 1 or labels.dtype.kind not in "iu" or (labels < 0).any():
            raise DataError(
                f"labels must be integers of at least 0, one for each image; got {labels.dtype} of "
                f"shape {labels.shape}"
            )
        return labels.astype(np.int64)

    @property
    def channels(self) -> int:
        """Number of channels of the first image."""
        return as_image(self.dataset[0][0]).shape[0]

    def batches(
        self, order: Sequence[NDArray[np.int64]], draw: Draw | None, device: torch.device
    ) -> Iterator[Batch]:
        """See :meth:`fastsam.longtail.data.Images.batches`."""
        if draw is not None and self.augmentation is None:
            raise UsageError(
                "these images have no augmentation, only training images do; "
                "pass draw=None, or --augment none"
            )
        seeds = [None] * len(order) if draw is None else draw.seeds(order)
        requests = (Request(batch, keys) for batch, keys in zip(order, seeds, strict=True))
        finish = DevicePart(Normalization(tuple(self.mean), tuple(self.std))).on(device)
        for read in self._workers.read(requests, pin=device.type == "cuda"):
            batch = finish(read)
            if batch is not None:
                yield batch

    def prepared_as(self, preprocessing: Preprocessing) -> DatasetImages:
        """See :meth:`fastsam.longtail.data.Images.prepared_as`."""
        first = as_image(self.dataset[0][0])
        preprocessing.check_size(first.shape[-2], first.shape[-1])
        return replace(self, mean=preprocessing.mean, std=preprocessing.std)

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
        reader = _Reader(self.dataset, self.targets, self.augmentation)
        return Workers(reader, self.workers)


def as_image(item: Any) -> Tensor:
    """Convert an image to a float32 tensor ``[C, H, W]``; uint8 values are divided by 255."""
    pixels = as_pixels(item)
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels


def as_pixels(item: Any) -> Tensor:
    """Convert an image to a tensor ``[C, H, W]``: uint8 if it is, otherwise float32."""
    image = item if isinstance(item, Tensor) else torch.from_numpy(np.array(item))
    if not isinstance(item, Tensor):
        image = image[None] if image.ndim == 2 else image.permute(2, 0, 1)
    return image if image.dtype == torch.uint8 else image.float()


@dataclass(frozen=True)
class _Reader(Dataset[ReadRequest]):
    """Reads and augments images in the workers."""

    dataset: Dataset[Any]
    targets: NDArray[np.int64]
    augmentation: Augmentation | None

    def __getitem__(self, request: Request) -> ReadRequest:
        images: list[Sample | Unreadable] = []
        seeds = None
        if request.seeds is not None and self.augmentation is not _unchanged:
            seeds = (request.seeds.bits(1)[:, 0] >> np.uint64(1)).tolist()
        for row, place in enumerate(request.samples.tolist()):
            item = self.dataset[place][0]
            if seeds is None or self.augmentation is None:
                pixels = as_pixels(item)
            else:
                with global_seed(seeds[row]):
                    pixels = self.augmentation(as_image(item))
            images.append(Sample(pixels, int(self.targets[place]), place))
        return ReadRequest(images, request)


def _unchanged(image: Tensor) -> Tensor:
    return image
