"""Images read from files on CPU workers, and what happens when one cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsam.longtail.data.dataset import Batch
from fastsam.longtail.data.lists import ImageList
from fastsam.longtail.data.workers import Reader, Request, Unreadable, Workers
from fastsam.longtail.errors import DataError, UsageError, unknown
from fastsam.progress import ProgressBar
from fastsam.upload import upload

CORRUPT_POLICIES = ("stop", "skip")


@dataclass(frozen=True)
class Preparation:
    """How files become tensors.

    Attributes:
        size: height and width of the network's input.
        mean: mean of each channel.
        std: standard deviation of each channel.
        jitter: strength of brightness, contrast and saturation jitter in training.
    """

    size: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    jitter: float = 0.4

    def training(self) -> Callable[[Any], Tensor]:
        """Random resized crop, flip, colour jitter."""
        from torchvision.transforms import v2

        return self._finished(
            v2.RandomResizedCrop(self.size),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(self.jitter, self.jitter, self.jitter, 0.0),
        )

    def evaluation(self) -> Callable[[Any], Tensor]:
        """Resize to 256/224 of the size, centre crop."""
        from torchvision.transforms import v2

        return self._finished(v2.Resize(round(self.size * 256 / 224)), v2.CenterCrop(self.size))

    def _finished(self, *steps: Any) -> Callable[[Any], Tensor]:
        from torchvision.transforms import v2

        composed: Callable[[Any], Tensor] = v2.Compose(
            [
                *steps,
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(self.mean, self.std),
            ]
        )
        return composed


@dataclass(frozen=True, eq=False)
class FileImages:
    """A list of image files.

    An image's augmentation depends on seed, epoch and image alone, not on the number of workers.
    Workers live on from one reading to the next, and end with :meth:`close` or with this object.

    Attributes:
        root: folder that the paths are relative to.
        images: paths and classes.
        preparation: how files become tensors.
        workers: processes that read; 0 reads in this one.
        corrupt: ``stop`` ends the run at an image that cannot be read; ``skip`` leaves it out and
            counts it in ``unreadable``.
        unreadable: how often each unreadable image was met.

    Raises:
        UsageError: for an unknown ``corrupt`` or a negative number of workers.
    """

    root: Path
    images: ImageList
    preparation: Preparation
    workers: int = 0
    corrupt: str = "stop"
    unreadable: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.corrupt not in CORRUPT_POLICIES:
            raise unknown("corrupt", self.corrupt, CORRUPT_POLICIES)
        if self.workers < 0:
            raise UsageError(f"workers must be at least 0, got {self.workers}")

    @property
    def targets(self) -> NDArray[np.int64]:
        """Classes, int64 ``[N]``."""
        return self.images.targets

    @property
    def channels(self) -> int:
        """Images are read as RGB."""
        return 3

    @property
    def mean(self) -> tuple[float, ...]:
        """See :meth:`fastsam.longtail.data.Images.mean`."""
        return self.preparation.mean

    @property
    def std(self) -> tuple[float, ...]:
        """See :meth:`fastsam.longtail.data.Images.std`."""
        return self.preparation.std

    def __len__(self) -> int:
        return len(self.images)

    def batches(
        self,
        order: Sequence[NDArray[np.int64]],
        *,
        augment: bool,
        seed: int,
        epoch: int,
        device: torch.device,
    ) -> Iterator[Batch]:
        """See :meth:`fastsam.longtail.data.Images.batches`.

        Raises:
            DataError: at an unreadable image under ``stop``.
        """
        draw = (seed, epoch) if augment else None
        requests = (Request(batch, draw) for batch in order)
        for samples in self._workers.read(requests, pin=device.type == "cuda"):
            for image in samples.unreadable:
                self._note(image)
            if samples.read is not None:
                yield Batch(*(upload(tensor, device) for tensor in samples.read))

    def broken_files(self, *, progress: bool = False) -> list[str]:
        """See :meth:`fastsam.longtail.data.Images.broken_files`."""
        reader = Reader(self.root, self.images, plain=_nothing, augmented=_nothing)
        cuts = range(_DECODED_TOGETHER, len(self), _DECODED_TOGETHER)
        order = np.array_split(np.arange(len(self)), cuts)
        broken: list[str] = []
        with ProgressBar(
            total=len(self), description="decoding", unit="image", enabled=progress
        ) as bar:
            read = Workers(reader, self.workers).read(Request(batch) for batch in order)
            for batch, samples in zip(order, read, strict=True):
                broken += [image.path for image in samples.unreadable]
                bar.update(len(batch))
        return broken

    def for_run(self) -> FileImages:
        """See :meth:`fastsam.longtail.data.Images.for_run`."""
        return replace(self, unreadable={})

    def close(self) -> None:
        """See :meth:`fastsam.longtail.data.Images.close`."""
        self._workers.close()

    @cached_property
    def _workers(self) -> Workers:
        plain, augmented = self.preparation.evaluation(), self.preparation.training()
        return Workers(
            Reader(self.root, self.images, plain=plain, augmented=augmented), self.workers
        )

    def _note(self, sample: Unreadable) -> None:
        if self.corrupt == "stop":
            raise DataError(
                f"{self.root / sample.path} cannot be read ({sample.reason}); replace the file, or "
                "go on without such images with --corrupt skip"
            )
        self.unreadable[sample.path] = self.unreadable.get(sample.path, 0) + 1


_DECODED_TOGETHER = 64
"""Files between two steps of the progress bar."""


def _nothing(image: Any) -> Tensor:
    """What is made of an image that only had to be decoded."""
    return torch.empty(0)
