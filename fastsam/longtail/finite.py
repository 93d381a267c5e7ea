"""Whether a network still holds numbers."""

from __future__ import annotations

import torch
from torch import nn


def not_finite(model: nn.Module) -> str | None:
    """The first parameter or running statistic with an infinite value or NaN; None if there is none.

    Waits for the device once.
    """
    statistics = ("running_mean", "running_var")
    values = {
        **dict(model.named_parameters()),
        **{name: v for name, v in model.named_buffers() if name.endswith(statistics)},
    }
    finite = torch.stack([value.isfinite().all() for value in values.values()]).tolist()
    return next((name for name, good in zip(values, finite, strict=True) if not good), None)
