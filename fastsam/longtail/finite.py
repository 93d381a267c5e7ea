"""Check of a network for infinite and NaN values."""

from __future__ import annotations

import torch
from torch import nn


def not_finite(model: nn.Module) -> str | None:
    """Return the name of the first parameter or running statistic with an infinite or NaN value, or None.

    It synchronizes with the device once.
    """
    statistics = ("running_mean", "running_var")
    values = {
        **dict(model.named_parameters()),
        **{name: v for name, v in model.named_buffers() if name.endswith(statistics)},
    }
    finite = torch.stack([value.isfinite().all() for value in values.values()]).tolist()
    return next((name for name, good in zip(values, finite, strict=True) if not good), None)
