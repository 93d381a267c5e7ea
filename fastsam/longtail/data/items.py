"""Reading of images that are items of a map-style dataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from fastsam.longtail.data.augmentations.base import Steps
from fastsam.longtail.data.batch import Batch, Draw
from fastsam.longtail.data.device_part import DevicePart
from fastsam.longtail.data.workers import ReadRequest, Request, Sample, Unreadable, Workers


@dataclass(frozen=True)
class ItemReader(Dataset[ReadRequest]):
    """Reads and augments images in the workers.

    Attributes:
        dataset: a map-style dataset; the first element of an item is the image.
        targets: classes, int64 ``[N]``.
        steps: steps of the augmentation.
    """

    dataset: Dataset[Any]
    targets: NDArray[np.int64]
    steps: Steps

    def __getitem__(self, request: Request) -> ReadRequest:
        images: list[Sample | Unreadable] = []
        for row, place in enumerate(request.samples.tolist()):
            pixels = as_pixels(self.dataset[place][0])
            if request.seeds is not None:
                for step in (self.steps.crop, self.steps.per_image):
                    if step is not None:
                        pixels = step(pixels, request.seeds.take(row))
            images.append(Sample(pixels, int(self.targets[place]), place))
        return ReadRequest(images, request)


def read_items(
    workers: Workers,
    part: DevicePart,
    order: Sequence[NDArray[np.int64]],
    draw: Draw | None,
    device: torch.device,
) -> Iterator[Batch]:
    """Iterate over batches of images.

    Args:
        workers: worker processes with an :class:`ItemReader`.
        part: what the device makes of whole batches.
        order: indices of the images of each batch, int64.
        draw: random choices of the training augmentation; None for clean images.
        device: device of the batches.
    """
    seeds = [None] * len(order) if draw is None else draw.seeds(order)
    requests = (Request(batch, keys) for batch, keys in zip(order, seeds, strict=True))
    finish = part.on(device)
    for read in workers.read(requests, pin=device.type == "cuda"):
        batch = finish(read)
        if batch is not None:
            yield batch


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
