"""Scaling and normalization of pixels, on the device of the pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsam.upload import upload


@dataclass(frozen=True)
class Normalization:
    """How raw pixels become the input of a network: ``(pixels / white - mean) / std``.

    Floating-point pixels are in [0, 1] already and are not divided by ``white``.

    Attributes:
        mean: mean of each channel after scaling; a single value applies to all channels.
        std: standard deviation of each channel after scaling.
        white: value of whole-number pixels that is scaled to 1.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    white: float = 255.0

    def on(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """Return the function on a device that maps pixels ``[..., C, H, W]`` to float32 inputs.

        It does not synchronize with the device, and all devices give the same bits.
        """
        mean, std = (upload(torch.tensor(v)[:, None, None], device) for v in (self.mean, self.std))
        # CUDA multiplies by the rounded reciprocal of a number of the host, which differs in the last bit.
        white = upload(torch.tensor(self.white), device)

        def normalize(pixels: Tensor) -> Tensor:
            if pixels.is_floating_point():
                return (pixels - mean).div_(std)
            return pixels.float().div_(white).sub_(mean).div_(std)

        return normalize
