"""Features of images: the inputs of the head of a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastsam.longtail.data import Images
from fastsam.longtail.errors import DataError, TrainingError
from fastsam.longtail.models.classifier import Classifier
from fastsam.longtail.precision import Precision, autocast
from fastsam.progress import ProgressBar

ROWS = 4096
"""Images per chunk. Only one chunk of features is converted to float64 at a time."""


@dataclass(frozen=True, eq=False)
class Features:
    """Features of N images and their classes, on the CPU.

    Attributes:
        values: float32 ``[N, D]``.
        targets: classes, int64 ``[N]``.
    """

    values: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def chunks(self, rows: int, device: torch.device | str = "cpu") -> Iterator[Features]:
        """Iterate over the features in chunks.

        Args:
            rows: largest number of images in a chunk.
            device: device of the chunks.
        """
        for values, targets in zip(
            torch.split(self.values, rows), torch.split(self.targets, rows), strict=True
        ):
            yield Features(values.to(device), targets.to(device))

    def class_means(
        self, num_classes: int, transform: Callable[[Tensor], Tensor] = lambda values: values
    ) -> Tensor:
        """Return the mean of the transformed features of each class, float64 ``[C, D]``.

        Args:
            num_classes: number of classes C.
            transform: function of features ``[B, D]``, float64.

        Raises:
            DataError: if a class has no image.
        """
        seen = torch.bincount(self.targets, minlength=num_classes)
        if not seen.all():
            raise DataError(
                f"class {int(seen.argmin())} has no readable training image, so its mean is undefined; "
                "restore the files or make no use of class means"
            )
        sums = torch.zeros(num_classes, self.values.shape[1], dtype=torch.float64)
        for chunk in self.chunks(ROWS):
            sums.index_add_(0, chunk.targets, transform(chunk.values.double()))
        return sums / seen[:, None]


@torch.no_grad()
def collect_features(
    network: Classifier,
    images: Images,
    device: torch.device,
    *,
    batch_size: int,
    precision: Precision = "float32",
    description: str = "features",
    progress: bool = False,
) -> Features:
    """Compute the features of all readable images, without augmentation and in evaluation mode.

    Args:
        network: the network; its training mode is restored.
        images: the images.
        device: device of the network.
        batch_size: images per batch.
        precision: precision of the forward passes.
        description: label of the progress bar and of error messages.
        progress: show progress: a bar on a terminal, one line per minute elsewhere.

    Raises:
        DataError: if no image can be read.
        TrainingError: if a feature is infinite or NaN.
    """
    training = network.training
    network.eval()
    order = np.array_split(np.arange(len(images)), range(batch_size, len(images), batch_size))
    values = torch.empty(len(images), network.feature_width)
    targets = torch.empty(len(images), dtype=torch.int64)
    read = 0
    try:
        with ProgressBar(
            total=len(order), description=description, unit="batch", enabled=progress
        ) as bar:
            for batch in images.batches(order, None, device):
                end = read + len(batch.targets)
                with autocast(precision, device):
                    values[read:end] = network.features(batch.inputs)
                targets[read:end] = batch.targets
                read = end
                bar.update()
    finally:
        network.train(training)
    if not read:
        raise DataError(f"{description}: no image could be read; check the files")
    found = Features(values[:read], targets[:read])
    wrong = int((~found.values.isfinite().all(dim=1)).sum())
    if wrong:
        raise TrainingError(
            f"{description}: infinite or NaN for {wrong} of {read} images; check the images for such values "
            "or train again with a lower learning rate"
        )
    return found
