"""Scalars and flags on several devices, copied without a host read."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsam.kernels.copies import need_not_wait


def on(scalar: Tensor | None, device: torch.device) -> Tensor | None:
    """Return a scalar in float32 on ``device``, for its kernels; None for None."""
    if scalar is None:
        return None
    return scalar.to(device, torch.float32, non_blocking=need_not_wait(device))


def raise_flag(flag: Tensor, other: Tensor | None) -> None:
    """Set ``flag`` if ``other`` is set."""
    if other is not None:
        torch.maximum(flag, other.reshape(1), out=flag)
