"""The part of reading that the device makes of whole batches: augmentation and normalization."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fastsam.longtail.data.augment import BatchAugmentation
from fastsam.longtail.data.batch import Batch
from fastsam.longtail.data.normalization import Normalization
from fastsam.longtail.data.workers import ReadBatch
from fastsam.upload import upload


@dataclass(frozen=True)
class DevicePart:
    """Turns what the workers read into a batch on the device.

    Attributes:
        normalization: scaling and normalization of the pixels.
        augmentation: augmentation of raw pixels; None for no augmentation. Batches that were read without
            seeds are not augmented.
    """

    normalization: Normalization
    augmentation: BatchAugmentation | None = None

    def on(self, device: torch.device) -> Callable[[ReadBatch], Batch | None]:
        """Return the function that maps a batch that was read to one on ``device``.

        It returns None if no image could be read. It does not synchronize with the device. Images of
        different dtypes are processed apart, so that an image does not depend on the others of its batch.
        """
        normalize = self.normalization.on(device)

        def finish(read: ReadBatch) -> Batch | None:
            parts = []
            for samples in read.samples:
                pixels, targets, indices = (
                    upload(tensor, device)
                    for tensor in (samples.pixels, samples.targets, samples.indices)
                )
                if read.seeds is not None and self.augmentation is not None:
                    pixels = self.augmentation(pixels, read.seeds.take(samples.rows))
                parts.append(Batch((normalize(pixels),), targets, indices))
            if len(parts) < 2:
                return parts[0] if parts else None
            inputs, targets, indices = (
                torch.cat([getattr(part, name) for part in parts])
                for name in ("inputs", "targets", "indices")
            )
            rows = np.argsort(np.concatenate([samples.rows for samples in read.samples]))
            return Batch((inputs,), targets, indices).take(upload(torch.from_numpy(rows), device))

        return finish
