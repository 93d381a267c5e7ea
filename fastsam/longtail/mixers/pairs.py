"""The images of a batch with their partners, and the two ways to combine them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsam.longtail.data.batch import Batch
from fastsam.longtail.mixers.box import PastedBox
from fastsam.upload import upload


@dataclass(frozen=True)
class Pairs:
    """The images of a batch, each with a partner.

    A mixer computes its random numbers for the batch of all ranks, from the targets below. So they do not
    depend on the number of ranks. :meth:`blended` and :meth:`pasted` select those of this rank.

    Attributes:
        targets: classes of the images of all ranks, int64 ``[N]``, on the host.
        second: classes of their partners, int64 ``[N]``.
        batch: this rank's images, with one view.
        partners: inputs of their partners, ``[B, C, H, W]``.
        rows: places of this rank's images among those of all ranks, int64 ``[B]``.
    """

    targets: NDArray[np.int64]
    second: NDArray[np.int64]
    batch: Batch
    partners: Tensor
    rows: NDArray[np.int64]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        height, width = self.partners.shape[-2:]
        return height, width

    def blended(
        self, weight: float | NDArray[np.float64], share: float | NDArray[np.float64] | None = None
    ) -> Batch:
        """Return ``weight * image + (1 - weight) * partner``.

        Args:
            weight: weight of the images: one number, or one for each image of all ranks, ``[N]``.
            share: share of the images' own classes in the loss, likewise; None for ``weight``.
        """
        inputs = self.batch.inputs
        if isinstance(weight, float | int):
            mixed = weight * inputs + (1 - weight) * self.partners
        else:
            weights = self._own(weight).to(inputs)[:, None, None, None]
            mixed = weights * inputs + (1 - weights) * self.partners
        return self._mixed(mixed, weight if share is None else share)

    def pasted(self, box: PastedBox) -> Batch:
        """Return the images with ``box`` replaced by that of the partner.

        The share of the images' own classes is the area outside the box.
        """
        mixed = self.batch.inputs.clone(memory_format=torch.preserve_format)
        mixed[:, :, box.rows, box.columns] = self.partners[:, :, box.rows, box.columns]
        return self._mixed(mixed, 1 - box.area(*self.size))

    def _mixed(self, inputs: Tensor, share: float | NDArray[np.float64]) -> Batch:
        own = self._own(np.full(len(self.targets), share) if np.ndim(share) == 0 else share)
        second = upload(torch.from_numpy(self.second[self.rows]), inputs.device)
        return self.batch._replace(views=(inputs,), second=second, share=own)

    def _own(self, values: float | NDArray[np.float64]) -> Tensor:
        """Return this rank's part of values of all ranks, float32 ``[B]``, on the device of the images."""
        rows = torch.from_numpy(np.asarray(values)[self.rows]).float()
        return upload(rows, self.partners.device)
