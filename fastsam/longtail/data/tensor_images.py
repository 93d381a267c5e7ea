"""Images in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from fastsam.longtail.data.augment import BatchAugmentation
from fastsam.longtail.data.augmentations.base import Frame, Policy, Steps
from fastsam.longtail.data.batch import Batch, Draw
from fastsam.longtail.data.content import content_hash
from fastsam.longtail.data.decoded import DecodedImages
from fastsam.longtail.data.device_part import DevicePart
from fastsam.longtail.data.items import ItemReader, read_items
from fastsam.longtail.data.normalization import Normalization
from fastsam.longtail.data.preprocessing import CHANNELS, Preprocessing
from fastsam.longtail.data.workers import Workers
from fastsam.longtail.errors import UsageError
from fastsam.upload import upload


@dataclass(eq=False)
class TensorImages(DecodedImages):
    """Images in memory, augmented in whole batches on the device.

    The images are copied to a device when they are first read on it, and the last copy is kept. Later
    reads do not synchronize with the device.

    Attributes:
        images: raw pixels, uint8 ``[N, C, H, W]``. Do not modify them in place; assign a new tensor.
        targets: classes, int64 ``[N]``.
        white: pixel value that is scaled to 1 before normalization (255, or 16 for the 8x8 digits).
        mean: mean of each channel after scaling.
        std: standard deviation of each channel after scaling.
        augmentation: training augmentation; None for images that are only evaluated.
        steps: augmentation that replaces it.
        workers: number of worker processes for steps on single images; 0 makes them in this process.
    """

    images: Tensor
    targets: NDArray[np.int64]
    white: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: BatchAugmentation | None = None
    steps: Steps | None = None
    workers: int = 0
    _copy: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False)
    """The images that were copied last, and their copy on another device."""
    _readers: tuple[Tensor, Workers] | None = field(default=None, init=False, repr=False)
    """The images that were read last by workers, and these workers."""

    @property
    def channels(self) -> int:
        """See :meth:`Images.channels`."""
        return self.images.shape[1]

    @property
    def frame(self) -> Frame:
        """See :meth:`fastsam.longtail.data.Images.frame`."""
        height, width = self.images.shape[-2:]
        return Frame((height, width), len(self))

    @property
    def preprocessing(self) -> Preprocessing | None:
        """Preprocessing that resizes files of any size to the size of these images.

        White in a file is scaled to 1, like ``white`` here. See :meth:`Images.preprocessing`.
        """
        _, channels, height, width = self.images.shape
        if channels not in CHANNELS:
            return None
        return Preprocessing((height, width), channels, tuple(self.mean), tuple(self.std))

    def __len__(self) -> int:
        return len(self.targets)

    def select(
        self, indices: NDArray[np.int64], *, augmentation: BatchAugmentation | None = None
    ) -> TensorImages:
        """Return the images at ``indices`` (int64), with the given augmentation."""
        images = self.images[torch.from_numpy(indices)]
        return TensorImages(
            images, self.targets[indices], self.white, self.mean, self.std, augmentation
        )

    def batches(
        self,
        order: Sequence[NDArray[np.int64]],
        draw: Draw | None,
        device: torch.device,
        *,
        may_be_empty: bool = False,
    ) -> Iterator[Batch]:
        """See :meth:`Images.batches`."""
        if draw is not None and self.augmentation is None and self.steps is None:
            raise UsageError(
                "these images have no augmentation, only training images do; "
                "pass draw=None, or --augment none"
            )
        steps = self._steps
        normalization = Normalization(tuple(self.mean), tuple(self.std), self.white)
        if draw is not None and (steps.crop is not None or steps.per_image is not None):
            part = DevicePart(normalization, steps.per_batch)
            yield from read_items(self._workers, part, order, draw, device)
            return
        images = self._on(device)
        normalize = normalization.on(device)
        seeds = None if draw is None else draw.seeds(order)
        # One upload for all batches.
        sizes = [len(chosen) for chosen in order]
        samples = np.concatenate([np.empty(0, np.int64), *order])
        every = torch.split(upload(torch.from_numpy(samples), device), sizes)
        targets = torch.split(upload(torch.from_numpy(self.targets[samples]), device), sizes)
        for number, indices in enumerate(every):
            raw = images[indices]
            if seeds is not None and steps.per_batch is not None:
                raw = steps.per_batch(raw, seeds[number])
            yield Batch((normalize(raw),), targets[number], indices)

    def prepared_as(self, preprocessing: Preprocessing) -> TensorImages:
        """See :meth:`Images.prepared_as`."""
        preprocessing.check_size(self.images.shape[-2], self.images.shape[-1])
        return replace(self, mean=preprocessing.mean, std=preprocessing.std)

    def augmented(self, policy: Policy, *, workers: int = 0) -> TensorImages:
        """See :meth:`Images.augmented`."""
        steps = policy(Steps(per_batch=self.augmentation), self.frame)
        if steps == self._steps and workers == self.workers:
            return self  # with its copy on the device
        return replace(self, steps=steps, workers=workers)

    def normalized(self, mean: tuple[float, ...], std: tuple[float, ...]) -> TensorImages:
        """See :meth:`Images.normalized`."""
        return replace(self, mean=mean, std=std)

    def close(self) -> None:
        """See :meth:`Images.close`."""
        if self._readers is not None:
            self._readers[1].close()

    def digests(
        self, places: Sequence[int] | None = None, *, whole: bool = False, progress: bool = False
    ) -> list[bytes]:
        """Return digests of all pixels; ``whole`` is ignored. See :meth:`Images.digests`."""
        pixels = self.images.cpu().contiguous().numpy()
        chosen = range(len(pixels)) if places is None else places
        return [hashlib.sha256(pixels[place].data).digest() for place in chosen]

    def content(self, *, progress: bool = False) -> str:
        """See :meth:`Images.content`."""
        return content_hash(self.digests(), self.targets)

    def _on(self, device: torch.device) -> Tensor:
        """Return the images on ``device``."""
        device = torch.empty(0, device=device).device  # resolves "cuda" to "cuda:0" or similar
        if self.images.device == device:
            return self.images
        if self._copy is None or self._copy[0] is not self.images or self._copy[1].device != device:
            self._copy = (self.images, self.images.to(device))
        return self._copy[1]

    @property
    def _steps(self) -> Steps:
        return self.steps or Steps(per_batch=self.augmentation)

    @property
    def _workers(self) -> Workers:
        if self._readers is None or self._readers[0] is not self.images:
            self.close()
            reader = ItemReader(_Items(self.images.cpu(), self.white), self.targets, self._steps)
            self._readers = (self.images, Workers(reader, self.workers))
        return self._readers[1]


@dataclass(frozen=True)
class _Items(Dataset[tuple[Tensor]]):
    """Images in memory as a dataset: uint8 with white 255, else float32 in [0, 1]."""

    images: Tensor
    white: float

    def __getitem__(self, place: int) -> tuple[Tensor]:
        pixels = self.images[place]
        return (pixels if self.white == 255 else pixels.float() / self.white,)
