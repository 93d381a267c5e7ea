"""Scaling and normalization of pixels, on the device of the pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsam.longtail.errors import UsageError
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


def check_normalization(
    name: str, channels: int, mean: Sequence[float], std: Sequence[float]
) -> None:
    """Raise :class:`UsageError` unless each channel has a finite mean and a positive deviation.

    Args:
        name: name of the data set, for the message.
        channels: number of channels of its images.
        mean: mean of each channel.
        std: standard deviation of each channel.
    """
    finite = all(math.isfinite(value) for value in (*mean, *std))
    if not (finite and len(mean) == len(std) == channels and min(std) > 0):
        raise UsageError(
            f"{name} has {channels} channel(s): expected as many means and positive standard deviations, got "
            f"{tuple(mean)} and {tuple(std)}; pass one value of each per channel"
        )
