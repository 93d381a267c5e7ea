"""Reading of images that are items of a map-style dataset."""

from __future__ import annotations

import random
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
from fastsam.longtail.errors import DataError, UsageError


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


def refuse_random(dataset: Dataset[Any], split: str) -> None:
    """Raise :class:`UsageError` if an item is not the same at every reading, because of a random transform.

    A transform that draws random numbers is found by the states of the global generators, which are then
    restored, even if two readings happen to be equal.

    Args:
        dataset: a map-style dataset with items.
        split: name of the dataset for the message.
    """
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    numpy_state: Any = np.random.get_state()
    first = as_pixels(dataset[0][0])
    left: Any = np.random.get_state()
    draws = not (
        torch.equal(torch.get_rng_state(), torch_state)
        and random.getstate() == python_state
        and np.array_equal(left[1], numpy_state[1])
        and left[2:] == numpy_state[2:]
    )
    changes = draws or not torch.equal(first, as_pixels(dataset[0][0]))
    torch.set_rng_state(torch_state)
    random.setstate(python_state)
    np.random.set_state(numpy_state)
    if changes:
        raise UsageError(
            f"the {split} dataset has a random transform, whose images a run could not repeat; remove it, "
            "and pass what augments training images to from_datasets as augmentation="
        )


def as_image(item: Any) -> Tensor:
    """Convert an image to a float32 tensor ``[C, H, W]``; uint8 values are divided by 255."""
    pixels = as_pixels(item)
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels


def as_pixels(item: Any) -> Tensor:
    """Convert an image to a tensor ``[C, H, W]``: uint8 if it is, otherwise float32.

    Pillow images with a palette, transparency or other colors are converted to RGB or gray, and 16-bit gray
    is scaled to [0, 1], as in image files.

    Raises:
        DataError: if the values have no known range, as in arrays of other integers.
    """
    image = item if isinstance(item, Tensor) else torch.from_numpy(np.array(_plain(item)))
    if not isinstance(item, Tensor):
        image = image[None] if image.ndim == 2 else image.permute(2, 0, 1)
    if image.dtype == torch.uint8:
        return image
    if not image.is_floating_point() and image.dtype != torch.bool:
        raise DataError(
            f"images must be uint8 from 0 to 255, or floats, but got {image.dtype}; divide them by their "
            "largest possible value, and convert them to float32"
        )
    return image.float()


def _plain(item: Any) -> Any:
    """Convert a Pillow image to gray, RGB or an array; return anything else unchanged."""
    mode = getattr(item, "mode", None)
    if mode in (None, "L", "RGB") or not hasattr(item, "convert"):
        return item
    if mode.startswith("I;16"):
        return np.asarray(item).astype(np.float32) / 65535
    if mode in ("I", "F"):
        raise DataError(
            f"the range of a Pillow image of mode {mode} is unknown; return an array of float32 in [0, 1]"
        )
    return item.convert("L" if mode in ("1", "LA", "La") else "RGB")
